"""`python -m bench.plot RESULT.json ... --out FIGURE.png`: results of bench.compare as a figure: rows per second of
every contender forward and in a training step, and what share of the machine's measured FMA peak that is.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from bench import command, figure, report
from bench.figure import FAINT, INK
from bench.tables import compare
from m3oe_fast import cli
from m3oe_fast.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {"forward": "Forward, ids to logits", "step": "Training step, fused Adam"}
OWN_COLOUR, OTHER_COLOUR = figure.VERMILION, figure.BLUE
COLOURS = {"eager, published": figure.GREY, "eager, batched": figure.SKY, "torch.compile": OTHER_COLOUR}
BAR, GAP = 0.8, 0.9

# A bar: precision of its section, contender, and its row in the document.
Bar = tuple[str, str, dict[str, Any]]


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT.json")
    parser.add_argument("--batch", type=command.positive, default=40960, metavar="B", help="the batch size to show")
    parser.add_argument("--out", required=True, metavar="FIGURE", help="write here: .png, .svg or .pdf")
    options = parser.parse_args(argv)
    draw([report.read(path) for path in options.results], options.batch, options.out)
    return 0


def draw(documents: list[dict[str, Any]], batch: int, path: str) -> None:
    """Write the figure.

    Raises:
        DataError: the documents do not hold what it shows.
        UserError: matplotlib is missing, or knows no such format.
    """
    panels = {what: bars(documents, what, batch) for what in PANELS}
    # A second step of the same contender, with another Adam, has no place beside its forward pass.
    shared = set.intersection(*({bar[:2] for bar in shown} for shown in panels.values()))
    panels = {what: [bar for bar in shown if bar[:2] in shared] for what, shown in panels.items()}
    longest = len(shared)
    groups = len({precision for precision, _ in shared})
    height = 1.4 + 0.34 * longest + (0.45 * groups if groups > 1 else 0)
    drawn = figure.canvas("bench.plot", 10.5, height, wspace=0.04)
    left, right = drawn.subplots(1, 2, sharey=True)
    _panel(left, PANELS["forward"], panels["forward"])
    _panel(right, PANELS["step"], panels["step"])
    right.tick_params(axis="y", labelleft=False)
    for label, (_, _, row) in zip(left.get_yticklabels(), panels["forward"], strict=True):
        label.set_fontweight("bold" if row["own"] else "normal")
    drawn.suptitle(f"M3oE, B = {batch:,}", x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    drawn.supxlabel(_caption(documents), x=0.01, ha="left", color=FAINT, fontsize=7.5)
    figure.save(drawn, path)


def bars(documents: list[dict[str, Any]], what: str, batch: int) -> list[Bar]:
    """What a panel shows, from top to bottom.

    Raises:
        DataError: a document of another kind, or none with this measurement.
    """
    found: list[Bar] = []
    for document in documents:
        if document["kind"] != "compare":
            raise DataError(f"the figure shows results of bench.compare, not of bench.{document['kind']}")
        for precision, measurements in compare.sections(document).items():
            for measured in measurements:
                if (measured["what"], measured["batch"]) == (what, batch):
                    found += [(precision, row["name"], row) for row in measured["contenders"]]
    if not found:
        raise DataError(f"no measurement of {what!r} at B = {batch:,}; --batch takes one of those measured")
    return found


def _panel(axes: Axes, title: str, shown: list[Bar]) -> None:
    most = max(row["rows_per_second"] for _, _, row in shown)
    several = len({precision for precision, _, _ in shown}) > 1
    place, previous, ticks = 0.0, None, []
    for precision, name, row in shown:
        if several and precision != previous:
            place += 0.35 if previous else 0
            text = axes.annotate(f"m3oe_fast in {precision}", (0, place), (4, 0), textcoords="offset points")
            text.set(va="center", fontsize=9, color=INK, fontweight="bold")
            place += GAP
        previous = precision
        axes.barh(place, row["rows_per_second"] / 1e3, BAR, color=_colour(row))
        axes.text(
            (row["rows_per_second"] + 0.012 * most) / 1e3, place, _label(row), va="center", fontsize=8.5, color=INK
        )
        ticks.append((place, name))
        place += 1
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=8.5, color=INK)
    axes.set_ylim(place - 0.4, -0.6)
    axes.set_xlim(0, 1.55 * most / 1e3)
    axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    axes.set_xticks([])  # every bar has its number
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(FAINT)


def _label(row: dict[str, Any]) -> str:
    text = f"{row['rows_per_second'] / 1e3:,.0f}"
    if row["share_of_peak"] is not None:
        text += f"  ·  {100 * row['share_of_peak']:.0f} %"
    return text if row["own"] else f"{text}  ·  {row['speedup_of_own']:.1f}x slower"


def _colour(row: dict[str, Any]) -> str:
    if row["own"]:
        return OWN_COLOUR
    return next((colour for start, colour in COLOURS.items() if row["name"].startswith(start)), OTHER_COLOUR)


def _caption(documents: list[dict[str, Any]]) -> str:
    measured = [m for document in documents for group in compare.sections(document).values() for m in group]
    peaks = [m["fma_peak_gflops"] for m in measured if m["fma_peak_gflops"] is not None]
    place, settings = documents[0]["machine"], documents[0]["settings"]
    roof = f" of the fp32 FMA peak, {max(peaks):,.0f} GFLOP/s, measured in the same run" if peaks else ""
    shown = "Thousand rows per second" + (f"  ·  share{roof}" if roof else "") + "  ·  how much slower than m3oe_fast"
    return f"{shown}\n{place['cpu']}, {settings['threads']} threads, torch {documents[0]['versions']['torch']}"


if __name__ == "__main__":
    cli.run(main)
