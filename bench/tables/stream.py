"""Tables of `bench.stream`."""

from __future__ import annotations

from typing import Any

from bench.markdown import percent, table

NAMES = {
    "prepare": "prepare",
    "read windows": "read, windows",
    "read memory": "read, whole",
    "train windows": "train, windows",
    "train memory": "train, whole",
}


def render(document: dict[str, Any]) -> list[str]:
    """A line per measurement; speed of windows as a share of that of the whole."""
    speeds = {row["task"]: row["rows_per_second"] for row in document["measurements"]}
    rows = [
        [
            NAMES[row["task"]],
            f"{row['rows']:,}",
            f"{row['rows_per_second'] / 1e3:,.0f}",
            _share(speeds, row),
            f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in document["measurements"]
    ]
    settings = document["settings"]
    size = f", a file of {document['train_bytes'] / 2**20:,.0f} MiB" if "train_bytes" in document else ""
    return [
        f"**{settings['rows']:,} generated rows{size}; windows of {settings['window']:,} rows, "
        f"B = {settings['batch_size']:,}**",
        "",
        *table(["", "rows", "k rows/s", "of the whole", "peak RSS MiB"], rows),
        "",
    ]


def _share(speeds: dict[str, float], row: dict[str, Any]) -> str:
    if row["way"] != "windows" or (whole := speeds.get(f"{row['what']} memory")) is None:
        return ""
    return percent(row["rows_per_second"] / whole)
