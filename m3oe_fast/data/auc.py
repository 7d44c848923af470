"""Area under the ROC curve, exact, ties counted half."""

from __future__ import annotations

import numpy as np


def auc(score: np.ndarray, label: np.ndarray) -> float | None:
    """AUC of scores [N] for labels [N] of 0, 1, NaN (left out); None without both classes."""
    present = ~np.isnan(label)
    positive = label[present] == 1
    ones = int(positive.sum())
    zeros = len(positive) - ones
    if ones == 0 or zeros == 0:
        return None
    _, place, ties = np.unique(score[present], return_inverse=True, return_counts=True)
    rank = np.cumsum(ties) - (ties - 1) / 2  # mean rank of each distinct score, from 1
    return float((rank[place][positive].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def auc_by_pair(
    score: np.ndarray,
    label: np.ndarray,
    domain: np.ndarray,
    domains: tuple[str, ...],
    tasks: tuple[str, ...],
) -> dict[str, float | None]:
    """AUC of every (domain, task) as "<domain>/<task>", and "mean", that of the defined ones.

    Args:
        score: [N,T].
        label: [N,T] of 0, 1, NaN.
        domain: [N], 0..D-1.
    """
    table = {
        f"{name}/{task}": auc(score[domain == d, t], label[domain == d, t])
        for d, name in enumerate(domains)
        for t, task in enumerate(tasks)
    }
    defined = [value for value in table.values() if value is not None]
    return {"mean": float(np.mean(defined)) if defined else None, **table}
