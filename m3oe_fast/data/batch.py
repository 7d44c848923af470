"""The rows that go into a model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


class Bag(NamedTuple):
    """One multi-hot field of B rows: row b holds ``values[offsets[b] : offsets[b + 1]]``, possibly nothing.

    Attributes:
        values: int64 [n], ids of the field, 0 = unknown.
        offsets: int64 [B+1], from 0 to n, never decreasing.
    """

    values: torch.Tensor
    offsets: torch.Tensor

    def rows(self, start: int, stop: int) -> Bag:
        """Rows ``start`` to ``stop`` - 1, as many of them as there are; values share their memory."""
        start, stop, _ = slice(start, stop).indices(len(self.offsets) - 1)
        offsets = self.offsets[start : max(start, stop) + 1]
        return Bag(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


class Batch(NamedTuple):
    """B rows as torch tensors: ``model(*batch.inputs)``, ``model.loss(*batch)``.

    Attributes:
        ids: int32 [B,F]; 0 = unknown.
        dense: float32 [B,C], in [0, 1].
        domain: int64 [B], 0..D-1.
        label: float32 [B,T] of 0, 1, NaN (not observed).
        row_weight: float32 [B], what each row's loss is multiplied with; None where the log has no such column.
        bags: the multi-hot fields, in the order of ``Schema.bags``.
    """

    ids: torch.Tensor
    dense: torch.Tensor
    domain: torch.Tensor
    label: torch.Tensor
    row_weight: torch.Tensor | None = None
    bags: tuple[Bag, ...] = ()

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Bag, ...]]:
        """What a model predicts from: ids, dense, domain, bags."""
        return self.ids, self.dense, self.domain, self.bags

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The batch with ``change`` applied to each of its tensors."""
        bags = tuple(Bag(change(bag.values), change(bag.offsets)) for bag in self.bags)
        weight = None if self.row_weight is None else change(self.row_weight)
        return Batch(*(change(tensor) for tensor in self[:4]), weight, bags)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` - 1, as many of them as there are; shares memory, but for the bags' offsets."""
        weight = None if self.row_weight is None else self.row_weight[start:stop]
        bags = tuple(bag.rows(start, stop) for bag in self.bags)
        return Batch(*(tensor[start:stop] for tensor in self[:4]), weight, bags)

    @classmethod
    def from_numpy(
        cls,
        ids: np.ndarray,
        dense: np.ndarray,
        domain: np.ndarray,
        label: np.ndarray,
        row_weight: np.ndarray | None = None,
        bags: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> Batch:
        """Share the memory of writable arrays of the dtypes above; each bag is (values, offsets)."""
        from torch import from_numpy  # preparing data needs no torch, which alone takes 200 MB

        weight = None if row_weight is None else from_numpy(row_weight)
        pairs = tuple(Bag(from_numpy(values), from_numpy(offsets)) for values, offsets in bags)
        return cls(*map(from_numpy, (ids, dense, domain, label)), weight, pairs)
