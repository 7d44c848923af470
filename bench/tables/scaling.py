"""Tables of `bench.scaling`."""

from __future__ import annotations

from typing import Any

from bench.markdown import ms, percent, table


def render(document: dict[str, Any]) -> list[str]:
    """A line per size; then GFLOP/s against the smallest number of domains with as many tasks."""
    sizes, peak = document["sizes"], document["fma_peak_gflops"]
    roof = "FMA peak not measured" if peak is None else f"FMA peak {peak:.0f} GFLOP/s"
    head = ["", "M FLOP/row", "step ms", "net ms", "k rows/s", "GFLOP/s", "net GFLOP/s", "net of peak"]
    rows = [
        [
            _name(size),
            f"{size['flops_per_row'] / 1e6:.2f}",
            ms(size["seconds"]["step"]["median"]),
            ms(size["net_seconds"]),
            f"{size['rows_per_second'] / 1e3:.0f}",
            f"{size['gflops']:.0f}",
            f"{size['net_gflops']:.0f}",
            percent(None if peak is None else size["net_gflops"] / peak),
        ]
        for size in sizes
    ]
    apart_head = ["per step, not per row", "parameters", "step of 2 rows per domain ms", "fold ms", "Adam ms"]
    apart = [
        [_name(size), f"{size['parameters']:,}", *(ms(size["seconds"][key]["median"]) for key in APART)]
        for size in sizes
    ]
    ratio_head = ["GFLOP/s of a step", "against", "raw", "net"]
    ratios = [
        [_name(ratio), f"D = {ratio['against']}", f"{ratio['raw']:.3f}", f"{ratio['net']:.3f}"]
        for ratio in document["ratios"]
    ]
    return [
        f"**Training step of m3oe_fast, B = {document['batch']:,}** ({roof})",
        "",
        *table(head, rows),
        "",
        *table(apart_head, apart),
        "",
        *(table(ratio_head, ratios) if ratios else []),
        "",
    ]


APART = ("small_step", "fold", "adam")


def _name(size: dict[str, Any]) -> str:
    return f"D = {size['domains']}, T = {size['tasks']}"
