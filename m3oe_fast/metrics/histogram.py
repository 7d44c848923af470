"""Counts of rows by pair and score, in bounded memory: exact at first, then ever coarser scores.

Only scores that occur take memory, so the resolution depends on how many different ones there are and not on the number
of pairs or on the range of the scores. It is the finest that fits all rows, whatever order they came in.
"""

from __future__ import annotations

import numpy as np

from m3oe_fast.metrics.ranking import Runs, coarsened, combined, runs_of_rows
from m3oe_fast.metrics.rows import Rows

KEY_BITS = 32


class Histogram:
    """Counts for P = D*T pairs, numbered domain * T + task.

    Attributes:
        runs: the groups are the pairs.
        cleared: so many of the lowest of a score's 32 bits are not told apart; 0: the counts are exact.
    """

    def __init__(self, tasks: int, most: int) -> None:
        """Of ``tasks`` tasks; ``most`` counts of 24 bytes are kept (but one per pair in any case)."""
        nothing = np.zeros(0, np.int64)
        self._tasks, self._most = tasks, most
        self.runs = Runs(nothing.astype(np.uint64), nothing, nothing)
        self.cleared = 0

    def add(self, rows: Rows) -> None:
        """Count ``rows``."""
        for task in range(self._tasks):
            key, positive, domain = rows.of_task(task)
            pair = domain.astype(np.uint64) * np.uint64(self._tasks) + np.uint64(task)
            self._add(runs_of_rows(pair, key, positive))

    def merge(self, other: Histogram) -> None:
        """Add the counts of ``other``."""
        self._coarsen(other.cleared)
        self._add(other.runs)

    def by_task(self) -> Runs:
        """The counts with all domains pooled; the groups are the tasks."""
        pair, key = self.runs.code >> np.uint64(KEY_BITS), self.runs.code & np.uint64(0xFFFFFFFF)
        code = (pair % np.uint64(self._tasks)) << np.uint64(KEY_BITS) | key
        return combined(code, self.runs.negatives, self.runs.positives)

    def _add(self, new: Runs) -> None:
        old, new = self.runs, coarsened(new, self.cleared)
        pieces = ((getattr(old, name), getattr(new, name)) for name in ("code", "negatives", "positives"))
        self.runs = combined(*(np.concatenate(piece) for piece in pieces))
        while len(self.runs) > self._most and self.cleared < KEY_BITS:
            self._coarsen(self.cleared + 1)

    def _coarsen(self, bits: int) -> None:
        if bits > self.cleared:
            self.runs, self.cleared = coarsened(self.runs, bits), bits
