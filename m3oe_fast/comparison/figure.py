"""table.png: mean test AUC of every row, a dot per seed and the 95 % interval of the mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from m3oe_fast.comparison.plan import OURS
from m3oe_fast.comparison.results import Results, Summary
from m3oe_fast.comparison.statistics import half_interval
from m3oe_fast.reporting.style import COLOURS, GREY, INK, legend_below, look, new_figure, save, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMS = {
    "single": "single: a model per pair",
    "mtl": "mtl: one per domain",
    "mdl": "mdl: one per task",
    "mdmt": "mdmt: one for all",
}
COLOUR = dict(zip(FORMS, (COLOURS[5], COLOURS[2], COLOURS[3], COLOURS[0]), strict=True))
FEWEST = 3
"""Seeds of an interval; that of two is so wide that nothing else could be seen."""


def write(results: Results, name: str, path: Path) -> None:
    """Draw the figure into ``path``.

    Args:
        results: all runs.
        name: of the log.

    Raises:
        UserError: it cannot be written.
    """
    with look():
        save(draw(results, name), path)


def draw(results: Results, name: str) -> Figure:
    """The figure; rows from top to bottom as in the table."""
    figure = new_figure(8, 1.5 + 0.27 * len(results.summaries))
    axes = figure.subplots()
    for place, summary in enumerate(results.summaries):
        _row(axes, place, summary)
    ours = next((summary.spread("auc").mean for summary in results.summaries if summary.row == OURS), None)
    if ours is not None:
        axes.axvline(100 * ours, color=GREY, linewidth=1, linestyle="--", zorder=1)
    axes.set_yticks(range(len(results.summaries)), [_label(summary) for summary in results.summaries])
    axes.set_ylim(len(results.summaries) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.04)
    extra = any(summary.row.extra for summary in results.summaries)
    axes.set_xlabel("mean test AUC x 100" + ("; † is not in the paper's table" if extra else ""))
    axes.set_title(_title(results, name), loc="left")
    shown = [form for form in FORMS if any(summary.row.form == form for summary in results.summaries)]
    handles = [axes.plot([], [], "o", color=COLOUR[form], markersize=6)[0] for form in shown]
    legend_below(figure, handles, [FORMS[form] for form in shown], columns=4)
    return figure


def _row(axes: Axes, place: int, summary: Summary) -> None:
    colour = COLOUR[summary.row.form]
    spread = summary.spread("auc")
    if spread.mean is None:
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        transform = axes.get_yaxis_transform()
        axes.text(0.01, place, "no result", transform=transform, va="center", color="#777777", bbox=behind)
        return
    half = half_interval(spread)
    if half is not None and spread.count >= FEWEST:
        ends = [100 * (spread.mean - half), 100 * (spread.mean + half)]
        axes.plot(ends, [place, place], color=colour, linewidth=9, alpha=0.25, solid_capstyle="butt")
    seeds = [100 * value for value in summary.values("auc") if value is not None]
    edge = {"markeredgewidth": 0.5, "markeredgecolor": "white"}
    axes.plot(seeds, [place] * len(seeds), "o", color=colour, markersize=4.5, **edge)
    axes.plot(100 * spread.mean, place, "|", color=INK, markersize=11, markeredgewidth=1.6, zorder=4)


def _label(summary: Summary) -> str:
    return short(summary.row.title) + (" †" if summary.row.extra else "")


def _title(results: Results, name: str) -> str:
    seeds = len(results.plan.seeds)
    parts = [short(name), "one seed" if seeds == 1 else f"{seeds} seeds (dots), their mean (bar)"]
    if seeds >= FEWEST:
        parts.append("its 95 % interval (band)")
    if any(summary.row == OURS and summary.count for summary in results.summaries):
        parts.append("dashed: M3oE")
    return "; ".join(parts)
