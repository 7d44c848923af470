"""The content of metrics.json of a run that never was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = {"train": 800, "val": 100, "test": 100}


def metrics(
    auc: Mapping[str, float | None],
    *,
    val: float | None = None,
    form: str = "mdmt",
    domains: Sequence[str] = ("a", "b"),
    tasks: Sequence[str] = ("click",),
    **train: Any,
) -> dict[str, Any]:
    """Of a finished run.

    Args:
        auc: test AUC by pair; "mean" is that of those that are defined.
        val: mean validation AUC; by default the mean test AUC.
        form: of the model.
        domains, tasks: of the log.
        train: entries of "train" that differ.
    """
    known = [value for value in auc.values() if value is not None]
    mean = sum(known) / len(known) if known else None
    logloss = {pair: None if value is None else 1 - value for pair, value in (auc | {"mean": mean}).items()}
    return {
        "data": {"name": "demo", "split": "random", "rows": ROWS, "domains": list(domains), "tasks": list(tasks)},
        "model": {"name": "mmoe", "form": form, "parameters": 1234, "multiply_adds": 567},
        "backend": "cpu",
        "isa": "avx2",
        "precision": "fp32",
        "train": {"epochs": 4, "seconds": 8.0, "samples_per_second": 400.0, "peak_rss_bytes": 3 * 2**20} | train,
        "best_epoch": 2,
        "val": {"auc": {"mean": mean if val is None else val}, "logloss": {"mean": None}},
        "test": {"auc": {**auc, "mean": mean}, "logloss": logloss},
        "fusion": {},
    }
