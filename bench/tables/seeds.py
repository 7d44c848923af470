"""Tables of `bench.seeds`."""

from __future__ import annotations

from typing import Any

from bench.markdown import auc, table


def render(document: dict[str, Any]) -> list[str]:
    """A line per precision."""
    seeds = document["settings"]["seeds"]
    rows = [
        [
            row["precision"] + ("" if row["computes"] == row["precision"] else f" (computes in {row['computes']})"),
            f"{row['mean']:.5f}",
            f"{row['std']:.5f}",
            "" if row["precision"] == "fp32" else f"{row['difference']:+.5f}",
            "" if row["precision"] == "fp32" else ("yes" if row["within_spread"] else "no"),
            *(auc(run["test_auc"]) for run in row["runs"]),
        ]
        for row in document["precisions"]
    ]
    head = ["precision", "mean test AUC", "std", "minus fp32", "within fp32's std", *(f"seed {s}" for s in seeds)]
    return [
        f"**{document['data']}, split {document['settings']['split']}: {len(seeds)} seeds, "
        f"at most {document['settings']['epochs']} epochs**",
        "",
        *table(head, rows),
        "",
    ]
