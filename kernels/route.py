"""Counting sort of the rows by domain, on the device: what makes a tile of one domain out of rows in any order.

Decomposition: program (domain, part) counts what lies before its own rows by reading all domains once, then places the
rows of its part that belong to its domain. So one launch does, no program waits for another, and the order is stable
and the same every time. Traffic: D x PARTS passes over the domains [B], from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launch import launch

BLOCK = 1024


@triton.jit
def route_kernel(
    domain,
    label,
    order,
    counts,
    labelled,
    flags,
    peak,
    B,
    D: tl.constexpr,
    T: tl.constexpr,
    PARTS: tl.constexpr,
    LABELLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """order [B]: row numbers by domain; counts [D]; labelled [PARTS, D, T]: rows of each part with a label.

    A domain out of range counts as the nearest one and leaves 1 + row in flags[1]. Zeroes `peak`.
    """
    d, part = tl.program_id(0), tl.program_id(1)
    per_part = tl.cdiv(tl.cdiv(B, PARTS), BLOCK) * BLOCK
    low = part * per_part
    high = tl.minimum(low + per_part, B)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for start in range(0, B, BLOCK):
        row = start + lane
        of = tl.load(domain + row, mask=row < B, other=0).to(tl.int64)
        of = tl.where(row < B, tl.maximum(tl.minimum(of, D - 1), 0), D)
        before += ((of < d) | ((of == d) & (row < low))).to(tl.int32)
        own += (of == d).to(tl.int32)
    if part == 0:
        tl.store(counts + d, tl.sum(own, 0))
        if d == 0:
            tl.store(peak, 0)
    at = tl.sum(before, 0)
    observed = ()
    for _ in tl.static_range(T):
        observed = observed + (tl.zeros([BLOCK], tl.int32),)
    for start in range(low, high, BLOCK):
        row = start + lane
        given = tl.load(domain + row, mask=row < high, other=0).to(tl.int64)
        wrong = (given < 0) | (given >= D)
        if tl.max(wrong.to(tl.int32), 0) > 0:
            tl.atomic_max(flags + 1, tl.max(tl.where(wrong, row + 1, 0), 0).to(tl.int64))
        mine = (row < high) & (tl.maximum(tl.minimum(given, D - 1), 0) == d)
        rank = tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(order + at + rank, row, mask=mine)
        at += tl.sum(mine.to(tl.int32), 0)
        if LABELLED:
            seen = ()
            for t in tl.static_range(T):
                y = tl.load(label + row.to(tl.int64) * T + t, mask=mine, other=float("nan"))
                seen = seen + (observed[t] + (y == y).to(tl.int32),)
            observed = seen
    if LABELLED:
        for t in tl.static_range(T):
            tl.store(labelled + (part * D + d) * T + t, tl.sum(observed[t], 0))


class Routed:
    """Rows by domain: `order` int32 [B], `counts` int32 [D], `labelled` int32 [parts, D, T] (without labels [0])."""

    def __init__(self, domain: Tensor, domains: int, tasks: int, flags: Tensor, label: Tensor | None = None) -> None:
        rows, device = domain.shape[0], domain.device
        blocks = triton.cdiv(rows, BLOCK)
        self.parts = max(1, min(blocks, tuning.device(device).processors // domains))

        def integers(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        self.order, self.counts, self.peak = integers(rows), integers(domains), integers(1)
        self.labelled = integers(*((0,) if label is None else (self.parts, domains, tasks)))
        launch(
            route_kernel,
            (domains, self.parts),
            domain.contiguous(),
            self.labelled if label is None else label,
            self.order,
            self.counts,
            self.labelled,
            flags,
            self.peak,
            rows,
            D=domains,
            T=tasks,
            PARTS=self.parts,
            LABELLED=label is not None,
            BLOCK=BLOCK,
            num_warps=4,
        )
