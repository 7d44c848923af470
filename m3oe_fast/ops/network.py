"""`network`: x [B, I] and domain [B] to logits [B, T] through the compiled CPU kernels, with gradients of everything.

The op pair `m3oe_fast::network_fwd` / `network_bwd` carries no autograd of its own; the `autograd.Function` here joins
them. It is the ctx style on purpose: a separate `setup_context` costs 17 us more per call.
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

    Deterministic: the same inputs and number of threads give the same bits. Differentiable once in x and every weight.
    Autocast does not apply. vmap is not supported.
    """
    _check(x, domain, weights, gate_mask)
    flat = weights.flat()
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in flat)):
        return _Network.apply(x, domain, gate_mask, star_linear, gate_detach, *flat)
    return _fwd(x, domain, flat, gate_mask, star_linear)


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


def _check(x: Tensor, domain: Tensor, weights: NetworkWeights, gate_mask: Tensor | None) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [B, I], got {list(x.shape)}")
    if domain.shape != x.shape[:1]:
        raise ValueError(f"domain must be [B] = [{x.shape[0]}], got {list(domain.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if domain.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"domain must be int32 or int64, got {domain.dtype}")
    if not weights.experts:
        raise ValueError("weights.experts must hold at least one layer")
    d, t, e = weights.table.shape
    hidden = weights.experts[0].weight.shape[1]
    gated = weights.gate_weight.shape[-1]
    width, tower = weights.experts[-1].weight.shape[2], weights.head_weight.shape[-1]
    expected: dict[str, tuple[int, ...]] = {
        "gate_weight": (d, t, hidden, gated),
        "gate_bias": (d, t, gated),
        "table": (d, t, e),
        "tower_weight": (d, t, width, tower),
        "head_bias": (d, t),
    }
    expected |= dict.fromkeys(("tower_bias", "tower_gain", "tower_offset", "head_weight"), (d, t, tower))
    if weights.star_weight.numel():
        inputs = x.shape[1]
        expected |= {"star_weight": (d, inputs, hidden), "star_bias": (d, hidden), "skip_weight": (inputs, hidden)}
        expected |= dict.fromkeys(("star_gain", "star_offset", "skip_bias", "skip_gain", "skip_offset"), (hidden,))
    elif x.shape[1] != hidden:
        raise ValueError(f"without a representation layer x must be [B, H] with H = {hidden}, got {list(x.shape)}")
    for name, shape in expected.items():
        if tuple(getattr(weights, name).shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(getattr(weights, name).shape)}")
    for tensor in (domain, *weights.flat()):
        if tensor.device != x.device:
            raise ValueError(f"all tensors must be on {x.device}, one is on {tensor.device}")
    for tensor in weights.flat():
        if tensor.dtype != x.dtype:
            raise TypeError(f"all weights must be {x.dtype} like x, one is {tensor.dtype}")
    if gate_mask is not None and (gate_mask.dtype != torch.bool or tuple(gate_mask.shape) != (d, t, gated)):
        raise ValueError(f"gate_mask must be bool {[d, t, gated]}, got {gate_mask.dtype} {list(gate_mask.shape)}")
