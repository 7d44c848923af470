"""Batches on the device. Many, so that no call finds its rows in the L2 cache; all with the same number of rows per
domain, which compiled opponents hold as constants.

The four tensors of a batch share one buffer, so that a CUDA graph, which reads from a fixed place, is fed by one copy.
Every batch is kept twice: as drawn, and sorted by domain. The opponents that need sorted rows get the sort for free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import workload
from bench.sorting import by_domain
from bench.workload import Batch, Workload
from m3oe_fast import M3oEConfig

MIXES = {"uniform": (1, 1, 1), "skewed": (80, 15, 5)}
ALIGNMENT = 256
MOST_BATCHES = 512


@dataclass(frozen=True)
class Packed:
    """A batch whose tensors are views of one buffer uint8."""

    buffer: Tensor
    batch: Batch

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Packed:
        """The same values in one buffer on the device."""
        ends = [0]
        for tensor in batch:
            ends.append(ends[-1] + -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT)
        buffer = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
        views = []
        for start, tensor in zip(ends, batch, strict=False):
            size = tensor.numel() * tensor.element_size()
            view = buffer[start : start + size].view(tensor.dtype).view(tensor.shape)
            views.append(view.copy_(tensor))
        return cls(buffer, Batch(*views))

    def clone(self) -> Packed:
        """A copy of its own, for a graph to read from."""
        return Packed.of(self.batch, self.buffer.device)


@dataclass(frozen=True)
class Supply:
    """What one batch size is measured with.

    Attributes:
        drawn, ordered: the gate's batch, as drawn and sorted by domain; both carry the weights all contenders copy.
        order: the rows of `ordered` in those of `drawn`, int64 [B].
        counts: rows per domain, of every batch.
        feeds, ordered_feeds: what is timed; the gate's batch is the first.
    """

    drawn: Workload
    ordered: Workload
    order: Tensor
    counts: list[int]
    feeds: list[Packed]
    ordered_feeds: list[Packed]


def make_supply(
    config: M3oEConfig, rows: int, device: torch.device, shares: Sequence[int], seed: int, cache_bytes: int
) -> Supply:
    """Random batches that together are twice as large as the cache, at least four."""
    model = workload.make_model(config, "reference", seed).to(device)
    first = Batch(*(tensor.to(device) for tensor in workload.make_batch(config, rows, seed, shares)))
    drawn = workload.with_batch(model, workload.avoid_kinks(model, first))
    order, counts = by_domain(drawn.batch.domain, config.num_domains)
    count = min(MOST_BATCHES, max(4, math.ceil(2 * cache_bytes / _bytes(drawn.batch))))
    batches = [drawn.batch, *_more(drawn.batch, config, count - 1, seed + 1)]
    sorted_batches = [_sorted(batch, config.num_domains) for batch in batches]
    return Supply(
        drawn,
        drawn._replace(batch=sorted_batches[0], x=drawn.x[order]),
        order,
        counts,
        [Packed.of(batch, device) for batch in batches],
        [Packed.of(batch, device) for batch in sorted_batches],
    )


def _more(batch: Batch, config: M3oEConfig, count: int, seed: int) -> list[Batch]:
    """Other ids, dense values and labels; the same domains in another order."""
    rows = len(batch.domain)
    drawn = workload.make_batch(config, rows * count, seed)
    parts = zip(*(tensor.split(rows) for tensor in drawn), strict=True)
    g = torch.Generator().manual_seed(seed)
    domain = batch.domain.cpu()
    return [Batch(*part)._replace(domain=domain[torch.randperm(rows, generator=g)]) for part in parts]


def _sorted(batch: Batch, num_domains: int) -> Batch:
    order = by_domain(batch.domain, num_domains)[0]
    return Batch(*(tensor[order] for tensor in batch))


def _bytes(batch: Batch) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in batch)
