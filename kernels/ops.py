"""The ops of csrc/ops.cpp in the namespace `m3oe_fast_triton`: same schemas, run by the Triton kernels beside this.

For CUDA tensors, and for CPU tensors where Triton interprets (TRITON_INTERPRET=1). Importing this registers them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from m3oe_fast import _extension

from . import flags, fold, launch, tuning
from .backward import Targets, backward
from .embedding import embedding_bwd
from .inputs import Inputs, inputs
from .layout import Layout
from .network import forward
from .pack import pack, packed_length
from .route import Routed

NAMESPACE = "m3oe_fast_triton"


def network_pack(
    weights: Sequence[Tensor], gate_mask: Tensor | None, inputs: int, star_linear: bool, precision: str
) -> Tensor:
    _expect_floats(*weights)
    # The input may be embedded or not, packed weights are the same.
    columns = weights[0].new_empty((0, inputs))
    layout = Layout.of(
        columns, None, (), weights, star_linear=star_linear, masked=gate_mask is not None, precision=precision
    )
    return pack(weights, layout)


def network_fwd(
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
    layout, data = _prepare(x, ids, embedding, vocab, domain, weights, gate_mask, star_linear, True, precision)
    if packed is None:
        packed = pack(weights, layout)
    elif packed.dtype != torch.float32 or packed.shape != (packed_length(layout),) or not packed.is_contiguous():
        raise ValueError("packed is not what network_pack returns for these weights and this precision")
    else:
        _expect_device(x, packed)
    routed = Routed(domain, layout.domains, layout.tasks, data.flags)
    return forward(data, routed, packed, gate_mask, layout, probability)


def network_bwd(
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
    layout, data = _prepare(x, ids, embedding, vocab, domain, weights, gate_mask, star_linear, gate_detach, precision)
    _expect("grad", grad, (x.shape[0], layout.tasks))
    _expect_device(x, grad)
    routed = Routed(domain, layout.domains, layout.tasks, data.flags)
    targets = Targets(grad, is_label=False)
    return _gradients(layout, data, routed, weights, gate_mask, targets, input_grad, embedding_grad)[1:]


def network_loss(
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
    layout, data = _prepare(x, ids, embedding, vocab, domain, weights, gate_mask, star_linear, gate_detach, precision)
    _expect("label", label, (x.shape[0], layout.tasks))
    _expect("pair_weight", pair_weight, (layout.domains, layout.tasks))
    if row_weight is not None:
        _expect("row_weight", row_weight, (x.shape[0],))
    _expect_device(x, label, pair_weight, row_weight)
    label = label.contiguous()
    routed = Routed(domain, layout.domains, layout.tasks, data.flags, label)
    targets = Targets(label, True, row_weight, pair_weight)
    return _gradients(layout, data, routed, weights, gate_mask, targets, input_grad, embedding_grad)


def _gradients(
    layout: Layout,
    data: Inputs,
    routed: Routed,
    weights: Sequence[Tensor],
    gate_mask: Tensor | None,
    targets: Targets,
    input_grad: bool,
    embedding_grad: str,
) -> list[Tensor]:
    """pair_loss, then d_x, d_embedding, its rows, and a gradient per weight."""
    if embedding_grad not in ("none", "dense", "sparse"):
        raise ValueError(f"embedding_grad must be none, dense or sparse, got {embedding_grad!r}")
    wants_table = embedding_grad != "none" and data.embedding is not data.x
    has_rows = wants_table and layout.fields > 0
    packed = pack(weights, layout)
    wants_input = input_grad or has_rows
    flat, d_input = backward(data, routed, packed, gate_mask, targets, layout, wants_input)
    pair_loss, *d_weights = _apart(flat, ((layout.domains, layout.tasks), *layout.shapes), layout)
    x = data.x
    d_x = x.new_empty((0, x.shape[1]))
    if input_grad:
        d_x = d_input[:, layout.inputs - layout.columns :].clone(memory_format=torch.contiguous_format)
    d_embedding, rows = x.new_empty((0, 0)), x.new_empty((0,), dtype=torch.int64)
    if wants_table and not has_rows:
        dense = embedding_grad == "dense"
        d_embedding = x.new_zeros(data.embedding.shape if dense else (0, data.embedding.shape[1]))
    elif wants_table and embedding_grad == "dense":
        d_embedding = embedding_bwd(d_input, data.ids, data.fields, routed.peak, data.embedding.shape)
    elif wants_table:
        d_embedding, rows = _sparse_gradient(d_input, data, routed.peak)
    return [pair_loss, d_x, d_embedding, rows, *d_weights]


def _apart(flat: Tensor, shapes: Sequence[tuple[int, ...]], layout: Layout) -> list[Tensor]:
    """pair_loss and the gradients as tensors of their own, in one launch: an op's outputs must not share memory."""
    parts = [flat[layout.flat_size :], *flat[: layout.flat_size].split(layout.sizes)]
    results = [flat.new_empty(shape) for shape in shapes]
    torch._foreach_copy_([result.view(-1) for result in results], parts)
    return results


