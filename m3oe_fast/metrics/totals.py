"""What needs no order of the rows: counts, logloss and calibration, as running sums per pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3oe_fast.metrics.exact_sum import ExactSum


class Totals:
    """Of P pairs.

    Attributes:
        rows, positives: int64 [P], labelled rows and those with a label above 0.5.
        broken: int64 [P], labelled rows whose score is not finite; they are in no sum.
    """

    def __init__(self, pairs: int) -> None:
        self.rows, self.positives, self.broken = (np.zeros(pairs, np.int64) for _ in range(3))
        self._loss, self._probability = ExactSum(pairs), ExactSum(pairs)

    def add(self, logit: np.ndarray, label: np.ndarray, pair: np.ndarray) -> None:
        """Add n labelled rows.

        Args:
            logit: float32 [n].
            label: float32 [n] within 0..1.
            pair: int64 [n].
        """
        pairs = len(self.rows)
        self.rows += np.bincount(pair, minlength=pairs)
        self.positives += np.bincount(pair[label > 0.5], minlength=pairs)
        finite = np.isfinite(logit)
        if not finite.all():
            self.broken += np.bincount(pair[~finite], minlength=pairs)
            logit, label, pair = logit[finite], label[finite], pair[finite]
        x = logit.astype(np.float64)
        small = np.exp(-np.abs(x))  # never overflows
        self._loss.add(np.maximum(x, 0.0) - x * label + np.log1p(small), pair)
        self._probability.add(np.where(x < 0, small, 1.0) / (1.0 + small), pair)

    def merge(self, other: Totals) -> None:
        """Add what ``other`` has seen."""
        for name in ("rows", "positives", "broken"):
            getattr(self, name).__iadd__(getattr(other, name))
        self._loss.merge(other._loss)
        self._probability.merge(other._probability)

    def logloss(self, pairs: Sequence[int], rows: int) -> float:
        """Mean cross-entropy in nats over the ``rows`` > 0 rows of some pairs, correctly rounded."""
        total, unit = self._loss.totals(pairs)
        return total / (rows * unit)

    def calibration(self, pairs: Sequence[int], positives: int) -> float:
        """Sum of the probabilities of some pairs by their ``positives`` > 0, correctly rounded."""
        total, unit = self._probability.totals(pairs)
        return total / (positives * unit)
