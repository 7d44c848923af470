"""Tables of `bench.kill`."""

from __future__ import annotations

from typing import Any


def render(document: dict[str, Any]) -> list[str]:
    """One line: how many resumed runs ended with the same bits."""
    trials = document["trials"]
    same = sum(trial["identical"] for trial in trials)
    cut = sum(not kill["ended_before"] for trial in trials for kill in trial["killed"])
    return [
        f"**kill -9 at random moments of a run of {document['run_seconds']:.0f} s, resumed: "
        f"{same} of {len(trials)} identical bit for bit**",
        "",
        f"{cut} kills hit a running process, {len(trials) - same} runs ended otherwise.",
        "",
    ]
