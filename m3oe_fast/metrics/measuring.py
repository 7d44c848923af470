"""From rows or counts to `Scores`: which groups are ranked, and which of two reasons is told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from m3oe_fast.metrics.histogram import KEY_BITS, Histogram
from m3oe_fast.metrics.ranking import areas, measure_of, runs_of_rows
from m3oe_fast.metrics.rows import Rows
from m3oe_fast.metrics.scores import (
    NO_MIXED_USER,
    NO_ROWS,
    NO_USER,
    NOT_FINITE,
    ONLY_NEGATIVES,
    Measure,
    PairScores,
    Scores,
    TaskScores,
)
from m3oe_fast.metrics.totals import Totals
from m3oe_fast.metrics.users import UserSample, gauc


@dataclass(frozen=True)
class Found:
    """What needs the order of the rows, by pair (domain * T + task) and by task; what is missing had no rows.

    Attributes:
        auc, overall_auc: AUC.
        gauc, overall_gauc: GAUC, NaN where no user has both classes.
        approximate: as in `Scores`.
    """

    auc: Mapping[int, Measure]
    overall_auc: Mapping[int, Measure]
    gauc: Mapping[int, float]
    overall_gauc: Mapping[int, float]
    approximate: Mapping[str, str] = field(default_factory=dict)


def ranked(rows: Rows, domains: int) -> Found:
    """Rank all rows there are."""
    tasks = rows.key.shape[1]
    auc: dict[int, Measure] = {}
    overall: dict[int, Measure] = {}
    for task in range(tasks):
        key, positive, domain = rows.of_task(task)
        found = areas(runs_of_rows(domain, key, positive))
        auc |= {d * tasks + task: measure_of(found, place) for place, d in enumerate(found.group.tolist())}
        if len(found.group) > 1:
            found = areas(runs_of_rows(None, key, positive))
        if len(found.group):
            overall[task] = measure_of(found, 0)
    return Found(auc, overall, *_gauc(rows, domains))


def ranked_by_counts(counts: Histogram, sample: UserSample, domains: int) -> Found:
    """Rank what is left of more rows than can be kept."""
    by_pair, by_task = (areas(runs) for runs in (counts.runs, counts.by_task()))
    exact = counts.cleared == 0
    auc, overall = (
        {group: measure_of(found, place, exact) for place, group in enumerate(found.group.tolist())}
        for found in (by_pair, by_task)
    )
    approximate = {}
    if not exact:
        most = max(measure.within for measure in (*auc.values(), *overall.values()))
        bits = KEY_BITS - counts.cleared
        approximate["auc"] = f"scores are told apart by {bits} of their 32 bits; every AUC is within {most:.1e}"
    rows = sample.rows()
    if sample.level:
        kept, users = (0, 0) if rows is None else (len(rows), len(np.unique(rows.user)))
        approximate["gauc"] = f"of one in {2**sample.level:,} users: {users:,} users, {kept:,} rows"
    return Found(auc, overall, *_gauc(rows, domains), approximate)


def scores_of(domains: Sequence[str], tasks: Sequence[str], totals: Totals, found: Found, names_users: bool) -> Scores:
    """Put together what was measured.

    Args:
        domains, tasks: their names.
        totals: of all rows.
        found: what their order tells.
        names_users: whether the log tells whom its rows are about.
    """
    numbers = range(len(domains) * len(tasks))
    pairs = [
        PairScores(
            domain=domains[pair // len(tasks)],
            task=tasks[pair % len(tasks)],
            **_measures(totals, [pair], found.auc.get(pair), found.gauc.get(pair, math.nan), names_users),
        )
        for pair in numbers
    ]
    overall = [
        TaskScores(
            task=name,
            **_measures(
                totals,
                numbers[task :: len(tasks)],
                found.overall_auc.get(task),
                found.overall_gauc.get(task, math.nan),
                names_users,
            ),
        )
        for task, name in enumerate(tasks)
    ]
    return Scores(tuple(pairs), tuple(overall), found.approximate)


def _gauc(rows: Rows | None, domains: int) -> tuple[dict[int, float], dict[int, float]]:
    if rows is None or rows.user is None:
        return {}, {}
    by_pair, by_task = gauc(rows, domains)
    return dict(enumerate(by_pair.ravel().tolist())), dict(enumerate(by_task.tolist()))


def _measures(
    totals: Totals, pairs: Sequence[int], auc: Measure | None, gauc: float, names_users: bool
) -> dict[str, Any]:
    """The fields of `TaskScores` less the name."""
    rows, positives, broken = (int(count[pairs].sum()) for count in (totals.rows, totals.positives, totals.broken))
    reason = NOT_FINITE if broken else NO_ROWS if not rows else None
    if reason is not None or auc is None:
        none = Measure(None, reason)
        return {
            "rows": rows,
            "positives": positives,
            "auc": none,
            "logloss": none,
            "calibration": none,
            "gauc": none,
        }
    return {
        "rows": rows,
        "positives": positives,
        "auc": auc,
        "logloss": Measure(totals.logloss(pairs, rows)),
        "calibration": Measure(totals.calibration(pairs, positives)) if positives else Measure(None, ONLY_NEGATIVES),
        "gauc": _gauc_measure(auc, gauc, names_users),
    }


def _gauc_measure(auc: Measure, gauc: float, names_users: bool) -> Measure:
    if auc.value is None:
        return Measure(None, auc.reason)
    if not names_users:
        return Measure(None, NO_USER)
    return Measure(None, NO_MIXED_USER) if math.isnan(gauc) else Measure(gauc)
