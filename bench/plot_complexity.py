"""`python -m bench.plot_complexity RESULT.json --out FIGURE.png`: a result of bench.complexity as a figure.

The training step of every model against D, T and K, and its parameters against D.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bench import figure, report
from bench.figure import FAINT, INK
from bench.tables.complexity import names_along
from m3oe_fast import cli
from m3oe_fast.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A colour per model; those of one family share it and differ by line and marker. M3oE is the one to find.
LOOKS = {
    "m3oe": (figure.VERMILION, "-", "o"),
    "mlp": (figure.GREY, "-", "s"),
    "shared_bottom": (figure.SKY, "-", "^"),
    "mmoe": (figure.BLUE, "-", "v"),
    "ple": (figure.GREEN, "-", "D"),
    "adatt": (figure.PURPLE, "-", "P"),
    "adatt_sp": (figure.PURPLE, "--", "X"),
    "star": (figure.ORANGE, "-", "*"),
    "m2m": (INK, ":", "o"),
    "pepnet": (INK, "--", "s"),
}
COLUMNS = 2
AXES = {"D": "domains D", "T": "tasks T", "K": "shared experts K"}


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
        UserError: matplotlib is missing, or knows no such format.
    """
    swept = [axis for axis in AXES if any(point["axis"] == axis for point in document["points"])]
    panels = [(axis, "step") for axis in swept] + ([("D", "parameters")] if "D" in swept else [])
    height = -(-len(panels) // COLUMNS)
    drawn = figure.canvas("bench.plot_complexity", 9.0, 0.9 + 3.2 * height, hspace=0.06)
    lines: dict[str, Any] = {}
    steps: Axes | None = None
    for place, (axis, what) in enumerate(panels):
        # Steps share their scale, so that a model is as high in one panel as in the other.
        axes = drawn.add_subplot(height, COLUMNS, place + 1, sharey=steps if what == "step" else None)
        steps = axes if what == "step" else steps
        lines |= _panel(axes, document, axis, what)
    names = [name for name in LOOKS if name in lines]
    drawn.legend(
        [lines[name] for name in names],
        names,
        loc="outside right upper",
        fontsize=10,
        frameon=False,
        labelspacing=0.9,
        handlelength=3,
        labelcolor=INK,
    )
    drawn.supxlabel(_caption(document), x=0.01, ha="left", color=FAINT, fontsize=8.5)
    figure.save(drawn, path)


def _panel(axes: Axes, document: dict[str, Any], axis: str, what: str) -> dict[str, Any]:
    from matplotlib.ticker import LogLocator

    points = [point for point in document["points"] if point["axis"] == axis]
    lines = {}
    for name in names_along(points):
        values = [(point["value"], _value(point["models"][name], what)) for point in points]
        known = [(x, y) for x, y in values if y is not None]
        colour, style, marker = LOOKS[name]
        (lines[name],) = axes.plot(
            [x for x, _ in known],
            [y for _, y in known],
            color=colour,
            linestyle=style,
            marker=marker,
            markersize=5,
            linewidth=2.6 if name == "m3oe" else 1.4,
            zorder=3 if name == "m3oe" else 2,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [point["value"] for point in points]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(lambda value, _: _plain(value))
    axes.minorticks_off()
    rows = document["settings"]["batch"]
    title = f"Training step of {rows:,} rows, ms" if what == "step" else "Parameters without tables"
    axes.set_title(title, fontsize=10.5, color=INK, loc="left")
    axes.set_xlabel(AXES[axis], color=INK, fontsize=10)
    axes.tick_params(labelsize=9.5, colors=FAINT)
    axes.grid(True, axis="y", color="#E5E5E5", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    return lines


def _value(one: dict[str, Any], what: str) -> float | None:
    if what == "parameters":
        return one["parameters"]
    return 1e3 * one["step"]["seconds"]["median"] if "step" in one else None


def _plain(value: float) -> str:
    """100, 3,000, 30 k, 1 M: thousands in full up to ten of them."""
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e4 else f"{value:,g}"


def _caption(document: dict[str, Any]) -> str:
    base, settings = document["base"], document["settings"]
    around = ", ".join(f"{axis} = {value}" for axis, value in base.items())
    text = f"One of {around} changed at a time. K: of the models that have shared experts."
    if any("step" not in one for point in document["points"] for one in point["models"].values()):
        text += f" A line ends where a step needs more than {settings['most_gflop']:g} GFLOP."
    versions = document["versions"]
    return f"{text}\n{document['machine']['cpu']}, {settings['threads']} threads, torch {versions['torch']}"


if __name__ == "__main__":
    cli.run(main)
