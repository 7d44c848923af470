"""Rows sorted by domain into tiles of one domain each, so that weights of the row's own domain need no loop.

Every shape follows from B and D alone, however the domains are spread over the rows: nothing waits for a GPU, and a
traced graph holds for every batch of that size. A tile that its domain does not fill is padded with zero rows, and a
domain without rows has no tile.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

MOST_ROWS = 128
"""Rows per tile: enough for a product at full speed with a weight that is fetched per tile."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """N tiles of R rows.

    Attributes:
        rows: R.
        domain: int64 [N], the domain of each tile.
        place: int64 [B], where each row lies among the N R places.
    """

    rows: int
    domain: Tensor
    place: Tensor

    @classmethod
    def of(cls, domain: Tensor, num_domains: int) -> Tiles:
        """The tiles of a batch, whose rows keep their order within a domain.

        Args:
            domain: int32 or int64 [B] in [0, num_domains).
            num_domains: D.
        """
        batch, device = domain.shape[0], domain.device
        # Small enough that padding, at most R - 1 rows of every domain, stays below a quarter of the batch.
        rows = max(1, min(MOST_ROWS, batch // (4 * num_domains)))
        count = (batch + min(num_domains, batch) * (rows - 1)) // rows
        domain = domain.long()
        ordered, order = torch.sort(domain, stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(num_domains + 1, device=device))
        last_tile = ((bounds.diff() + rows - 1) // rows).cumsum(0)
        first_row, first_place = bounds[:-1], torch.nn.functional.pad(last_tile[:-1], (1, 0)) * rows
        place = torch.arange(batch, device=device) + (first_place - first_row)[ordered]
        of_tile = torch.searchsorted(last_tile, torch.arange(count, device=device), right=True)
        # Tiles that no row needs come last; whose weights they use does not matter.
        return cls(rows, of_tile.clamp(max=num_domains - 1), torch.empty_like(order).scatter(0, order, place))

    def spread(self, values: Tensor) -> Tensor:
        """Values of the rows [B, V] as [N, R, V], padded with zeros."""
        places = values.new_zeros(len(self.domain) * self.rows, values.shape[1])
        return places.index_copy(0, self.place, values).unflatten(0, (len(self.domain), self.rows))

    def collect(self, tiled: Tensor) -> Tensor:
        """The inverse of `spread`: [N, R, V] to [B, V]."""
        return tiled.flatten(0, 1).index_select(0, self.place)
