"""`network`: ids, dense columns and domain to logits [B, T] through the compiled or the Triton kernels, with gradients
of everything. `network_loss`: the same up to the training loss, forward and backward in one pass. `pack` and `infer`:
without gradients, from weights packed once.

The ops `network_*` (`namespace.py`) carry no autograd of their own; the `Function`s here add it. They are in ctx style
on purpose: a separate `setup_context` costs 17 us more per call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3oe_fast.bags import Bags, pool
from m3oe_fast.folded import NetworkWeights
from m3oe_fast.ops.namespace import backend_of, fake, ops


class Lookup(NamedTuple):
    """The embedded part of the input: one table for all fields, looked up inside the op.

    Attributes:
        ids: [B, F] int32 or int64, each in [0, vocab[f]).
        embedding: [V, N] in the dtype of x, V = sum(vocab): the rows of field after field.
        vocab: rows of each field.
        sparse_grad: the gradient of `embedding` is a coalesced sparse tensor of the rows that `ids` names, in ascending
            order; for tables so large that a dense gradient costs more than the step. Not under torch.compile.
    """

    ids: Tensor
    embedding: Tensor
    vocab: tuple[int, ...]
    sparse_grad: bool = False


class Switches(NamedTuple):
    """What the ops take besides tensors.

    Attributes:
        star_linear: first term of the representation without LayerNorm and ReLU.
        gate_detach: no gradient flows from the gates into the representation.
        precision: of the products' operands, "fp32", "bf16x3" (each split into two bf16: fp32-class), "tf32" (Triton
            only) or "bf16"; sums, LayerNorm, softmax and loss are fp32 in all. A precision that the processor has no
            fast instructions for is computed in fp32.
    """

    star_linear: bool = False
    gate_detach: bool = True
    precision: str = "fp32"


def network(
    x: Tensor,
    domain: Tensor,
    weights: NetworkWeights,
    *,
    lookup: Lookup | None = None,
    bags: Bags | None = None,
    star_linear: bool = False,
    gate_detach: bool = True,
    gate_mask: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The whole network from its inputs to logits (`folded.network` for rows in any order).

    Args:
        x (Tensor): [B, I] float32, or float64 on the scalar path (for gradient checks). With `lookup` or `bags`
            [B, C], the columns behind the embeddings: I = F N + bags N + C.
        domain (Tensor): [B] int32 or int64 in [0, D).
        weights: see `folded.NetworkWeights`; all in the dtype of x.
        lookup: the embedded part of the input.
        bags: the multi-hot part of the input; its pooled embeddings stand between those of `lookup` and x.
        gate_mask (Tensor | None): [D, T, G] bool, the experts each softmax ranges over.
        star_linear, gate_detach, precision: see `Switches`.
        backend: "cpu" or "triton"; None: by the device of x.

    Returns:
        Tensor: logits [B, T] in the dtype of x, contiguous.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not fit.
        RuntimeError: a domain or an id is out of range; the message names row and field. Backend triton takes the
            nearest one instead and `m3oe_fast.kernels.check_inputs` raises. For `bags` see `m3oe_fast.bags.pool`.

    Deterministic: the same inputs and number of threads (device and Triton) give the same bits. Differentiable once, in
    reverse mode, in x, the embeddings and every weight. Autocast does not apply. jvp and vmap are refused.
    """
    x = _columns(x, bags)
    _check(x, domain, weights, gate_mask, lookup)
    switches = Switches(star_linear, gate_detach, precision)
    ids, embedding, vocab, sparse = _parts(lookup)
    fields = _Fields(backend or backend_of(x.device), vocab, sparse)
    # Without gradients too: the Function is what refuses forward-mode differentiation, the bare op would return zeros.
    return _Network.apply(x, embedding, ids, domain, gate_mask, fields, switches, *weights.flat())


