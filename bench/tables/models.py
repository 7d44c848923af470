"""Tables of `bench.models`."""

from __future__ import annotations

from typing import Any

from bench.markdown import ms, percent, table, times


def render(document: dict[str, Any]) -> list[str]:
    """A line per model: what it computes, how long a step takes, and how much longer the opponents'."""
    measured = document["measurements"]
    opponents = [row["name"] for row in measured[0]["contenders"] if not row["own"]]
    head = [
        "model",
        "parameters",
        "k multiply-adds a row",
        "ms",
        "k rows/s",
        "of FMA peak",
        *(f"vs {n}" for n in opponents),
    ]
    rows = []
    for entry in measured:
        own = next(row for row in entry["contenders"] if row["own"])
        others = {row["name"]: row for row in entry["contenders"]}
        seconds = own["seconds"]["median"]
        rows.append(
            [
                entry["model"],
                f"{entry['parameters']:,}",
                f"{entry['multiply_adds'] / 1e3:,.0f}",
                ms(seconds),
                f"{entry['batch'] / seconds / 1e3:.0f}",
                percent(entry["share_of_peak"]),
                *(times(others[name]["speedup_of_own"]) for name in opponents),
            ]
        )
    return [
        f"**A training step (forward, loss, backward, Adam), B = {measured[0]['batch']:,}**",
        "",
        *table(head, rows),
        "",
    ]
