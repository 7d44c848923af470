"""Tables of `bench.loop`."""

from __future__ import annotations

from typing import Any

from bench.markdown import auc, table


def render(document: dict[str, Any]) -> list[str]:
    """A line per contender, then where the time of ours goes."""
    head = ["contender", "s", "quartiles", "CPU s", "faster than the opponent by", "val AUC"]
    rows = [
        [
            ("m3oe_fast, " if row["own"] else "eager loop, ") + row["name"],
            f"{row['seconds']['median']:.2f}",
            f"{row['seconds']['q1']:.2f}-{row['seconds']['q3']:.2f}",
            f"{row['cpu_seconds']:.2f}",
            f"{row['speedup']:.1f}x",
            auc(row["val_auc"]),
        ]
        for row in document["contenders"]
    ]
    own = [row for row in document["contenders"] if row["own"]]
    sections = list(dict.fromkeys(name for row in own for name in row["profile"]["sections"]))
    shares = [
        [name, *(_share(row["profile"]["sections"].get(name, {}).get("share")) for row in own)] for name in sections
    ]
    outside = ["all outside the kernels", *(_share(row["profile"]["outside_kernels"]) for row in own)]
    return [
        f"**An epoch of {document['rows']['train']:,} training rows end to end, "
        f"B = {document['settings']['batch_size']:,}; opponent: eager loop, {document['opponent']}**",
        "",
        *table(head, rows),
        "",
        "Share of the epoch's time (m3oe_fast):",
        "",
        *table(["section", *(row["name"] for row in own)], [*shares, outside]),
        "",
    ]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
