"""Tables of `bench.compare`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from bench.markdown import ms, percent, table, times

TITLES = {
    "forward": "Forward (from ids)",
    "network": "Forward (from x, kernels alone)",
    "train": "Forward + backward",
    "step": "Training step (forward + backward + Adam)",
}


def sections(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The measurements by precision of m3oe_fast; of a run with both allocator settings the merged ones."""
    measured = sorted(document.get("merged", document["measurements"]), key=lambda m: _order(document, m))
    return {precision: list(group) for precision, group in groupby(measured, _precision)}


def render(document: dict[str, Any]) -> list[str]:
    """A table per measurement."""
    lines = []
    for precision, measurements in sections(document).items():
        for measured in measurements:
            title = f"{TITLES[measured['what']]}, B = {measured['batch']:,}"
            if precision != "fp32":
                title = f"{precision}: {title}"
            lines += [f"**{title}** ({_roof(measured)})", "", *_table(measured), ""]
    return lines


def summary(document: dict[str, Any]) -> list[str]:
    """A table per precision, a line per measurement."""
    found = sections(document)
    lines: list[str] = []
    for precision, measurements in found.items():
        if lines:
            lines.append("")
        if len(found) > 1:
            lines += [f"**{precision}**", ""]
        lines += _summary(measurements)
    return lines


def _summary(measurements: list[dict[str, Any]]) -> list[str]:
    opponents = [row["name"] for row in measurements[0]["contenders"] if not row["own"]]
    rows = []
    for measured in measurements:
        by_name = {row["name"]: row for row in measured["contenders"]}
        own = next(row for row in measured["contenders"] if row["own"])
        rows.append(
            [
                f"{TITLES[measured['what']]}, B = {measured['batch']:,}",
                f"{own['rows_per_second'] / 1e3:.0f}",
                percent(own["share_of_peak"]),
                *(f"{by_name[name]['speedup_of_own']:.1f}x" for name in opponents),
            ]
        )
    peak = "of FMA peak" if _precision(measurements[0]) == "fp32" else "of fp32 FMA peak"
    return table(["", "k rows/s", peak, *(f"vs {name}" for name in opponents)], rows)


def _table(measured: dict[str, Any]) -> list[str]:
    columns = list(zip(*map(_cells, measured["contenders"]), strict=True))
    # Documents of one allocator setting say which in their conditions.
    shown = [column for column in columns if any(cell for _, cell in column)]
    head = [column[0][0] for column in shown]
    return table(head, list(zip(*([cell for _, cell in column] for column in shown), strict=True)))


def _cells(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Column titles and what this contender has there."""
    seconds, error = row["seconds"], row.get("logit_error")
    yield "contender", row["name"]
    yield "ms", ms(seconds["median"])
    yield "quartiles", f"{ms(seconds['q1'])}-{ms(seconds['q3'])}"
    yield "CPU ms", ms(row["cpu_seconds"])
    yield "k rows/s", f"{row['rows_per_second'] / 1e3:.0f}"
    yield "of peak", percent(row["share_of_peak"])
    yield "faults", f"{row['minor_faults']:.0f}"
    yield "allocator", row.get("allocator", "")
    yield "error of logits", "" if error is None else f"{error:.1e}"
    yield "m3oe_fast is faster by", "" if row["own"] else times(row["speedup_of_own"])


def _roof(measured: dict[str, Any]) -> str:
    peak = measured["fma_peak_gflops"]
    if peak is None:
        return "FMA peak not measured"
    roof = f"{'' if _precision(measured) == 'fp32' else 'fp32 '}FMA peak {peak:.0f} GFLOP/s"
    # In bf16 the machine can do more than its fp32 peak.
    if any((row["share_of_peak"] or 0) > 1 for row in measured["contenders"] if row.get("precision", "fp32") == "fp32"):
        roof += ", but the rounds beat it: other load disturbed this run"
    return roof


def _precision(measured: dict[str, Any]) -> str:
    return measured.get("precision", "fp32")


def _order(document: dict[str, Any], measured: dict[str, Any]) -> int:
    return document["settings"].get("precision", ["fp32"]).index(_precision(measured))
