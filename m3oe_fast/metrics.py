"""AUC and logloss per (domain, task) and their mean; poor data never raises and never poisons.

Inputs are the logits [N, T] of N scored rows, their domain [N] and labels [N, T] (NaN = not
observed). A pair whose metric is undefined (no labelled rows, one class only, scores that are not
finite) gets no value but the reason, and the mean is taken over the pairs that have one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import binary_auroc

NO_ROWS = "no labelled rows"
ONLY_POSITIVES = "only positives"
ONLY_NEGATIVES = "only negatives"
NOT_FINITE = "scores are not finite"


@dataclass(frozen=True)
class Measure:
    """A metric's value, or None and the reason why it has none."""

    value: float | None
    reason: str | None = None


@dataclass(frozen=True)
class PairScores:
    """What was measured on the labelled rows of one (domain, task) pair."""

    domain: str
    task: str
    rows: int
    positives: int
    auc: Measure
    logloss: Measure

    @property
    def name(self) -> str:
        """The pair's key in metrics.json, "<domain>/<task>"."""
        return f"{self.domain}/{self.task}"


@dataclass(frozen=True)
class Scores:
    """Every pair of one scored part, domain by domain, in the order given to `evaluate`."""

    pairs: tuple[PairScores, ...]

    @property
    def mean_auc(self) -> float | None:
        """Unweighted mean over the pairs whose AUC is defined, None if there is none."""
        return _mean([pair.auc for pair in self.pairs])

    @property
    def mean_logloss(self) -> float | None:
        """Unweighted mean over the pairs whose logloss is defined, None if there is none."""
        return _mean([pair.logloss for pair in self.pairs])

    @property
    def finite(self) -> bool:
        """Whether every row that was measured has a finite score."""
        return all(pair.logloss.reason != NOT_FINITE for pair in self.pairs)

    def withheld(self, reason: str) -> Scores:
        """The same pairs and rows, with ``reason`` in the place of every value."""
        none = Measure(None, reason)
        return Scores(tuple(dataclasses.replace(pair, auc=none, logloss=none) for pair in self.pairs))

    def to_dict(self) -> dict[str, dict[str, float | None]]:
        """As in metrics.json: {"auc": {"mean": m, "<domain>/<task>": v}, "logloss": same keys}."""
        return {
            "auc": {"mean": self.mean_auc, **{pair.name: pair.auc.value for pair in self.pairs}},
            "logloss": {
                "mean": self.mean_logloss,
                **{pair.name: pair.logloss.value for pair in self.pairs},
            },
        }

    def undefined(self) -> list[str]:
        """One line for each undefined metric, with its reason."""
        return [
            f"{metric} of {pair.name}: {measure.reason} ({pair.rows:,} labelled rows)"
            for pair in self.pairs
            for metric, measure in (("AUC", pair.auc), ("logloss", pair.logloss))
            if measure.value is None
        ]


def auc(score: np.ndarray, positive: np.ndarray) -> Measure:
    """Area under the ROC curve: the share of (positive, negative) pairs in order, a tie is half.

    Args:
        score: float [n], any monotone score (logits are fine).
        positive: bool [n].
    """
    if not len(score):
        return Measure(None, NO_ROWS)
    if not np.isfinite(score).all():
        return Measure(None, NOT_FINITE)
    positives = int(positive.sum())
    if positives == len(positive):
        return Measure(None, ONLY_POSITIVES)
    if not positives:
        return Measure(None, ONLY_NEGATIVES)
    # torchmetrics squashes scores outside [0, 1] to probabilities, where confident logits tie; ranks keep their order.
    _, rank = np.unique(score, return_inverse=True)
    share = torch.from_numpy(rank / max(int(rank.max()), 1))
    target = torch.from_numpy(positive.astype(np.int64))
    return Measure(binary_auroc(share, target, validate_args=False).item())


def logloss(logit: np.ndarray, label: np.ndarray) -> Measure:
    """Mean binary cross-entropy in nats; from logits in float64, so no probability is clipped.

    Args:
        logit: float [n].
        label: float [n] in [0, 1].
    """
    if not len(logit):
        return Measure(None, NO_ROWS)
    if not np.isfinite(logit).all():
        return Measure(None, NOT_FINITE)
    pair = (torch.from_numpy(values.astype(np.float64)) for values in (logit, label))
    return Measure(F.binary_cross_entropy_with_logits(*pair).item())


def evaluate(
    logits: np.ndarray,
    domain: np.ndarray,
    label: np.ndarray,
    domains: Sequence[str],
    tasks: Sequence[str],
) -> Scores:
    """Measure every (domain, task) pair.

    Args:
        logits: float [N, T].
        domain: int [N] in [0, D).
        label: float [N, T]; NaN = not observed, above 0.5 = positive.
        domains: D names.
        tasks: T names.
    """
    order = np.argsort(domain, kind="stable")
    ends = np.cumsum(np.bincount(domain, minlength=len(domains)))[:-1]
    pairs = []
    for domain_name, rows in zip(domains, np.split(order, ends), strict=True):
        for t, task_name in enumerate(tasks):
            pairs.append(_pair(domain_name, task_name, logits[rows, t], label[rows, t]))
    return Scores(tuple(pairs))


def _pair(domain: str, task: str, logit: np.ndarray, label: np.ndarray) -> PairScores:
    observed = ~np.isnan(label)
    logit, label = logit[observed], label[observed]
    positive = label > 0.5
    return PairScores(
        domain=domain,
        task=task,
        rows=len(label),
        positives=int(positive.sum()),
        auc=auc(logit, positive),
        logloss=logloss(logit, label),
    )


def _mean(measures: Sequence[Measure]) -> float | None:
    values = [measure.value for measure in measures if measure.value is not None]
    return math.fsum(values) / len(values) if values else None
