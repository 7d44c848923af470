"""`network`: x [B, I] and domain [B] to logits [B, T] through the compiled CPU kernels, with gradients of everything.
`network_loss`: the same up to the training loss, forward and backward in one pass.

The ops `m3oe_fast::network_fwd`, `network_bwd` and `network_loss` carry no autograd of their own; the `Function`s here
add it. They are in ctx style on purpose: a separate `setup_context` costs 17 us more per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3oe_fast import _extension
from m3oe_fast.folded import NetworkWeights

_extension.load()
_fwd = torch.ops.m3oe_fast.network_fwd.default
_bwd = torch.ops.m3oe_fast.network_bwd.default
_loss = torch.ops.m3oe_fast.network_loss.default


def network(
    x: Tensor,
    domain: Tensor,
    weights: NetworkWeights,
    *,
    star_linear: bool = False,
    gate_detach: bool = True,
    gate_mask: Tensor | None = None,
) -> Tensor:
    """The whole network from x to logits (`folded.network` for rows in any order).

    Args:
        x (Tensor): [B, I] float32, or float64 on the scalar path (for gradient checks).
        domain (Tensor): [B] int32 or int64 in [0, D).
        weights: see `folded.NetworkWeights`; all in the dtype of x.
        star_linear: first term of the representation without LayerNorm and ReLU.
        gate_detach: no gradient flows from the gates into the representation.
        gate_mask (Tensor | None): [D, T, G] bool, the experts each softmax ranges over.

    Returns:
        Tensor: logits [B, T] in the dtype of x, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
        RuntimeError: a domain id is outside [0, D); the message names the row.

    Deterministic: the same inputs and number of threads give the same bits. Differentiable once, in
    reverse mode, in x and every weight. Autocast does not apply. jvp and vmap are refused.
    """
    _check(x, domain, weights, gate_mask)
    # Without gradients too: the Function is what refuses forward-mode differentiation, the bare op would return zeros.
    return _Network.apply(x, domain, gate_mask, star_linear, gate_detach, *weights.flat())


def network_loss(
    x: Tensor,
    domain: Tensor,
    label: Tensor,
    weights: NetworkWeights,
    *,
    pair_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    star_linear: bool = False,
    gate_detach: bool = True,
    gate_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The training loss of `network`'s logits (`reference.pair_losses`), with every gradient in the same pass.

    How much a row weighs, pair_weight / n with n the labelled rows of its pair, is known before the forward pass. So
    the gradients are computed along with the loss, nothing is saved or recomputed, and `backward` only scales them.
    Use it where `backward` follows; without gradients `network` is cheaper.

    Args:
        x, domain, weights, star_linear, gate_detach, gate_mask: as for `network`.
        label (Tensor): [B, T] in the dtype of x, in [0, 1]; NaN = not observed.
        pair_weight (Tensor | None): [D, T] in the dtype of x; default ones.
        row_weight (Tensor | None): [B] in the dtype of x; weighs a row's loss, not the count n. No gradient.

    Returns:
        tuple[Tensor, Tensor]: loss = sum(pair_weight * pair_loss), a scalar, differentiable once in x, every weight and
        pair_weight; and pair_loss [D, T], 0 for a pair without labelled rows, not differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: as for `network`.
    """
    _check(x, domain, weights, gate_mask)
    pairs = tuple(weights.table.shape[:2])
    if pair_weight is None:
        pair_weight = x.new_ones(pairs)
    expected = {"label": (label, (x.shape[0], pairs[1])), "pair_weight": (pair_weight, pairs)}
    if row_weight is not None:
        expected["row_weight"] = (row_weight, (x.shape[0],))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    return _NetworkLoss.apply(
        x, domain, label, row_weight, pair_weight, gate_mask, star_linear, gate_detach, *weights.flat()
    )


class _NetworkLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        domain: Tensor,
        label: Tensor,
        row_weight: Tensor | None,
        pair_weight: Tensor,
        gate_mask: Tensor | None,
        star_linear: bool,
        gate_detach: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        input_grad = ctx.needs_input_grad[0]
        pair_loss, *grads = _loss(
            x, domain, label, row_weight, pair_weight, weights, gate_mask, star_linear, gate_detach, input_grad
        )
        ctx.save_for_backward(pair_loss, *grads)
        ctx.mark_non_differentiable(pair_loss)
        ctx.set_materialize_grads(False)
        return (pair_weight * pair_loss).sum(), pair_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad is None:
            return (None,) * len(needed)
        pair_loss, d_x, *d_weights = ctx.saved_tensors
        # `loss.backward()` passes 1: the gradients are already the answer.
        unscaled = not torch.compiler.is_compiling() and grad.item() == 1.0

        def scaled(tensor: Tensor, need: bool) -> Tensor | None:
            if not need:
                return None
            return tensor if unscaled else tensor * grad

        rest = [scaled(d, need) for d, need in zip(d_weights, needed[8:], strict=True)]
        return (scaled(d_x, needed[0]), None, None, None, scaled(pair_loss, needed[4]), None, None, None, *rest)


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        domain: Tensor,
        gate_mask: Tensor | None,
        star_linear: bool,
        gate_detach: bool,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, domain, gate_mask, *weights)
        ctx.switches = (star_linear, gate_detach)
        return _fwd(x, domain, weights, gate_mask, star_linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, domain, gate_mask, *weights = ctx.saved_tensors
        input_grad = ctx.needs_input_grad[0]
        d_x, *d_weights = _bwd(grad, x, domain, weights, gate_mask, *ctx.switches, input_grad)
        return (d_x if input_grad else None, None, None, None, None, *d_weights)


@torch.library.register_fake("m3oe_fast::network_fwd")
def _fwd_fake(
    x: Tensor, domain: Tensor, weights: Sequence[Tensor], gate_mask: Tensor | None, star_linear: bool
) -> Tensor:
    return x.new_empty((x.shape[0], weights[10].shape[1]))


@torch.library.register_fake("m3oe_fast::network_bwd")
def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    domain: Tensor,
    weights: Sequence[Tensor],
    gate_mask: Tensor | None,
    star_linear: bool,
    gate_detach: bool,
    input_grad: bool,
) -> list[Tensor]:
    d_x = x.new_empty((x.shape[0] if input_grad else 0, x.shape[1]))
    return [d_x, *(w.new_empty(w.shape) for w in weights)]


