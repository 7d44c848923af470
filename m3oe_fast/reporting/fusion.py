"""The fusion weights alpha and beta over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from m3oe_fast.reporting.style import COLOURS, GREY, INK, LINES, Drawn, new_figure, short, whole_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from m3oe_fast.reporting.record import RunRecord

NAME, TITLE = "fusion", "Fusion weights by step"
_MEANING = {
    "alpha_domain": "weight of the domain part",
    "alpha_task": "weight of the task part",
    "beta_domain": "own domain against the others",
    "beta_task": "own task against the others",
}
MAX_LINES = 6

Group = Mapping[str, np.ndarray]


def draw(run: RunRecord) -> Drawn:
    """A panel per fusion weight: a line per value, or the range where there are many."""
    steps, columns, source = run.fusion()
    groups = {name: {k: v for k, v in columns.items() if k.partition("/")[0] == name} for name in _MEANING}
    groups = {name: group for name, group in groups.items() if group}
    if not groups or not len(steps):
        return Drawn(NAME, TITLE, "neither fusion.csv nor metrics.csv holds fusion weights")
    figure = new_figure(10, 3.0 if all(len(group) == 1 for group in groups.values()) else 3.8)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (name, group) in zip(panels, groups.items(), strict=True):
        _panel(axes, steps, group)
        axes.set_title(f"{name}\n{_MEANING[name]}", fontsize=9)
        axes.set_xlabel("step" if source == "fusion.csv" else "epoch")
        whole_steps(axes, most=5)
        axes.margins(x=0.04 if len(steps) > 1 else 0.5)
    panels[0].set_ylabel("weight (sigmoid, 0 to 1)")
    return Drawn(NAME, TITLE, _caption(groups, steps, source), figure)


def _panel(axes: Axes, steps: np.ndarray, group: Group) -> None:
    dots = {"marker": "o" if len(steps) <= 12 else None, "markersize": 3}
    if len(group) <= MAX_LINES:
        for place, (key, values) in enumerate(group.items()):
            look = {"color": COLOURS[place % len(COLOURS)], "linestyle": LINES[place % len(LINES)]}
            axes.plot(steps, values, label=_label(key), **(look if len(group) > 1 else {"color": COLOURS[0]}), **dots)
    else:
        values = np.array(list(group.values()))
        low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
        axes.fill_between(steps, low, high, color=GREY, alpha=0.45, linewidth=0, label=f"range of {len(group)}")
        axes.plot(steps, np.nanmean(values, axis=0), color=INK, linewidth=2, label="mean", **dots)
    if len(group) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), fontsize=8)


def _label(key: str) -> str:
    return "\u200b" + short(key.partition("/")[2].replace("/", " · "), 24)


def _caption(groups: Mapping[str, Group], steps: np.ndarray, source: str) -> str:
    parts = []
    for name, group in groups.items():
        first, last = (float(np.nanmean([values[end] for values in group.values()])) for end in (0, -1))
        mean = "" if len(group) == 1 else f" (mean of {len(group)})"
        parts.append(f"{name}{mean} {first:.3f} to {last:.3f}")
    text = f"First to last value: {'; '.join(parts)}."
    values = np.concatenate([column for group in groups.values() for column in group.values()])
    if np.nanmax(values) == np.nanmin(values):
        text += " They never moved."
    elif np.nanmax(values) - np.nanmin(values) < 0.02:
        text += " Mind the axis: they have hardly moved."
    many = [name for name, group in groups.items() if len(group) > MAX_LINES]
    if many:
        text += f" {', '.join(many)} hold too many values for a line each, so range and mean are shown."
    if source != "fusion.csv":
        text += " fusion.csv is missing or unreadable: one point per epoch, from metrics.csv."
    elif len(steps) == 1:
        text += " There is one record only."
    return text
