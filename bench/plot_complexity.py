"""`python -m bench.plot_complexity RESULT.json --out FIGURE.png`: a result of bench.complexity as a figure.

The training step of every model against D, T and K, and its parameters against D.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import report
from m3oe_fast import cli
from m3oe_fast.errors import DataError, UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, twice by line and marker; M3oE is the one to find.
LOOKS = {
    "m3oe": ("#D55E00", "-", "o"),
    "mlp": ("#999999", "-", "s"),
    "shared_bottom": ("#56B4E9", "-", "^"),
    "mmoe": ("#0072B2", "-", "v"),
    "ple": ("#009E73", "-", "D"),
    "adatt": ("#CC79A7", "-", "P"),
    "adatt_sp": ("#CC79A7", "--", "X"),
    "star": ("#E69F00", "-", "*"),
    "m2m": ("#222222", ":", "o"),
    "pepnet": ("#222222", "--", "s"),
}
AXES = {"D": "domains D", "T": "tasks T", "K": "shared experts K"}
INK, FAINT = "#222222", "#666666"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot_complexity", description=__doc__)
    parser.add_argument("result", metavar="RESULT.json")
    parser.add_argument("--out", required=True, metavar="FIGURE", help="write here: .png, .svg or .pdf")
    options = parser.parse_args(argv)
    document = report.read(options.result)
    if document["kind"] != "complexity":
        raise DataError(f"{options.result} is a result of bench.{document['kind']}, not of bench.complexity")
    draw(document, options.out)
    return 0


def draw(document: dict[str, Any], path: str) -> None:
    """Write the figure.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("bench.plot_complexity needs matplotlib: pip install 'm3oe_fast[report]'") from error
    swept = [axis for axis in AXES if any(point["axis"] == axis for point in document["points"])]
    panels = [(axis, "step") for axis in swept] + ([("D", "parameters")] if "D" in swept else [])
    figure = Figure(figsize=(3.1 * len(panels), 3.5), dpi=170)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    lines: dict[str, Any] = {}
    for place, (axis, what) in enumerate(panels):
        lines |= _panel(figure.add_subplot(1, len(panels), place + 1), document, axis, what)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), fontsize=8, frameon=False)
    figure.savefig(Path(path))


def _panel(axes: Axes, document: dict[str, Any], axis: str, what: str) -> dict[str, Any]:
    points = [point for point in document["points"] if point["axis"] == axis]
    lines = {}
    for name in points[0]["models"]:
        values = [(point["value"], _value(point["models"][name], what)) for point in points]
        known = [(x, y) for x, y in values if y is not None]
        colour, style, marker = LOOKS[name]
        (lines[name],) = axes.plot(
            [x for x, _ in known],
            [y for _, y in known],
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=4,
            linewidth=2.2 if name == "m3oe" else 1.2,
            zorder=3 if name == "m3oe" else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [point["value"] for point in points]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(AXES[axis], color=INK, fontsize=9)
    rows = document["settings"]["batch"]
    title = f"training step of {rows:,} rows, ms" if what == "step" else "parameters without tables"
    axes.set_title(title, fontsize=9, color=INK, loc="left")
    axes.tick_params(labelsize=8, colors=FAINT)
    axes.grid(True, axis="y", color="#E5E5E5", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return lines


def _value(one: dict[str, Any], what: str) -> float | None:
    if what == "parameters":
        return one["parameters"]
    return 1e3 * one["step"]["seconds"]["median"] if "step" in one else None


if __name__ == "__main__":
    cli.run(main)
