"""The same comparison with both allocator settings as one: of every contender its better run.

Which setting suits a contender depends on its temporaries, so each is shown with the one that suits it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def merge(header: dict[str, Any], runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One document from those of both allocator settings.

    `measurements` and `gate` hold both runs, `merged` has the same sections as one run with the better row of every
    contender. Ratios and shares of peak in it are those of the merged rows.

    Raises:
        ValueError: the runs did not measure the same.
    """
    documents = list(runs.values())
    measured = [run["measurements"] for run in documents]
    return {
        **header,
        "environment": {allocator: run["environment"] for allocator, run in runs.items()},
        "config": documents[0]["config"],
        "macs": documents[0]["macs"],
        "gate": [found for run in documents for found in run["gate"]],
        "measurements": [section for run in measured for section in run],
        "merged": [_better(sections) for sections in zip(*measured, strict=True)],
    }


def _better(sections: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One measurement from those of several runs."""
    first = sections[0]
    for section in sections:
        if _what(section) != _what(first):
            raise ValueError(f"cannot merge {_what(section)} with {_what(first)}")
    peaks = [section["fma_peak_gflops"] for section in sections]
    peak = None if None in peaks else max(peaks)
    rows = [
        min(same, key=lambda row: row["seconds"]["median"])
        for same in zip(*map(_rows_with_allocator, sections), strict=True)
    ]
    own = next(row["seconds"]["median"] for row in rows if row["own"])
    for row in rows:
        row["share_of_peak"] = None if peak is None else row["gflops"] / peak
        row["speedup_of_own"] = row["seconds"]["median"] / own
    return {**first, "allocator": "better", "fma_peak_gflops": peak, "contenders": rows}


def _what(section: dict[str, Any]) -> tuple[str, str, int, tuple[str, ...]]:
    names = tuple(row["name"] for row in section["contenders"])
    return section["precision"], section["what"], section["batch"], names


def _rows_with_allocator(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [row | {"allocator": section["allocator"]} for row in section["contenders"]]
