"""Weight gradients in two stages: few fat partial sums over the rows of a chunk, then one sum. No atomics.

`weight_gradient` multiplies columns of the tape with columns of the tape. A job is one block of one gradient: which
columns, of which domain's rows (or all), and where in `flat` the block belongs. Every job is split over the tiles of
its rows; program (job, split) keeps its block [BM, BN] in registers and writes it once per chunk. Which rows a split
takes follows from the counts alone, so the same batch gives the same bits.

`finish` adds up the splits of every job, and the tiles' rows of `vectors`, into the gradient of `flat`.

Traffic at the published sizes in bf16: 7 KB per row from L2, and 64 KB per wide block, split and chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch
from .layout import FIRST_EXPERT, Layout
from .tile import planes, product, tiles_of

JOB_FIELDS = 11
VECTOR_FIELDS = 4
SLICE = 16  # rows of a block that one program of `finish` adds up
COLUMNS = 64  # of `vectors`, the same


class Jobs(NamedTuple):
    """Tables of what the two kernels do, for one layout on one device.

    blocks int64 [J, JOB_FIELDS]: left column / 16, right column / 16, domain or -1, place of the partial sum in a split
        / 16; first
        element of the gradient, rows of it from here on, first column, columns in all; then how columns come in groups,
        one for each expert or task: padded width, distance in the gradient, width
    vectors int64 [V, VECTOR_FIELDS]: first column, columns, domain or -1, first element of the gradient
    The first `wide` jobs have wide blocks; `partial` is what one split of all jobs takes.
    """

    blocks: Tensor
    vectors: Tensor
    wide: int
    partial: int


@triton.jit
def add_block(
    tape, partial, left, right, low, high, again, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, L: tl.constexpr
):
    """partial [BM, BN] += tape[low:high, left..]^T @ tape[low:high, right..]"""
    WIDTH: tl.constexpr = L.tape_width
    PRECISION: tl.constexpr = L.precision
    i, j, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    at = partial + i[:, None] * BN + j[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for row in range(low, high, BK):
        line = tape + (row + k).to(tl.int64)[:, None] * WIDTH
        a = planes(tl.trans(tl.load(line + left + i[None, :])), PRECISION)
        b = planes(tl.load(line + right + j[None, :]), PRECISION)
        if PRECISION == "fp32":
            acc += product(a, b, tl.zeros([BM, BN], tl.float32), PRECISION)
        else:
            acc = product(a, b, acc, PRECISION)
    # Not begun with: a chain of additions through all rows loses digits. It ends with the chunk, in fp32 with BK rows.
    tl.store(at, acc + tl.load(at, mask=(i[:, None] >= 0) & again, other=0.0))


@triton.jit(do_not_specialize=["first_tile", "chunk_tiles"])
def weight_gradient_kernel(
    tape,
    counts,
    jobs,
    partials,
    first_tile,
    chunk_tiles,
    wide_jobs,
    partial_size,
    L: tl.constexpr,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE_M: tl.constexpr,
    WIDE_N: tl.constexpr,
    NARROW_M: tl.constexpr,
    NARROW_N: tl.constexpr,
    BK: tl.constexpr,
    FIELDS: tl.constexpr,
):
    D: tl.constexpr = L.domains
    DP: tl.constexpr = L.domains_padded
    job, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    entry = jobs + job * FIELDS
    # In units of 16, so that the compiler knows that 16 bytes at a time are aligned.
    left, right, place = tl.load(entry) * 16, tl.load(entry + 1) * 16, tl.load(entry + 3) * 16
    domain = tl.load(entry + 2)
    begin, end = tiles_of(counts, domain, D, DP, M)
    begin = tl.maximum(begin, first_tile) - first_tile
    end = tl.minimum(end, first_tile + chunk_tiles) - first_tile
    each = tl.cdiv(tl.maximum(end - begin, 0), SPLITS)
    low = begin + split * each
    high = tl.maximum(tl.minimum(low + each, end), low)
    partial = partials + split.to(tl.int64) * partial_size + place
    again = first_tile > 0
    if job < wide_jobs:
        add_block(tape, partial, left, right, low * M, high * M, again, WIDE_M, WIDE_N, BK, L)
    else:
        add_block(tape, partial, left, right, low * M, high * M, again, NARROW_M, NARROW_N, BK, L)


@triton.jit
def finish_block(
    partials,
    entry,
    partial_size,
    gradient,
    slice,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SLICE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    place, first, rows = tl.load(entry + 3) * 16, tl.load(entry + 4), tl.load(entry + 5)
    start, cols = tl.load(entry + 6), tl.load(entry + 7)
    padded, group, width = tl.load(entry + 8), tl.load(entry + 9), tl.load(entry + 10)
    i, j = slice * SLICE + tl.arange(0, SLICE), tl.arange(0, BN)
    column = start + j
    acc = tl.zeros([SLICE, BN], tl.float32)
    for split in range(SPLITS):
        at = place + split * partial_size
        acc += tl.load(partials + at + i[:, None] * BN + j[None, :])
    inside = (i < rows)[:, None] & ((column < cols) & (column % padded < width))[None, :]
    across = column // padded * group + column % padded
    tl.store(gradient + first + i[:, None] * width + across[None, :], acc, mask=inside)


@triton.jit
def finish_kernel(
    partials,
    jobs,
    vector_jobs,
    vectors,
    counts,
    gradient,
    wide_jobs,
    narrow_jobs,
    partial_size,
    L: tl.constexpr,
    M: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDE_M: tl.constexpr,
    WIDE_N: tl.constexpr,
    NARROW_M: tl.constexpr,
    NARROW_N: tl.constexpr,
    FIELDS: tl.constexpr,
    VECTOR_FIELDS: tl.constexpr,
    SLICE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """gradient float32 [flat_size + D T]: of `flat`, then pair_loss."""
    D: tl.constexpr = L.domains
    DP: tl.constexpr = L.domains_padded
    VECTORS: tl.constexpr = L.vector_width
    pid = tl.program_id(0)
    wide = wide_jobs * (WIDE_M // SLICE)
    narrow = narrow_jobs * (NARROW_M // SLICE)
    if pid < wide:
        entry = jobs + pid // (WIDE_M // SLICE) * FIELDS
        finish_block(partials, entry, partial_size, gradient, pid % (WIDE_M // SLICE), WIDE_M, WIDE_N, SLICE, SPLITS)
    elif pid < wide + narrow:
        pid -= wide
        entry = jobs + (wide_jobs + pid // (NARROW_M // SLICE)) * FIELDS
        finish_block(
            partials, entry, partial_size, gradient, pid % (NARROW_M // SLICE), NARROW_M, NARROW_N, SLICE, SPLITS
        )
    else:
        entry = vector_jobs + (pid - wide - narrow) * VECTOR_FIELDS
        column, columns = tl.load(entry), tl.load(entry + 1)
        begin, end = tiles_of(counts, tl.load(entry + 2), D, DP, M)
        i, j = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS)
        acc = tl.zeros([COLUMNS, COLUMNS], tl.float32)
        for tile in range(begin, end, COLUMNS):
            line = (tile + i).to(tl.int64)[:, None] * VECTORS
            inside = (tile + i < end)[:, None] & (j < columns)[None, :]
            acc += tl.load(vectors + line + (column + j)[None, :], mask=inside, other=0.0)
        tl.store(gradient + tl.load(entry + 3) + j, tl.sum(acc, 0), mask=j < columns)


class _Product(NamedTuple):
    """One gradient as a product of columns of the tape; `count` groups of columns, each its own matrix."""

    left: int
    rows: int
    right: int
    count: int
    padded: int
    width: int
    first: int
    group: int
    domain: int = -1


def _products(layout: Layout) -> list[_Product]:
    c, flat = layout, layout.flat
    x, star, skip, r, score, u, tower = layout.tape[:7]
    hidden, hidden_padded = c.hidden, c.hidden_padded
    width, width_padded = c.widths[-1], c.widths_padded[-1]
    products = []
    if c.representation:
        for d in range(c.domains):
            first = flat[0] + d * c.inputs * hidden
            products.append(_Product(x, c.inputs, star, 1, hidden_padded, hidden, first, 0, d))
        products.append(_Product(x, c.inputs, skip, 1, hidden_padded, hidden, flat[4], 0))
    for d in range(c.domains):
        if c.gated:
            group = hidden * c.gated
            first = flat[8] + d * c.tasks * group
            products.append(_Product(r, hidden, score, c.tasks, c.gated_padded, c.gated, first, group, d))
        for t in range(c.tasks):
            left, right = u + t * width_padded, tower + t * c.tower_padded
            first = flat[11] + (d * c.tasks + t) * width * c.tower
            products.append(_Product(left, width, right, 1, c.tower_padded, c.tower, first, 0, d))
    group = hidden * c.widths[0]
    first = flat[FIRST_EXPERT]
    products.append(_Product(r, hidden, layout.tape[8], c.experts, c.widths_padded[0], c.widths[0], first, group))
    for i in range(1, c.depth):
        rows, rows_padded, cols, cols_padded = c.widths[i - 1], c.widths_padded[i - 1], c.widths[i], c.widths_padded[i]
        for e in range(c.experts):
            left = layout.tape[7 + 2 * (i - 1)] + e * rows_padded
            right = layout.tape[7 + 2 * i + 1] + e * cols_padded
            first = flat[FIRST_EXPERT + 4 * i] + e * rows * cols
            products.append(_Product(left, rows, right, 1, cols_padded, cols, first, 0))
    return products


def _is_narrow(product: _Product) -> bool:
    cols = product.count * product.padded
    return cols <= 32 or (product.rows <= 64 and cols <= 64)


@functools.cache
def jobs(layout: Layout, device: torch.device) -> Jobs:
    """Made once: a training step that is captured into a graph finds the tables there."""
    c = tuning.gradient(layout, tuning.device(device))
    products = sorted(_products(layout), key=_is_narrow)
    blocks, wide, place = [], 0, 0
    for entry in products:
        narrow = _is_narrow(entry)
        bm, bn = c.narrow if narrow else c.wide
        cols = entry.count * entry.padded
        for row in range(0, entry.rows, bm):
            for col in range(0, cols, bn):
                job = ((entry.left + row) // 16, (entry.right + col) // 16, entry.domain, place // 16)
                job += (entry.first + row * entry.width, entry.rows - row, col, cols)
                blocks.append((*job, entry.padded, entry.group, entry.width))
                place += bm * bn
                wide += not narrow
    vectors = []
    ends = [(i, start) for i, start in enumerate(layout.flat)] + [(len(layout.flat), layout.flat_size)]
    lengths = (*layout.vector_lengths, layout.tasks)
    for i, start in ends:
        column, length = layout.vector_of[i], lengths[i]
        per_domain = i == len(layout.flat) or layout.is_per_domain(i)
        for d in range(layout.domains) if per_domain else (-1,):
            for at in range(0, length if column >= 0 else 0, COLUMNS):
                vectors.append((column + at, min(COLUMNS, length - at), d, start + max(d, 0) * length + at))
    with torch.inference_mode(False):
        tables = [torch.tensor(table, dtype=torch.int64, device=device) for table in (blocks, vectors)]
    return Jobs(*tables, wide, place)


class WeightGradients:
    """The partial sums of one backward pass: `add` a chunk after the other, then `finish`."""

    def __init__(self, layout: Layout, counts: Tensor, rows: int) -> None:
        """`rows`: of a tile, as the backward pass of the tile has them."""
        device = counts.device
        self.layout, self.counts, self.rows = layout, counts, rows
        on = tuning.device(device)
        self.tuning = tuning.gradient(layout, on)
        self.jobs = jobs(layout, device)
        total = len(self.jobs.blocks)
        self.splits = min(8, max(1, triton.cdiv(2 * on.processors, total)))
        self.partials = torch.empty(self.splits * self.jobs.partial, dtype=torch.float32, device=device)
        self._blocks = {
            "L": layout,
            "M": rows,
            "SPLITS": self.splits,
            "WIDE_M": self.tuning.wide[0],
            "WIDE_N": self.tuning.wide[1],
            "NARROW_M": self.tuning.narrow[0],
            "NARROW_N": self.tuning.narrow[1],
            "FIELDS": JOB_FIELDS,
        }

    def add(self, tape: Tensor, first_tile: int, chunk_tiles: int) -> None:
        launch(
            weight_gradient_kernel,
            (len(self.jobs.blocks) * self.splits,),
            tape,
            self.counts,
            self.jobs.blocks,
            self.partials,
            first_tile,
            chunk_tiles,
            self.jobs.wide,
            self.jobs.partial,
            BK=min(self.tuning.depth, self.rows),
            num_warps=self.tuning.warps,
            num_stages=self.tuning.stages,
            **self._blocks,
        )

    def finish(self, vectors: Tensor) -> Tensor:
        """float32 [flat_size + D T]: the gradient of `flat`, then pair_loss."""
        layout, table = self.layout, self.jobs
        size = layout.flat_size + layout.domains * layout.tasks
        gradient = torch.empty(size, dtype=torch.float32, device=self.counts.device)
        narrow = len(table.blocks) - table.wide
        slices = table.wide * (self.tuning.wide[0] // SLICE) + narrow * (self.tuning.narrow[0] // SLICE)
        launch(
            finish_kernel,
            (slices + len(table.vectors),),
            self.partials,
            table.blocks,
            table.vectors,
            vectors,
            self.counts,
            gradient,
            table.wide,
            narrow,
            table.partial,
            VECTOR_FIELDS=VECTOR_FIELDS,
            SLICE=SLICE,
            COLUMNS=COLUMNS,
            num_warps=4,
            **self._blocks,
        )
        return gradient
