"""What was measured: values, or the reasons why there are none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

NO_ROWS = "no labelled rows"
ONLY_POSITIVES = "only positives"
ONLY_NEGATIVES = "only negatives"
NOT_FINITE = "scores are not finite"
NO_USER = "no user column"
NO_MIXED_USER = "no user has both classes"

METRICS = ("auc", "logloss", "calibration", "gauc")
"""The names of the metrics, as fields of `TaskScores` and keys of metrics.json."""

_Part = TypeVar("_Part", bound="TaskScores")


@dataclass(frozen=True)
class Measure:
    """A metric's value, or None and the reason why it has none.

    Attributes:
        value, reason: one of both.
        within: the exact value is at most this far from ``value``; 0 unless `Scores.approximate` says otherwise.
    """

    value: float | None
    reason: str | None = None
    within: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """What was measured on the labelled rows of one task, domains pooled.

    Attributes:
        task: its name.
        rows, positives: labelled rows, and those whose label is above 0.5.
        auc: share of (positive, negative) pairs of rows in order; a tie is half.
        logloss: mean binary cross-entropy in nats.
        calibration: mean predicted probability by observed positive rate; above 1 the model promises too much.
        gauc: mean over the users of their own AUC, weighted by their labelled rows; users with one class are left out.
    """

    task: str
    rows: int
    positives: int
    auc: Measure
    logloss: Measure
    calibration: Measure
    gauc: Measure

    @property
    def name(self) -> str:
        """The key in metrics.json."""
        return self.task

    def undefined(self) -> list[str]:
        """A line per reason and the metrics it leaves without a value."""
        missing: dict[str, list[str]] = {}
        for title, measure in (("AUC", self.auc), ("logloss", self.logloss)):
            if measure.value is None:
                missing.setdefault(measure.reason or "", []).append(title)
        # Calibration lacks a value only where the AUC does. Whether a log names users is no matter of a pair.
        if self.auc.value is not None and self.gauc.reason == NO_MIXED_USER:
            missing[NO_MIXED_USER] = ["GAUC"]
        return [
            f"{' and '.join(titles)} of {self.name}: {reason} ({self.rows:,} labelled rows)"
            for reason, titles in missing.items()
        ]


@dataclass(frozen=True, kw_only=True)
class PairScores(TaskScores):
    """The same of one (domain, task) pair."""

    domain: str

    @property
    def name(self) -> str:
        """The pair's key in metrics.json, "<domain>/<task>"."""
        return f"{self.domain}/{self.task}"


@dataclass(frozen=True)
class Scores:
    """Every pair of one scored part, domain by domain, in the order given to `Meter`.

    Attributes:
        pairs: D*T of them.
        overall: T of them, rows of all domains pooled.
        approximate: for each metric that is not exact, why and how close it is.
    """

    pairs: tuple[PairScores, ...]
    overall: tuple[TaskScores, ...]
    approximate: Mapping[str, str] = field(default_factory=dict)

    @property
    def mean_auc(self) -> float | None:
        """Unweighted mean over the pairs whose AUC is defined, None if there is none."""
        return self.mean("auc")

    @property
    def finite(self) -> bool:
        """Whether every row that was measured has a finite score."""
        return all(pair.logloss.reason != NOT_FINITE for pair in self.pairs)

    def mean(self, metric: str) -> float | None:
        """Unweighted mean of one of `METRICS` over the pairs where it is defined, None if there is none."""
        return _mean([getattr(pair, metric) for pair in self.pairs])

    def withheld(self, reason: str) -> Scores:
        """The same rows, with ``reason`` in the place of every value."""
        pairs, overall = (tuple(_withheld(part, reason) for part in parts) for parts in (self.pairs, self.overall))
        return Scores(pairs, overall)

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """As in metrics.json: for each of `METRICS` {"mean": m, "<domain>/<task>": v, ...}, and "overall", which holds
        {"<task>": v, ...} for each of them. Strict JSON: no NaN, and None where there is no value.
        """
        by_pair = {
            metric: {"mean": self.mean(metric), **{pair.name: getattr(pair, metric).value for pair in self.pairs}}
            for metric in METRICS
        }
        overall = {metric: {part.name: getattr(part, metric).value for part in self.overall} for metric in METRICS}
        return {**by_pair, "overall": overall}

    def explained(self, pairs: Collection[tuple[str, str]], reason: str) -> Scores:
        """The same, with ``reason`` for those of the (domain, task) pairs whose scores are not finite."""
        return dataclasses.replace(
            self,
            pairs=tuple(
                _withheld(pair, reason)
                if (pair.domain, pair.task) in pairs and pair.logloss.reason == NOT_FINITE
                else pair
                for pair in self.pairs
            ),
        )

    def undefined(self) -> list[str]:
        """A line per pair and reason for undefined AUC, logloss and, in a log with users, GAUC."""
        return [line for pair in self.pairs for line in pair.undefined()]


def _withheld(part: _Part, reason: str) -> _Part:
    return dataclasses.replace(part, **dict.fromkeys(METRICS, Measure(None, reason)))


def _mean(measures: Sequence[Measure]) -> float | None:
    values = [measure.value for measure in measures if measure.value is not None]
    return math.fsum(values) / len(values) if values else None
