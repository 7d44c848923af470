"""The star layer folded into one matrix per domain, M_d = (W_d * W_sh) W_c, and its gradients; IEEE float32 throughout.

Decomposition: forward one program per [BLOCK, BLOCK] block of [D, I, H]; backward two kernels, one program per block of
[I, S] that goes over the domains (gradients of W_d and, summed in a fixed order, of W_sh), and one per block of [S, H]
that goes over domains and inputs (gradient of W_c). D I S H multiply-adds each. Traffic: blocks of W from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 32


@triton.jit
def span(first, SIZE, BLOCK: tl.constexpr):
    """Indices of a block and which of them exist."""
    i = first + tl.arange(0, BLOCK)
    return i, i < SIZE


@triton.jit
def block_of(matrix, row, rows, col, cols, STRIDE):
    """[len(row), len(col)] of a row-major matrix, zeros outside."""
    at = row.to(tl.int64)[:, None] * STRIDE + col[None, :]
    return tl.load(matrix + at, mask=rows[:, None] & cols[None, :], other=0.0)


@triton.jit
def star_fold_kernel(star, shared, out, folded, INPUTS, S, H, BLOCK: tl.constexpr):
    d = tl.program_id(0).to(tl.int64)
    i, has_i = span(tl.program_id(1) * BLOCK, INPUTS, BLOCK)
    h, has_h = span(tl.program_id(2) * BLOCK, H, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, S, BLOCK):
        s, has_s = span(first, S, BLOCK)
        w = block_of(star + d * INPUTS * S, i, has_i, s, has_s, S) * block_of(shared, i, has_i, s, has_s, S)
        acc = tl.dot(w, block_of(out, s, has_s, h, has_h, H), acc, input_precision="ieee")
    at = (d * INPUTS + i)[:, None] * H + h[None, :]
    tl.store(folded + at, acc, mask=has_i[:, None] & has_h[None, :])


@triton.jit
def star_fold_bwd_weight_kernel(grad, star, shared, out, d_star, d_shared, INPUTS, S, H, D, BLOCK: tl.constexpr):
    i, has_i = span(tl.program_id(0) * BLOCK, INPUTS, BLOCK)
    s, has_s = span(tl.program_id(1) * BLOCK, S, BLOCK)
    inside = has_i[:, None] & has_s[None, :]
    at = i.to(tl.int64)[:, None] * S + s[None, :]
    w_shared = tl.load(shared + at, mask=inside, other=0.0)
    sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(D):
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in range(0, H, BLOCK):
            h, has_h = span(first, H, BLOCK)
            g = block_of(grad, i, has_i, h, has_h, H)
            acc = tl.dot(g, tl.trans(block_of(out, s, has_s, h, has_h, H)), acc, input_precision="ieee")
        sum += acc * tl.load(star + at, mask=inside, other=0.0)
        tl.store(d_star + at, acc * w_shared, mask=inside)
        grad += INPUTS * H
        star += INPUTS * S
        d_star += INPUTS * S
    tl.store(d_shared + at, sum, mask=inside)


@triton.jit
def star_fold_bwd_out_kernel(grad, star, shared, d_out, INPUTS, S, H, D, BLOCK: tl.constexpr):
    s, has_s = span(tl.program_id(0) * BLOCK, S, BLOCK)
    h, has_h = span(tl.program_id(1) * BLOCK, H, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for _ in range(D):
        for first in range(0, INPUTS, BLOCK):
            i, has_i = span(first, INPUTS, BLOCK)
            w = block_of(star, i, has_i, s, has_s, S) * block_of(shared, i, has_i, s, has_s, S)
            acc = tl.dot(tl.trans(w), block_of(grad, i, has_i, h, has_h, H), acc, input_precision="ieee")
        star += INPUTS * S
        grad += INPUTS * H
    tl.store(d_out + s.to(tl.int64)[:, None] * H + h[None, :], acc, mask=has_s[:, None] & has_h[None, :])


def _sizes(star: Tensor, shared: Tensor, out: Tensor) -> tuple[int, int, int, int]:
    """D, I, S, H."""
    if star.ndim != 3 or shared.shape != star.shape[1:] or out.ndim != 2 or out.shape[0] != star.shape[2]:
        shapes = [list(tensor.shape) for tensor in (star, shared, out)]
        raise ValueError(f"star_fold takes [D, I, S], [I, S] and [S, H], got {shapes}")
    if {star.dtype, shared.dtype, out.dtype} != {torch.float32}:
        raise TypeError("star_fold of backend triton takes float32 tensors")
    return (*star.shape, out.shape[1])


def star_fold(star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> Tensor:
    """[D, I, H] from [D, I, S], [I, S] and [S, H]."""
    d, i, s, h = _sizes(star_weight, shared_weight, out_weight)
    star, shared, out = (tensor.contiguous() for tensor in (star_weight, shared_weight, out_weight))
    folded = torch.empty((d, i, h), dtype=torch.float32, device=star.device)
    grid = (d, triton.cdiv(i, BLOCK), triton.cdiv(h, BLOCK))
    launch(star_fold_kernel, grid, star, shared, out, folded, i, s, h, BLOCK=BLOCK, num_warps=4)
    return folded


def star_fold_bwd(grad: Tensor, star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> list[Tensor]:
    """Gradients of the three weights for that of the result [D, I, H]."""
    d, i, s, h = _sizes(star_weight, shared_weight, out_weight)
    if tuple(grad.shape) != (d, i, h) or grad.dtype != torch.float32:
        raise ValueError(f"grad must be float32 {[d, i, h]}, got {grad.dtype} {list(grad.shape)}")
    grad, star, shared, out = (t.contiguous() for t in (grad, star_weight, shared_weight, out_weight))
    results = [torch.empty_like(tensor) for tensor in (star, shared, out)]
    blocks = [triton.cdiv(size, BLOCK) for size in (i, s, h)]
    launch(
        star_fold_bwd_weight_kernel,
        (blocks[0], blocks[1]),
        *(grad, star, shared, out, results[0], results[1], i, s, h, d),
        BLOCK=BLOCK,
        num_warps=4,
    )
    launch(
        star_fold_bwd_out_kernel,
        (blocks[1], blocks[2]),
        *(grad, star, shared, results[2], i, s, h, d),
        BLOCK=BLOCK,
        num_warps=4,
    )
    return results
