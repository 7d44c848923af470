"""The rows that go into a model together."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch


class Batch(NamedTuple):
    """B rows as torch tensors on the CPU: ``model(*batch[:3])``, ``model.loss(*batch)``.

    Attributes:
        ids: int32 [B,F]; 0 = unknown.
        dense: float32 [B,C], in [0, 1].
        domain: int64 [B], 0..D-1.
        label: float32 [B,T] of 0, 1, NaN (not observed).
    """

    ids: torch.Tensor
    dense: torch.Tensor
    domain: torch.Tensor
    label: torch.Tensor

    @classmethod
    def from_numpy(cls, ids: np.ndarray, dense: np.ndarray, domain: np.ndarray, label: np.ndarray) -> Batch:
        """Share the memory of writable arrays of the dtypes above."""
        from torch import from_numpy  # preparing data needs no torch, which alone takes 200 MB

        return cls(from_numpy(ids), from_numpy(dense), from_numpy(domain), from_numpy(label))