@torch.library.register_fake("m3oe_fast::network_loss")
def _loss_fake(
    x: Tensor,
    domain: Tensor,
    label: Tensor,
    row_weight: Tensor | None,
    pair_weight: Tensor,
    weights: Sequence[Tensor],
    gate_mask: Tensor | None,
    star_linear: bool,
    gate_detach: bool,
    input_grad: bool,
) -> list[Tensor]:
    grads = _bwd_fake(label, x, domain, weights, gate_mask, star_linear, gate_detach, input_grad)
    return [x.new_empty(pair_weight.shape), *grads]


def _check(x: Tensor, domain: Tensor, weights: NetworkWeights, gate_mask: Tensor | None) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [B, I], got {list(x.shape)}")
    if domain.shape != x.shape[:1]:
        raise ValueError(f"domain must be [B] = [{x.shape[0]}], got {list(domain.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if domain.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"domain must be int32 or int64, got {domain.dtype}")
    for name, shape in _expected_shapes(x, weights).items():
        tensor = _named(weights, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    for tensor in weights.flat():
        if tensor.dtype != x.dtype:
            raise TypeError(f"all weights must be {x.dtype} like x, one is {tensor.dtype}")
    mask_shape = weights.gate_bias.shape
    if gate_mask is not None and (gate_mask.dtype != torch.bool or gate_mask.shape != mask_shape):
        raise ValueError(f"gate_mask must be bool {list(mask_shape)}, got {gate_mask.dtype} {list(gate_mask.shape)}")
    for tensor in (domain, *weights.flat(), *([] if gate_mask is None else [gate_mask])):
        if tensor.device != x.device:
            raise ValueError(f"all tensors must be on {x.device}, one is on {tensor.device}")


def _named(weights: NetworkWeights, name: str) -> Tensor:
    """`table`, or for an expert layer `experts[0].weight`."""
    if not name.startswith("experts"):
        return getattr(weights, name)
    layer, part = name[len("experts[") :].split("].")
    return getattr(weights.experts[int(layer)], part)


def _expected_shapes(x: Tensor, weights: NetworkWeights) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name, from x and from the few weights that define the sizes."""
    if not weights.experts:
        raise ValueError("weights.experts must hold at least one layer")
    for name, ndim in (("table", 3), ("gate_weight", 4), ("head_weight", 3)):
        if _named(weights, name).ndim != ndim:
            raise ValueError(f"{name} must have {ndim} dimensions, got {list(_named(weights, name).shape)}")
    d, t, e = weights.table.shape
    gated, tower = weights.gate_weight.shape[-1], weights.head_weight.shape[-1]
    if gated > e:
        raise ValueError(f"gate_weight gates {gated} experts, table has {e}")
    expected: dict[str, tuple[int, ...]] = {}
    inputs = x.shape[1]
    hidden = fan_in = weights.skip_weight.shape[-1] if weights.star_weight.numel() else inputs
    for i, layer in enumerate(weights.experts):
        width = layer.weight.shape[-1]
        expected[f"experts[{i}].weight"] = (e, fan_in, width)
        expected |= dict.fromkeys((f"experts[{i}].{part}" for part in ("bias", "gain", "offset")), (e, width))
        fan_in = width
    expected |= {"gate_weight": (d, t, hidden, gated), "gate_bias": (d, t, gated)}
    expected |= {"tower_weight": (d, t, fan_in, tower), "head_bias": (d, t)}
    expected |= dict.fromkeys(("tower_bias", "tower_gain", "tower_offset", "head_weight"), (d, t, tower))
    vectors = ("star_gain", "star_offset", "skip_bias", "skip_gain", "skip_offset")
    if weights.star_weight.numel():
        expected |= {"star_weight": (d, inputs, hidden), "star_bias": (d, hidden), "skip_weight": (inputs, hidden)}
        return expected | dict.fromkeys(vectors, (hidden,))
    for name in ("star_bias", "skip_weight", *vectors):
        if _named(weights, name).numel():
            raise ValueError(f"{name} must be empty, as star_weight is (no representation layer)")
    return expected
