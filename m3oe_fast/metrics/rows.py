"""Rows as they are kept until their order is needed: 5 bytes per task, and domain and user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN_USER = -1
MISSING = -1
"""The class of a row whose label is not observed, or whose score is not finite."""


@dataclass(frozen=True)
class Rows:
    """Some scored rows.

    Attributes:
        key: uint32 [n,T], the scores as from `ranking.keys_of`.
        positive: int8 [n,T]: 1, 0 or MISSING.
        domain: uint [n].
        user: int64 [n], UNKNOWN_USER for nobody; None where the log tells of nobody.
    """

    key: np.ndarray
    positive: np.ndarray
    domain: np.ndarray
    user: np.ndarray | None

    def __len__(self) -> int:
        return len(self.domain)

    def __getitem__(self, which: slice | np.ndarray) -> Rows:
        user = None if self.user is None else self.user[which]
        return Rows(self.key[which], self.positive[which], self.domain[which], user)

    def of_task(self, task: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Key, class (bool) and domain of the rows that have a class for ``task``."""
        seen = self.positive[:, task] != MISSING
        return self.key[seen, task], self.positive[seen, task] == 1, self.domain[seen]


def joined(parts: Sequence[Rows]) -> Rows:
    """At least one part's rows, one after the other."""
    if len(parts) == 1:
        return parts[0]
    user = None
    if any(part.user is not None for part in parts):
        user = np.concatenate(
            [np.full(len(part), UNKNOWN_USER, np.int64) if part.user is None else part.user for part in parts]
        )
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in ("key", "positive", "domain"))
    return Rows(*columns, user)
