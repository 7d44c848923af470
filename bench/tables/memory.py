"""Tables of `bench.memory`."""

from __future__ import annotations

from typing import Any

from bench.markdown import table, times


def render(document: dict[str, Any]) -> list[str]:
    """A line per contender."""
    rows = [
        [
            row["name"],
            _mib(row["state_bytes"]),
            _mib(row["base_bytes"]),
            _mib(row["extra_bytes"]),
            f"{row['extra_bytes'] / document['batch'] / 1024:.1f}",
            "" if row["own"] else times(row.get("extra_of_own")),
        ]
        for row in document["contenders"]
    ]
    head = ["contender", "state MiB", "resident before MiB", "extra MiB", "extra KiB/row", "of m3oe_fast"]
    title = f"**Extra memory of a training step, B = {document['batch']:,}**"
    return [title, "", *table(head, rows), ""]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f}"