def _sparse_gradient(d_input: Tensor, data: Inputs, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Values [U, N] of the distinct rows [U], ascending. Their number is read back: no CUDA graph can hold this."""
    starts, sizes = data.fields
    places = data.ids.long().clamp(min=0).minimum(sizes - 1) + starts
    rows, inverse = torch.unique(places, return_inverse=True)
    fields = torch.stack([torch.zeros_like(starts), torch.full_like(sizes, rows.shape[0])])
    return embedding_bwd(d_input, inverse, fields, peak, (rows.shape[0], data.embedding.shape[1])), rows


def _prepare(
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
) -> tuple[Layout, Inputs]:
    """Checks what would read out of bounds; values of ids and domains are clamped in the kernels."""
    vocab = tuple(vocab)
    if x.ndim != 2 or domain.shape != x.shape[:1]:
        raise ValueError(f"x must be [B, C] and domain [B], got {list(x.shape)} and {list(domain.shape)}")
    if x.shape[0] >= 2**31 - 2**20:
        raise ValueError(f"x has {x.shape[0]} rows, more than 32 bits count; split the batch")
    if (ids is None) != (embedding is None):
        raise ValueError("ids and embedding come together")
    if ids is not None:
        _expect_integers("ids", ids, (x.shape[0], len(vocab)))
        if min(vocab, default=1) < 1 or embedding.ndim != 2 or embedding.shape[0] != sum(vocab):
            raise ValueError(f"embedding must be [V, N] with V = sum(vocab), got {list(embedding.shape)}, {vocab}")
    _expect_integers("domain", domain, (x.shape[0],))
    _expect_floats(x, embedding, *weights)
    _expect_device(x, embedding, *weights, ids, domain, gate_mask)
    layout = Layout.of(
        x,
        embedding,
        vocab,
        weights,
        star_linear=star_linear,
        gate_detach=gate_detach,
        masked=gate_mask is not None,
        precision=precision,
    )
    tuning.check(layout, x.device)
    if gate_mask is not None and (gate_mask.dtype != torch.bool or gate_mask.shape != weights[9].shape):
        raise ValueError(f"gate_mask must be bool {list(weights[9].shape)}")
    return layout, inputs(x, ids, embedding, vocab, flags.of(x.device))


def _expect_device(x: Tensor, *tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"all tensors must be on {x.device}, one is on {tensor.device}")


def _expect_floats(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"backend triton computes on float32 tensors, one is {tensor.dtype}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be float32 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _expect_integers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in (torch.int32, torch.int64) or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be int32 or int64 {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the device of the tensors, which need not be the current one; gradients are made elsewhere."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> Any:
        device = _first_tensor(arguments).device
        guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), guard:
            return function(*arguments)

    return guarded


def _first_tensor(arguments: Sequence[Any]) -> Tensor:
    first = arguments[0]
    return first if isinstance(first, Tensor) else first[0]


def _register() -> torch.library.Library:
    """Every schema of `m3oe_fast` again, so that there is one place that declares them."""
    _extension.load()
    library = torch.library.Library(NAMESPACE, "DEF")
    keys = ["CUDA", "CPU"] if launch.interpreted() else ["CUDA"]
    for function in (network_pack, network_fwd, network_bwd, network_loss, fold.star_fold, fold.star_fold_bwd):
        name = function.__name__
        schema = str(getattr(torch.ops.m3oe_fast, name).default._schema)
        library.define(schema.split("::")[1])
        for key in keys:
            library.impl(name, _on_its_device(function), key)
    return library


_library = _register()
