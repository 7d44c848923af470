"""Measures rows that come in batches, in memory that does not grow with their number.

The first ``exact_rows`` rows are kept, and everything is exact. Beyond them their scores are counted (`histogram`) and
GAUC is measured on a sample of the users (`users`); logloss and calibration stay exact. All of it is a function of the
set of rows alone: batches, their order, and which of several merged meters saw what change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3oe_fast.metrics.histogram import Histogram
from m3oe_fast.metrics.measuring import Found, ranked, ranked_by_counts, scores_of
from m3oe_fast.metrics.ranking import keys_of
from m3oe_fast.metrics.rows import MISSING, Rows, joined
from m3oe_fast.metrics.scores import Scores
from m3oe_fast.metrics.totals import Totals
from m3oe_fast.metrics.users import UserSample

EXACT_ROWS = 8_388_608
_BLOCK = 1 << 16  # rows that are taken in at once, so that temporaries stay in the cache
_COUNTED_AT_ONCE = 1 << 20
_ROWS_PER_COUNT = 4


class Meter:
    """Collects rows, and measures them when asked.

        meter = Meter(domains, tasks)
        for batch in batches:
            meter.update(logits, batch.domain, batch.label, user)
        scores = meter.compute()

    It keeps at most ``exact_rows`` rows of 5 T + 12 bytes (a million more, once there are too many), exact_rows / 4
    counts of 24 bytes and 250 bytes per pair. While it measures it takes some 60 bytes per row kept besides; with the
    default and two tasks that was 0.8 GB together. It can be pickled, and then merged elsewhere.
    """

    def __init__(self, domains: Sequence[str], tasks: Sequence[str], *, exact_rows: int = EXACT_ROWS) -> None:
        """Of D named domains and T named tasks; beyond ``exact_rows`` rows AUC and GAUC may be approximate."""
        if exact_rows < 1:
            raise ValueError(f"exact_rows {exact_rows} must be at least 1")
        self._domains, self._tasks, self._exact_rows = tuple(domains), tuple(tasks), exact_rows
        self._totals = Totals(len(self._domains) * len(self._tasks))
        self._names_users = False
        self._kept: list[Rows] = []
        self._kept_rows = 0
        # Both from the moment on that there are too many rows to keep; then `_kept` are those not yet in them.
        self._counts: Histogram | None = None
        self._sample: UserSample | None = None

    def update(self, logits: np.ndarray, domain: np.ndarray, label: np.ndarray, user: np.ndarray | None = None) -> None:
        """Add n >= 0 rows; nothing refers to the arrays afterwards.

        Args:
            logits: float32 [n,T]; of another type they are rounded to it.
            domain: int [n] in [0, D).
            label: float32 [n,T] within 0..1; NaN = not observed, above 0.5 = positive.
            user: int64 [n], whom the row is about, -1 unknown; None: unknown for all n.

        Raises:
            ValueError: shapes, domains or labels are not as above; nothing is added then.
        """
        with np.errstate(over="ignore"):  # too large for float32 is not finite
            logits, label = np.asarray(logits, np.float32), np.asarray(label, np.float32)
        domain = np.asarray(domain)
        user = None if user is None else np.asarray(user)
        self._check(logits, domain, label, user)
        self._names_users |= user is not None
        for start in range(0, len(domain), _BLOCK):
            part = slice(start, start + _BLOCK)
            self._add(logits[part], domain[part], label[part], None if user is None else user[part])

    def merge(self, other: Meter) -> None:
        """Add all rows that ``other`` has seen; it is as before.

        Raises:
            ValueError: it is about other domains or tasks, or keeps another number of rows.
        """
        for name in ("domains", "tasks", "exact_rows"):
            own, its = (getattr(meter, f"_{name}") for meter in (self, other))
            if own != its:
                raise ValueError(f"meters of different {name} cannot be merged: {own} and {its}")
        self._totals.merge(other._totals)
        self._names_users |= other._names_users
        if other._counts is not None and other._sample is not None:
            counts, sample = self._count()
            counts.merge(other._counts)
            sample.merge(other._sample)
        for rows in tuple(other._kept):
            self._keep(rows)

    def compute(self) -> Scores:
        """Measure all rows so far; more may be added afterwards."""
        if self._counts is not None:
            counts, sample = self._count()
            found = ranked_by_counts(counts, sample, len(self._domains))
        else:
            self._kept = self._kept and [joined(self._kept)]
            found = ranked(self._kept[0], len(self._domains)) if self._kept else Found({}, {}, {}, {})
        return scores_of(self._domains, self._tasks, self._totals, found, self._names_users)

    def _check(self, logits: np.ndarray, domain: np.ndarray, label: np.ndarray, user: np.ndarray | None) -> None:
        rows, tasks, domains = len(domain), len(self._tasks), len(self._domains)
        if domain.ndim != 1 or domain.dtype.kind not in "iu":
            raise ValueError(f"domain must be whole numbers [n], got {domain.dtype} {list(domain.shape)}")
        for name, values in (("logits", logits), ("label", label)):
            if values.shape != (rows, tasks):
                raise ValueError(f"{name} must be [{rows},{tasks}], got {list(values.shape)}")
        if user is not None and (user.shape != (rows,) or user.dtype.kind not in "iu"):
            raise ValueError(f"user must be whole numbers [{rows}], got {user.dtype} {list(user.shape)}")
        if rows and not 0 <= domain.min() <= domain.max() < domains:
            raise ValueError(f"domain must be within 0..{domains - 1}, got {domain.min()}..{domain.max()}")
        if ((label < 0) | (label > 1)).any():
            raise ValueError(f"label must be within 0..1 or NaN, got {np.nanmin(label)}..{np.nanmax(label)}")

    def _add(self, logits: np.ndarray, domain: np.ndarray, label: np.ndarray, user: np.ndarray | None) -> None:
        pair = domain.astype(np.int64)[:, None] * len(self._tasks) + np.arange(len(self._tasks))
        observed = ~np.isnan(label)
        self._totals.add(logits[observed], label[observed], pair[observed])
        positive = np.where(observed & np.isfinite(logits), label > 0.5, np.int8(MISSING)).astype(np.int8)
        domain = domain.astype(np.min_scalar_type(len(self._domains)))
        self._keep(Rows(keys_of(logits), positive, domain, None if user is None else user.astype(np.int64)))

    def _keep(self, rows: Rows) -> None:
        self._kept.append(rows)
        self._kept_rows += len(rows)
        if self._kept_rows > (self._exact_rows if self._counts is None else min(self._exact_rows, _COUNTED_AT_ONCE)):
            self._count()

    def _count(self) -> tuple[Histogram, UserSample]:
        """Count the rows that are kept, and keep only those of the sample of users."""
        if self._counts is None or self._sample is None:
            self._counts = Histogram(len(self._tasks), self._exact_rows // _ROWS_PER_COUNT)
            self._sample = UserSample(self._exact_rows)
        while self._kept:
            block: list[Rows] = []
            while self._kept and sum(map(len, block)) < _COUNTED_AT_ONCE:
                block.append(self._kept.pop())
            rows = joined(block)
            for start in range(0, len(rows), _COUNTED_AT_ONCE):
                part = rows[start : start + _COUNTED_AT_ONCE]
                self._counts.add(part)
                self._sample.add(part)
        self._kept_rows = 0
        return self._counts, self._sample
