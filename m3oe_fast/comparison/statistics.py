"""What several seeds tell: mean, spread, and whether two rows differ. Values are float64 by seed."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """A quantity over the seeds for which it is defined.

    Attributes:
        mean: None if it is defined for no seed.
        std: sample standard deviation (n - 1); None for fewer than two.
        count: seeds for which it is defined.
    """

    mean: float | None
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread:
        """The spread of values by seed, None where undefined."""
        known = [value for value in values if value is not None]
        if not known:
            return cls(None, None, 0)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def improvement(auc: float | None, base: float | None) -> float | None:
    """Relative improvement as the field defines it, (auc - 0.5) / (base - 0.5) - 1: 0.5 is what chance has.

    Returns:
        None where an AUC is undefined, or the base is no better than chance.
    """
    if auc is None or base is None or base <= 0.5:
        return None
    return (auc - 0.5) / (base - 0.5) - 1


def paired(ours: Sequence[float | None], others: Sequence[float | None]) -> list[tuple[float, float]]:
    """The pairs of values by seed in which both are defined."""
    return [(a, b) for a, b in zip(ours, others, strict=True) if a is not None and b is not None]


def p_value(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Two-sided p of Student's paired t-test (n - 1 degrees of freedom).

    Returns:
        None for fewer than two pairs, or if all of them are equal.
    """
    if len(pairs) < 2:
        return None
    from scipy.stats import ttest_rel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # differences without any spread have p = 0 or none
        p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return None if math.isnan(p) else p


def half_interval(spread: Spread) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None for fewer than two seeds."""
    if spread.std is None:
        return None
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, spread.count - 1)) * spread.std / math.sqrt(spread.count)
