"""The seesaw in numbers: which pairs gain and which lose against a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def seesaw(
    scores: Mapping[str, float | None],
    baseline: Mapping[str, float | None],
    reasons: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compare AUCs pair by pair.

    Args:
        scores, baseline: AUC by "<domain>/<task>", as ``Scores.to_dict()["auc"]``; the key "mean" is ignored.
        reasons: why ``baseline`` lacks a value, for some pairs.

    Returns:
        Strict JSON. "pairs": for every pair of either, in the order of ``scores``, its "baseline" and "model" AUC,
        "difference" and "relative_improvement" = (model - 0.5) / (baseline - 0.5) - 1, null where undefined and then
        with a "reason". "gain", "lose" and "equal": numbers of pairs. "mean_difference": null without any.
    """
    reasons = reasons or {}
    names = [name for name in dict.fromkeys([*scores, *baseline]) if name != "mean"]
    pairs = {name: _compared(scores.get(name), baseline.get(name), reasons.get(name)) for name in names}
    changes = [pair["difference"] for pair in pairs.values() if pair["difference"] is not None]
    return {
        "pairs": pairs,
        "gain": sum(change > 0 for change in changes),
        "lose": sum(change < 0 for change in changes),
        "equal": sum(change == 0 for change in changes),
        "mean_difference": sum(changes) / len(changes) if changes else None,
    }


def _compared(model: float | None, baseline: float | None, reason: str | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"baseline": baseline, "model": model, "difference": None, "relative_improvement": None}
    if baseline is None:
        return entry | {"reason": reason or "the baseline's AUC is undefined"}
    if model is None:
        return entry | {"reason": "the model's AUC is undefined"}
    entry["difference"] = model - baseline
    if baseline <= 0.5:
        return entry | {"reason": "no relative improvement over a baseline that is no better than chance"}
    return entry | {"relative_improvement": (model - 0.5) / (baseline - 0.5) - 1}
