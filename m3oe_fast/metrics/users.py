"""GAUC: the AUC of every user by himself, averaged; and the sample of users once there are too many rows to keep."""

from __future__ import annotations

import numpy as np

from m3oe_fast.data.hashing import mixed
from m3oe_fast.metrics.ranking import MOST_GROUPS, Areas, areas, runs_of_rows
from m3oe_fast.metrics.rows import MISSING, UNKNOWN_USER, Rows, joined

_SEED = 0x6A0C
_HASH_BITS = 64


def gauc(rows: Rows, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the users' AUC weighted by their labelled rows, NaN where no user has both classes.

    Args:
        rows: with users.
        domains: D.

    Returns:
        float64 [D,T] of each pair, where a user's rows are those of the pair, and float64 [T] of each task.
    """
    tasks = rows.key.shape[1]
    by_pair, by_task = np.full((domains, tasks), np.nan), np.full(tasks, np.nan)
    users, user = np.unique(rows.user, return_inverse=True)
    known = rows.user != UNKNOWN_USER
    for task in range(tasks):
        seen = known & (rows.positive[:, task] != MISSING)
        key, positive, own = rows.key[seen, task], rows.positive[seen, task] == 1, user[seen]
        found = areas(runs_of_rows(own, key, positive))
        by_task[task] = _weighted(found, np.zeros(len(found.group), np.int64), 1)[0]
        if domains == 1:
            by_pair[:, task] = by_task[task]
        else:
            by_pair[:, task] = _by_domain(rows.domain[seen], own, len(users), key, positive, domains)
    return by_pair, by_task


def _by_domain(
    domain: np.ndarray, user: np.ndarray, users: int, key: np.ndarray, positive: np.ndarray, domains: int
) -> np.ndarray:
    group = domain.astype(np.int64) * users + user
    numbers = None
    if domains * users > MOST_GROUPS:
        numbers, group = np.unique(group, return_inverse=True)
    found = areas(runs_of_rows(group, key, positive))
    group = found.group if numbers is None else numbers[found.group]
    return _weighted(found, group // max(users, 1), domains)


def _weighted(found: Areas, parent: np.ndarray, parents: int) -> np.ndarray:
    """float64 [parents]: means over the groups of each; the groups are ascending, so their order is always the same."""
    mixed_users = (found.positives > 0) & (found.negatives > 0)
    negatives, positives = found.negatives[mixed_users], found.positives[mixed_users]
    area = found.twice_ordered[mixed_users] / (2.0 * negatives * positives)
    weight, parent = negatives + positives, parent[mixed_users]
    total = np.bincount(parent, weights=weight, minlength=parents)
    with np.errstate(invalid="ignore"):
        return np.bincount(parent, weights=weight * area, minlength=parents) / total


class UserSample:
    """All rows of some users: those whose hash begins with ``level`` zeros, the fewest zeros for which they fit.

    Who is in it depends on all rows together, not on their order.

    Attributes:
        level: one in 2**level users is in the sample; 0: everybody.
    """

    def __init__(self, most: int) -> None:
        """Keep at most ``most`` rows."""
        self._most = most
        self._parts: list[Rows] = []
        self.level = 0

    def add(self, rows: Rows) -> None:
        """Add the rows that have a label and a user; the others tell nothing about users."""
        if rows.user is None:
            return
        useful = (rows.user != UNKNOWN_USER) & (rows.positive != MISSING).any(axis=1)
        self._parts.append(self._of_sample(rows[useful]))
        while sum(map(len, self._parts)) > self._most and self.level < _HASH_BITS:
            self.level += 1
            self._parts = [self._of_sample(part) for part in self._parts]

    def merge(self, other: UserSample) -> None:
        """Add the rows of ``other``."""
        self.level = max(self.level, other.level)
        self._parts = [self._of_sample(part) for part in self._parts]
        for part in other._parts:
            self.add(part)

    def rows(self) -> Rows | None:
        """The rows kept, None before the first user."""
        self._parts = self._parts and [joined(self._parts)]
        return self._parts[0] if self._parts else None

    def _of_sample(self, rows: Rows) -> Rows:
        if not self.level:
            return rows
        return rows[mixed(rows.user, _SEED) >> np.uint64(_HASH_BITS - self.level) == 0]
