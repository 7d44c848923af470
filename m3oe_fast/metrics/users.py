"""GAUC: the AUC of every user by himself, averaged; and the sample of users once there are too many rows to keep."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from m3oe_fast.data.hashing import mixed
from m3oe_fast.metrics.ranking import MOST_GROUPS, Areas, areas, runs_of_rows
from m3oe_fast.metrics.rows import MISSING, UNKNOWN_USER, Rows, joined

_SEED = 0x6A0C
_AT_ONCE = 1 << 20  # rows ranked at once: bounds the memory that it takes
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
    of_pairs, of_tasks = np.zeros((2, domains, tasks)), np.zeros((2, 1, tasks))
    for some in _by_users(rows):
        users, user = np.unique(some.user, return_inverse=True)
        for task in range(tasks):
            seen = some.positive[:, task] != MISSING
            key, positive, own = some.key[seen, task], some.positive[seen, task] == 1, user[seen]
            alone = areas(runs_of_rows(own, key, positive))
            of_tasks[:, :, task] += _weighted(alone, np.zeros(len(alone.group), np.int64), 1)
            of_pairs[:, :, task] += _of_domains(some.domain[seen], own, len(users), key, positive, domains)
    with np.errstate(invalid="ignore"):
        return of_pairs[0] / of_pairs[1], of_tasks[0, 0] / of_tasks[1, 0]


def _by_users(rows: Rows) -> Iterator[Rows]:
    """The rows with a user, as few users at a time as make about `_AT_ONCE` rows; depends on the set of rows alone."""
    known = rows.user != UNKNOWN_USER
    parts = -(-int(known.sum()) // _AT_ONCE)
    if parts == 1:
        yield rows if known.all() else rows[known]
        return
    drawn = (mixed(rows.user, _SEED) % np.uint64(max(parts, 1))).astype(np.int32)
    for part in range(parts):
        yield rows[known & (drawn == part)]


def _of_domains(
    domain: np.ndarray, user: np.ndarray, users: int, key: np.ndarray, positive: np.ndarray, domains: int
) -> np.ndarray:
    """As `_weighted`, over domains and with a user's rows in each domain by themselves."""
    group = domain.astype(np.int64) * users + user
    numbers = None
    if domains * users > MOST_GROUPS:
        numbers, group = np.unique(group, return_inverse=True)
    found = areas(runs_of_rows(group, key, positive))
    group = found.group if numbers is None else numbers[found.group]
    return _weighted(found, group // max(users, 1), domains)


def _weighted(found: Areas, parent: np.ndarray, parents: int) -> np.ndarray:
    """float64 [2,parents]: sums of weight * AUC, and of the weights, over the groups of each parent.

    The groups are ascending, so the sums are always in the same order.
    """
    both = (found.positives > 0) & (found.negatives > 0)
    negatives, positives = found.negatives[both], found.positives[both]
    area = found.twice_ordered[both] / (2.0 * negatives * positives)
    weight, parent = negatives + positives, parent[both]
    return np.stack([np.bincount(parent, weights=w, minlength=parents) for w in (weight * area, weight)])


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
