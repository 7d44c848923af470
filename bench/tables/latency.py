"""Tables of `bench.latency`."""

from __future__ import annotations

from typing import Any

from bench.markdown import ms, table, times


def render(document: dict[str, Any]) -> list[str]:
    """A table per batch size."""
    lines = []
    for measured in document["measurements"]:
        rows = [
            [
                row["name"],
                ms(row["seconds"]["median"]),
                ms(row["seconds"]["p99"]),
                ms(row["cpu_seconds"]),
                f"{row['error']:.1e}" if "error" in row else "",
                times(row["speedup_of_own"]) if "speedup_of_own" in row else "",
                times(row["p99_speedup_of_own"]) if "p99_speedup_of_own" in row else "",
            ]
            for row in measured["contenders"]
        ]
        head = ["contender", "median ms", "p99 ms", "CPU ms", "error", "m3oe_fast is faster by", "at p99"]
        lines += [
            f"**predict, B = {measured['batch']:,}** ({measured['calls']:,} calls each)",
            "",
            *table(head, rows),
            "",
        ]
    return lines
