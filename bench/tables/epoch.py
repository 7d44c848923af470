"""Tables of `bench.epoch`."""

from __future__ import annotations

from typing import Any

from bench.markdown import auc, table


def render(document: dict[str, Any]) -> list[str]:
    """Times and AUCs of both backends, then the AUC of every pair."""
    head = [
        "backend",
        "fit s",
        "quartiles",
        "CPU s",
        "epoch s",
        "k rows/s",
        "mean test AUC",
        "epochs",
        "best epoch",
    ]
    rows = [
        [
            row["backend"],
            f"{row['fit_seconds']['median']:.3f}",
            f"{row['fit_seconds']['q1']:.3f}-{row['fit_seconds']['q3']:.3f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['epoch_seconds']['median']:.3f}",
            f"{document['rows']['train'] / row['epoch_seconds']['median'] / 1e3:.0f}",
            auc(row["accuracy"]["test_auc"]["mean"]),
            f"{row['accuracy']['epochs']}",
            f"{row['accuracy']['best_epoch']}",
        ]
        for row in document["backends"]
    ]
    pairs = [name for name in document["backends"][0]["accuracy"]["test_auc"] if name != "mean"]
    by_pair = [[p, *(auc(row["accuracy"]["test_auc"][p]) for row in document["backends"])] for p in pairs]
    difference = document["auc_difference"]
    return [
        f"**{document['data']}, split {document['settings']['split']}: one epoch end to end, data prepared before**",
        "",
        *table(head, rows),
        "",
        f"Speed-up of {document['own']}: {document['speedup']['fit']:.2f}x (fit: one epoch with "
        "validation, then validation and test of the best weights), "
        f"{document['speedup']['epoch']:.2f}x (the epoch with its validation). "
        f"Mean test AUC differs by {'-' if difference is None else f'{difference:+.5f}'}.",
        "",
        *table(["test AUC", *(row["backend"] for row in document["backends"])], by_pair),
        "",
    ]