def network_loss(
    x: Tensor,
    domain: Tensor,
    label: Tensor,
    weights: NetworkWeights,
    *,
    lookup: Lookup | None = None,
    bags: Bags | None = None,
    pair_weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    star_linear: bool = False,
    gate_detach: bool = True,
    gate_mask: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The training loss of `network`'s logits (`reference.pair_losses`), with every gradient in the same pass.

    How much a row weighs, pair_weight / n with n the labelled rows of its pair, is known before the forward pass. So
    the gradients are computed along with the loss, nothing is saved or recomputed, and `backward` only scales them.
    Use it where `backward` follows; without gradients `network` is cheaper.

    Args:
        x, domain, weights, lookup, bags, star_linear, gate_detach, gate_mask, precision, backend: as for `network`.
        label (Tensor): [B, T] in the dtype of x, in [0, 1]; NaN = not observed.
        pair_weight (Tensor | None): [D, T] in the dtype of x; default ones.
        row_weight (Tensor | None): [B] in the dtype of x; weighs a row's loss, not the count n. No gradient.

    Returns:
        tuple[Tensor, Tensor]: loss = sum(pair_weight * pair_loss), a scalar, differentiable once in x, the embeddings,
        every weight and pair_weight; and pair_loss [D, T], 0 for a pair without labelled rows, not differentiable.

    Raises:
        ValueError, TypeError, RuntimeError: as for `network`.
    """
    x = _columns(x, bags)
    _check(x, domain, weights, gate_mask, lookup)
    pairs = tuple(weights.table.shape[:2])
    if pair_weight is None:
        pair_weight = x.new_ones(pairs)
    expected = {"label": (label, (x.shape[0], pairs[1])), "pair_weight": (pair_weight, pairs)}
    if row_weight is not None:
        expected["row_weight"] = (row_weight, (x.shape[0],))
    for name, (tensor, shape) in expected.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, it is on {tensor.device}")
        if tuple(tensor.shape) != shape or tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    switches = Switches(star_linear, gate_detach, precision)
    ids, embedding, vocab, sparse = _parts(lookup)
    return _NetworkLoss.apply(
        x,
        embedding,
        pair_weight,
        ids,
        domain,
        label,
        row_weight,
        gate_mask,
        _Fields(backend or backend_of(x.device), vocab, sparse),
        switches,
        *weights.flat(),
    )


def pack(
    weights: NetworkWeights,
    inputs: int,
    *,
    gate_mask: Tensor | None = None,
    star_linear: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """The weights as the kernels of this process read them, for `infer`; `inputs` is I. Opaque: do not store it."""
    flat = weights.flat()
    return ops(backend or backend_of(flat[0].device)).network_pack(flat, gate_mask, inputs, star_linear, precision)


def infer(
    x: Tensor,
    domain: Tensor,
    weights: Sequence[Tensor],
    packed: Tensor,
    *,
    lookup: Lookup | None = None,
    bags: Bags | None = None,
    gate_mask: Tensor | None = None,
    star_linear: bool = False,
    precision: str = "fp32",
    probability: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`network` from packed weights, never differentiable: logits [B, T], or with `probability` their sigmoid.

    `weights` are `NetworkWeights.flat()` of the packed ones, read for their shapes. The arguments are trusted where the
    op itself does not check them: for callers that serve one row at a time.
    """
    x = _columns(x, bags)
    ids, embedding, vocab, _ = _parts(lookup)
    fwd = ops(backend or backend_of(x.device)).network_fwd
    return fwd(x, ids, embedding, vocab, domain, weights, gate_mask, packed, star_linear, precision, probability)


_TABLE = NetworkWeights._fields.index("table")  # among the weights of a Function


class _Fields(NamedTuple):
    """What a Function carries beside tensors and switches."""

    backend: str
    vocab: tuple[int, ...]
    sparse: bool


def _columns(x: Tensor, bags: Bags | None) -> Tensor:
    """What the op takes as x, the columns behind the embeddings that it looks up: pooled bags, then x itself."""
    if x.ndim != 2:
        raise ValueError(f"x must be [B, I], got {list(x.shape)}")
    if bags is None:
        return x
    if bags.embedding.dtype != x.dtype or bags.embedding.device != x.device:
        kind, place = bags.embedding.dtype, bags.embedding.device
        raise TypeError(f"bag_embedding must be {x.dtype} on {x.device} like x, got {kind} on {place}")
    return torch.cat([pool(bags, x.shape[0]), x], dim=1)


def _parts(lookup: Lookup | None) -> tuple[Tensor | None, Tensor | None, tuple[int, ...], bool]:
    return (None, None, (), False) if lookup is None else lookup


def _embedding_grad(needed: bool, sparse: bool) -> str:
    return "none" if not needed else "sparse" if sparse else "dense"


def _embedding_tensor(values: Tensor, rows: Tensor, shape: torch.Size, sparse: bool) -> Tensor:
    if not sparse:
        return values
    return torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=False, is_coalesced=True)


