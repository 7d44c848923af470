"""Gradient of the embedding table from that of the input, without a sort, all fields in one launch, reproducible.

Sums are kept in 64-bit fixed point, scaled by the largest gradient of the batch so that no sum can overflow: integer
additions give the same bits in any order. Their quantum is 2^-61 of B times that gradient; at B = 65,536 gradients a
million times smaller than the largest keep the digits of float32, and those 3e-14 as large vanish.
Fields of at most `SMALL` rows, where every row of the log would hit the same few addresses, are first added up on chip:
a one-hot matrix [SMALL, rows] times the gradients; the others go to memory at once, one atomic addition per element.

Decomposition: program (rows, field, columns). Traffic: 4 N bytes read per row and field, 8 N added atomically for large
fields, 12 N per row of the table.

A gradient that is not finite, or above 2^117, makes the whole result NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .layout import padded

SMALL = 64
ROWS = 1024  # of a program
STEP = 64  # taken at once
BLOCK = 1024
WIDEST = 128  # columns of a program


@triton.jit
def shift_of(peak, B):
    """Power of two that scales gradients: `B` of them, none above what `peak` has the bits of, sum up to below 2^62."""
    exponent = (tl.load(peak) >> 23) - 127
    bits = tl.zeros([], tl.int32)
    while (B >> bits) > 0:
        bits += 1
    return 61 - exponent - bits


@triton.jit
def power_of_two(exponent):
    """float64, for exponents in [-1022, 1023]."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def embedding_bwd_kernel(
    d_input,
    ids,
    fields,
    peak,
    sums,
    B,
    INPUTS: tl.constexpr,
    FIELDS: tl.constexpr,
    EMBED: tl.constexpr,
    WIDTH: tl.constexpr,
    SMALL: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """sums int64 [V, N] += fixed-point gradients of one field's embeddings for ROWS rows."""
    first, field, column = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2) * WIDTH
    start, size = tl.load(fields + field), tl.load(fields + FIELDS + field)
    scale = power_of_two(shift_of(peak, B))
    lane, n = tl.arange(0, STEP), column + tl.arange(0, WIDTH)
    v = tl.arange(0, SMALL)
    together = tl.zeros([SMALL, WIDTH], tl.float32)
    is_small = size <= SMALL
    for step in range(0, ROWS, STEP):
        row = (first + step + lane).to(tl.int64)
        inside = row < B
        id = tl.load(ids + row * FIELDS + field, mask=inside, other=0).to(tl.int64)
        id = tl.maximum(tl.minimum(id, size - 1), 0)
        mask = inside[:, None] & (n < EMBED)[None, :]
        value = tl.load(d_input + row[:, None] * INPUTS + (field * EMBED + n)[None, :], mask=mask, other=0.0)
        if is_small:
            one_hot = (v[:, None] == id[None, :]).to(tl.float32)
            together = tl.dot(one_hot, value, together, input_precision="ieee")
        else:
            fixed = tl.floor(value.to(tl.float64) * scale + 0.5).to(tl.int64)
            tl.atomic_add(sums + (start + id)[:, None] * EMBED + n[None, :], fixed, mask=mask, sem="relaxed")
    if is_small:
        fixed = tl.floor(together.to(tl.float64) * scale + 0.5).to(tl.int64)
        mask = (v < size)[:, None] & (n < EMBED)[None, :]
        tl.atomic_add(sums + (start + v)[:, None] * EMBED + n[None, :], fixed, mask=mask, sem="relaxed")


@triton.jit
def embedding_finish_kernel(sums, peak, gradient, B, SIZE, BLOCK: tl.constexpr):
    """gradient float32 = sums / 2^shift."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(sums + at, mask=at < SIZE, other=0).to(tl.float64) * power_of_two(-shift_of(peak, B))
    finite = tl.load(peak) < 0x7A800000  # 2^118: ROWS of them are still a float32
    tl.store(gradient + at, tl.where(finite, value.to(tl.float32), float("nan")), mask=at < SIZE)


def embedding_bwd(
    d_input: Tensor, ids: Tensor, fields: Tensor, peak: Tensor, shape: tuple[int, int] | torch.Size
) -> Tensor:
    """Gradient of the table, `shape` = [V, N].

    Args:
        d_input: [B, I] float32, the embedded columns first.
        ids: [B, F].
        fields: int64 [2, F]: first row and number of rows of each field in the table.
        peak: int32 [1], the bits of the largest magnitude in the embedded columns of d_input.
    """
    rows, count = ids.shape
    size, embed = shape[0] * shape[1], shape[1]
    width = min(padded(embed), WIDEST)
    sums = torch.zeros(size, dtype=torch.int64, device=ids.device)
    gradient = torch.empty(tuple(shape), dtype=torch.float32, device=ids.device)
    launch(
        embedding_bwd_kernel,
        (triton.cdiv(rows, ROWS), count, triton.cdiv(embed, width)),
        d_input,
        ids,
        fields,
        peak,
        sums,
        rows,
        INPUTS=d_input.shape[1],
        FIELDS=count,
        EMBED=embed,
        WIDTH=width,
        SMALL=SMALL,
        ROWS=ROWS,
        STEP=STEP,
        num_warps=4,
    )
    launch(
        embedding_finish_kernel,
        (triton.cdiv(size, BLOCK),),
        sums,
        peak,
        gradient,
        rows,
        size,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return gradient
