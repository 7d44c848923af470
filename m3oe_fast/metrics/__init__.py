"""AUC, logloss, calibration and GAUC per (domain, task) pair and per task over all domains.

Poor data never raises and never poisons: a value that is undefined (no labelled rows, one class only, scores that
are not finite, no user) is None with the reason, and the mean is taken over the pairs that have one.

    scores.py      what is returned
    meter.py       Meter: rows in batches in, scores out, in bounded memory
    rows.py        rows as they are kept
    ranking.py     AUC of any number of groups, from one sort
    histogram.py   counts per score, once there are too many rows to keep
    users.py       GAUC, and the sample of users for it
    totals.py      counts, logloss and calibration
    exact_sum.py   sums without rounding, so that the order of the rows is irrelevant
    seesaw.py      gain and loss against a baseline
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3oe_fast.metrics.meter import EXACT_ROWS, Meter
from m3oe_fast.metrics.ranking import auc
from m3oe_fast.metrics.scores import (
    METRICS,
    NO_MIXED_USER,
    NO_ROWS,
    NO_USER,
    NOT_FINITE,
    ONLY_NEGATIVES,
    ONLY_POSITIVES,
    Measure,
    PairScores,
    Scores,
    TaskScores,
)
from m3oe_fast.metrics.seesaw import seesaw

__all__ = [
    "EXACT_ROWS",
    "METRICS",
    "NOT_FINITE",
    "NO_MIXED_USER",
    "NO_ROWS",
    "NO_USER",
    "ONLY_NEGATIVES",
    "ONLY_POSITIVES",
    "Measure",
    "Meter",
    "PairScores",
    "Scores",
    "TaskScores",
    "auc",
    "evaluate",
    "seesaw",
]


def evaluate(
    logits: np.ndarray,
    domain: np.ndarray,
    label: np.ndarray,
    domains: Sequence[str],
    tasks: Sequence[str],
    user: np.ndarray | None = None,
) -> Scores:
    """Measure every (domain, task) pair of rows that are all at hand; `Meter` takes them in batches.

    Args:
        logits: float32 [N,T]; of another type they are rounded to it.
        domain: int [N] in [0, D).
        label: float [N,T] within 0..1; NaN = not observed, above 0.5 = positive.
        domains: D names.
        tasks: T names.
        user: int64 [N], whom the row is about, -1 unknown; None: no GAUC.

    Raises:
        ValueError: shapes, domains or labels are not as above.
    """
    meter = Meter(domains, tasks, exact_rows=max(len(domain), EXACT_ROWS))
    meter.update(logits, domain, label, user)
    return meter.compute()