class _NetworkLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        embedding: Tensor | None,
        pair_weight: Tensor,
        ids: Tensor | None,
        domain: Tensor,
        label: Tensor,
        row_weight: Tensor | None,
        gate_mask: Tensor | None,
        fields: _Fields,
        switches: Switches,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        input_grad, embedding_grad = ctx.needs_input_grad[:2]
        backend, vocab, sparse = fields
        ctx.embedding = None if embedding is None else (embedding.shape, sparse)
        pair_loss, *grads = ops(backend).network_loss(
            x,
            ids,
            embedding,
            vocab,
            domain,
            label,
            row_weight,
            pair_weight,
            weights,
            gate_mask,
            *switches,
            input_grad,
            _embedding_grad(embedding_grad, sparse),
            ctx.needs_input_grad[10 + _TABLE],
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
        pair_loss, d_x, d_embedding, embedding_rows, *d_weights = ctx.saved_tensors
        wanted = [d_x, d_embedding, pair_loss, *d_weights]
        needs = [*needed[:3], *needed[10:]]
        d_x, d_embedding, d_pair_weight, *rest = _scaled(wanted, needs, grad)
        if d_embedding is not None:
            d_embedding = _embedding_tensor(d_embedding, embedding_rows, *ctx.embedding)
        return (d_x, d_embedding, d_pair_weight, *(None,) * 7, *rest)


def _scaled(tensors: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Those that are needed times the gradient of the loss, None for the others."""
    if torch.compiler.is_compiling():
        return [tensor * grad if need else None for tensor, need in zip(tensors, needs, strict=True)]
    # `loss.backward()` passes 1: the gradients are already the answer. On a GPU asking would stall the step, and one
    # launch scales them all.
    if grad.device.type == "cpu" and grad.item() == 1.0:
        return [tensor if need else None for tensor, need in zip(tensors, needs, strict=True)]
    scaled = iter(torch._foreach_mul([tensor for tensor, need in zip(tensors, needs, strict=True) if need], grad))
    return [next(scaled) if need else None for need in needs]


class _Network(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        embedding: Tensor | None,
        ids: Tensor | None,
        domain: Tensor,
        gate_mask: Tensor | None,
        fields: _Fields,
        switches: Switches,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, embedding, ids, domain, gate_mask, *weights)
        ctx.fields = fields
        ctx.switches = switches
        star_linear, _, precision = switches
        fwd = ops(fields.backend).network_fwd
        return fwd(x, ids, embedding, fields.vocab, domain, weights, gate_mask, None, star_linear, precision, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, embedding, ids, domain, gate_mask, *weights = ctx.saved_tensors
        backend, vocab, sparse = ctx.fields
        input_grad, embedding_grad = ctx.needs_input_grad[:2]
        wanted = (input_grad, _embedding_grad(embedding_grad, sparse), ctx.needs_input_grad[7 + _TABLE])
        d_x, d_embedding, rows, *d_weights = ops(backend).network_bwd(
            grad, x, ids, embedding, vocab, domain, weights, gate_mask, *ctx.switches, *wanted
        )
        d_embedding = _embedding_tensor(d_embedding, rows, embedding.shape, sparse) if embedding_grad else None
        return (d_x if input_grad else None, d_embedding, *(None,) * 5, *d_weights)


@fake("network_pack")
def _pack_fake(
    weights: Sequence[Tensor], gate_mask: Tensor | None, inputs: int, star_linear: bool, precision: str
) -> Tensor:
    # The length is the kernels' own affair.
    return weights[0].new_empty((torch.library.get_ctx().new_dynamic_size(),))


@fake("network_fwd")
def _fwd_fake(
    x: Tensor,
    ids: Tensor | None,
    embedding: Tensor | None,
    vocab: Sequence[int],
    domain: Tensor,
    weights: Sequence[Tensor],
    gate_mask: Tensor | None,
    packed: Tensor | None,
    star_linear: bool,
    precision: str,
    probability: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], weights[10].shape[1]))


@fake("network_bwd")
def _bwd_fake(
    grad: Tensor,
    x: Tensor,
    ids: Tensor | None,
    embedding: Tensor | None,
    vocab: Sequence[int],
    domain: Tensor,
    weights: Sequence[Tensor],
    gate_mask: Tensor | None,
    star_linear: bool,
    gate_detach: bool,
    precision: str,
    input_grad: bool,
    embedding_grad: str,
    table_grad: bool,
) -> list[Tensor]:
    d_x = x.new_empty((x.shape[0] if input_grad else 0, x.shape[1]))
    d_embedding, rows = x.new_empty((0, 0)), x.new_empty((0,), dtype=torch.int64)
    if embedding is not None and embedding_grad == "dense":
        d_embedding = x.new_empty(embedding.shape)
    elif embedding is not None and embedding_grad == "sparse":
        distinct = torch.library.get_ctx().new_dynamic_size()
        d_embedding = x.new_empty((distinct, embedding.shape[1]))
        rows = x.new_empty((distinct,), dtype=torch.int64)
    return [d_x, d_embedding, rows, *(w.new_empty(w.shape) for w in weights)]


@fake("network_loss")
def _loss_fake(
    x: Tensor,
    ids: Tensor | None,
    embedding: Tensor | None,
    vocab: Sequence[int],
    domain: Tensor,
    label: Tensor,
    row_weight: Tensor | None,
    pair_weight: Tensor,
    weights: Sequence[Tensor],
    gate_mask: Tensor | None,
    star_linear: bool,
    gate_detach: bool,
    precision: str,
    input_grad: bool,
    embedding_grad: str,
    table_grad: bool,
) -> list[Tensor]:
    grads = _bwd_fake(
        label,
        x,
        ids,
        embedding,
        vocab,
        domain,
        weights,
        gate_mask,
        star_linear,
        gate_detach,
        precision,
        input_grad,
        embedding_grad,
        table_grad,
    )
    return [x.new_empty(pair_weight.shape), *grads]


def _check(x: Tensor, domain: Tensor, weights: NetworkWeights, gate_mask: Tensor | None, lookup: Lookup | None) -> None:
    if domain.shape != x.shape[:1]:
        raise ValueError(f"domain must be [B] = [{x.shape[0]}], got {list(domain.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}")
    if domain.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"domain must be int32 or int64, got {domain.dtype}")
    inputs = x.shape[1] if lookup is None else x.shape[1] + _check_lookup(x, lookup)
    for name, shape in _expected_shapes(inputs, weights).items():
        tensor = _named(weights, name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    for tensor in weights.flat():
        if tensor.dtype != x.dtype:
            raise TypeError(f"all weights must be {x.dtype} like x, one is {tensor.dtype}")
    mask_shape = weights.gate_bias.shape
    if gate_mask is not None and (gate_mask.dtype != torch.bool or gate_mask.shape != mask_shape):
        raise ValueError(f"gate_mask must be bool {list(mask_shape)}, got {gate_mask.dtype} {list(gate_mask.shape)}")
    optional = [gate_mask, *(() if lookup is None else lookup[:2])]
    for tensor in (domain, *weights.flat(), *(tensor for tensor in optional if tensor is not None)):
        if tensor.device != x.device:
            raise ValueError(f"all tensors must be on {x.device}, one is on {tensor.device}")


def _check_lookup(x: Tensor, lookup: Lookup) -> int:
    """Checks the embedded part of the input; returns its width F * N."""
    ids, embedding, vocab, _ = lookup
    if ids.shape != (x.shape[0], len(vocab)):
        raise ValueError(f"ids must be [B, F] = [{x.shape[0]}, {len(vocab)}], got {list(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids must be int32 or int64, got {ids.dtype}")
    if embedding.ndim != 2 or embedding.shape[0] != sum(vocab):
        raise ValueError(f"embedding must be [V, N] with V = sum(vocab) = {sum(vocab)}, got {list(embedding.shape)}")
    if embedding.dtype != x.dtype:
        raise TypeError(f"embedding must be {x.dtype} like x, got {embedding.dtype}")
    return len(vocab) * embedding.shape[1]


def _named(weights: NetworkWeights, name: str) -> Tensor:
    """`table`, or for an expert layer `experts[0].weight`."""
    if not name.startswith("experts"):
        return getattr(weights, name)
    layer, part = name[len("experts[") :].split("].")
    return getattr(weights.experts[int(layer)], part)


def _expected_shapes(inputs: int, weights: NetworkWeights) -> dict[str, tuple[int, ...]]:
    """The shape of every weight by name, from I and from the few weights that define the sizes."""
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
