"""The weights as the kernels read them: one flat float32 buffer, and the padded, rounded matrices (see `layout.py`).

Decomposition: one program per 1,024 elements of a plane. Traffic: every weight read once, every operand written once;
1.8 MB for bf16 at the published sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layout import Layout
from .tile import narrow

BLOCK = 1024
_ALIGNED = 32  # elements of `flat` are padded to this, so that the operands behind it begin at 128 bytes


@triton.jit
def elements(flat, at, i: tl.constexpr, L: tl.constexpr):
    """What lies at places `at` of a plane if matrices of kind i lie there, else 0."""
    ROWS: tl.constexpr = L.matrices[i].rows
    COLS: tl.constexpr = L.matrices[i].cols
    PADDED_ROWS: tl.constexpr = L.matrices[i].padded_rows
    PADDED_COLS: tl.constexpr = L.matrices[i].padded_cols
    SOURCE: tl.constexpr = L.matrices[i].source
    TARGET: tl.constexpr = L.matrices[i].target
    SIZE: tl.constexpr = L.matrices[i].padded_size
    if SIZE == 0:
        return tl.zeros_like(at).to(tl.float32)
    else:
        within = at - TARGET
        col = within % PADDED_COLS
        row = within // PADDED_COLS % PADDED_ROWS
        which = within // (PADDED_COLS * PADDED_ROWS)
        inside = (within >= 0) & (within < SIZE) & (row < ROWS) & (col < COLS)
        return tl.load(flat + SOURCE + (which * ROWS + row) * COLS + col, mask=inside, other=0.0)


@triton.jit
def pack_kernel(flat, operands, L: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """Also zeroes what lies between `flat` and `operands`: no output of an op may hold what nobody wrote."""
    FLAT: tl.constexpr = L.flat_size
    KINDS: tl.constexpr = len(L.matrices)
    PLANE: tl.constexpr = L.plane
    PRECISION: tl.constexpr = L.precision
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        gap = FLAT + tl.arange(0, ALIGNED)
        tl.store(flat + gap, tl.zeros([ALIGNED], tl.float32), mask=gap < tl.cdiv(FLAT, ALIGNED) * ALIGNED)
    value = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(KINDS):
        value += elements(flat, at, i, L)
    if PRECISION == "bf16x3":
        high = narrow(value)
        tl.store(operands + at, high, mask=at < PLANE)
        tl.store(operands + PLANE + at, narrow(value - high.to(tl.float32)), mask=at < PLANE)
    elif PRECISION == "bf16":
        tl.store(operands + at, narrow(value), mask=at < PLANE)
    else:
        tl.store(operands + at, value, mask=at < PLANE)


class Packed(NamedTuple):
    """`flat` float32 [flat_size], `operands` [planes x plane] in the dtype of products."""

    flat: Tensor
    operands: Tensor


def operand_dtype(layout: Layout) -> torch.dtype:
    return torch.bfloat16 if layout.precision in ("bf16", "bf16x3") else torch.float32


def tape_dtype(layout: Layout) -> torch.dtype:
    return torch.bfloat16 if layout.precision == "bf16" else torch.float32


def _flat_length(layout: Layout) -> int:
    return -(-layout.flat_size // _ALIGNED) * _ALIGNED


def packed_length(layout: Layout) -> int:
    """float32 elements of the one buffer that holds both; differs wherever what it holds does."""
    narrow = operand_dtype(layout) == torch.bfloat16
    size = layout.planes * layout.plane
    # Two bf16 planes would be as long as one of float32.
    tag = _ALIGNED if layout.planes == 2 else 0
    return _flat_length(layout) + (-(-size // 2) if narrow else size) + tag


def pack(weights: Sequence[Tensor], layout: Layout) -> Tensor:
    """float32 [packed_length]."""
    buffer = torch.empty(packed_length(layout), dtype=torch.float32, device=weights[0].device)
    if layout.planes == 2:
        buffer[-_ALIGNED:].zero_()
    torch.cat([weight.reshape(-1) for weight in weights], out=buffer[: layout.flat_size])
    flat, operands = unpack(buffer, layout)
    grid = (triton.cdiv(layout.plane, BLOCK),)
    launch(pack_kernel, grid, flat, operands, L=layout, BLOCK=BLOCK, ALIGNED=_ALIGNED, num_warps=4)
    return buffer


def unpack(buffer: Tensor, layout: Layout) -> Packed:
    """Views of what `pack` returned."""
    behind = buffer[_flat_length(layout) :].view(operand_dtype(layout))
    return Packed(buffer[: layout.flat_size], behind[: layout.planes * layout.plane])
