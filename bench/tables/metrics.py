"""Tables of `bench.metrics`."""

from __future__ import annotations

from typing import Any

from bench.markdown import table


def render(document: dict[str, Any]) -> list[str]:
    """A line per contender."""
    rows = [
        [row["name"], f"{row['cpu_seconds']:.2f}", f"{row['seconds']['median']:.2f}"] for row in document["contenders"]
    ]
    settings = document["settings"]
    return [
        f"**{settings['rows']:,} scored rows of {settings['users']:,} users, 6 pairs: AUC, logloss, GAUC; m3oe_fast "
        f"needs {document['speedup']:.0f} times less CPU, with calibration and the tasks as a whole besides**",
        "",
        *table(["contender", "CPU s", "s"], rows),
        "",
    ]
