"""Loss, AUC and logloss by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from m3oe_fast.reporting.style import (
    COLOURS,
    INK,
    Drawn,
    Pair,
    colours_of,
    legend_below,
    new_figure,
    short,
    tell_apart,
    whole_steps,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from m3oe_fast.reporting.record import RunRecord

NAME, TITLE = "curves", "Loss and validation scores by epoch"
_SCORES = (("auc", "validation AUC"), ("logloss", "validation logloss (nats)"))


def draw(run: RunRecord) -> Drawn:
    """Three panels over the finished epochs: training loss, validation AUC, validation logloss."""
    if not run.epochs:
        return Drawn(NAME, TITLE, f"no epoch in {run.root.name}/metrics.csv")
    figure = new_figure(10, 3.7)
    loss, *panels = figure.subplots(1, 3)
    epochs = run.column("epoch")
    loss.plot(epochs, run.column("train_loss"), color=INK, marker="o")
    loss.set_ylabel("training loss (sum over pairs, nats)")
    handles = {}
    for axes in (loss, *panels):
        axes.set_xlabel("epoch")
        whole_steps(axes)
        axes.margins(x=0.04 if len(epochs) > 1 else 0.5)
        if run.best_epoch:
            handles["best epoch"] = axes.axvline(run.best_epoch, color="#888888", linewidth=1, linestyle=(0, (1, 2)))
    for axes, (metric, label) in zip(panels, _SCORES, strict=True):
        handles |= _scores(axes, run, metric)
        axes.set_ylabel(label)
    legend_below(figure, list(handles.values()), list(handles))
    return Drawn(NAME, TITLE, _caption(run), figure)


def _scores(axes: Axes, run: RunRecord, metric: str) -> dict[str, object]:
    """Plot the pairs and their mean; returns the legend's entries."""
    epochs, handles = run.column("epoch"), {}
    values = {pair: run.column(f"val_{metric}/{pair.key}") for pair in run.pairs}
    if tell_apart(run.domains, run.tasks):
        if len(run.pairs) > 1:
            for pair, style in colours_of(run.domains, run.tasks).items():
                handles[_name(pair)] = axes.plot(epochs, values[pair], alpha=0.9, linewidth=1.1, **style)[0]
    elif run.pairs:
        handles |= _band(axes, epochs, np.array(list(values.values())))
    mean = axes.plot(epochs, run.column(f"val_{metric}/mean"), color=INK, linewidth=2.2, marker="o")[0]
    return {_name(run.pairs[0]) if len(run.pairs) == 1 else "mean of the pairs": mean, **handles}


def _band(axes: Axes, epochs: np.ndarray, values: np.ndarray) -> dict[str, object]:
    """Lowest to highest and the middle half of many pairs, [pairs, epochs]."""
    handles = {}
    for name, low, high, alpha in (("all pairs", 0, 100, 0.18), ("middle half of the pairs", 25, 75, 0.35)):
        edges = [[_percentile(column, share) for column in values.T] for share in (low, high)]
        handles[name] = axes.fill_between(epochs, *edges, color=COLOURS[0], alpha=alpha, linewidth=0)
    return handles


def _percentile(values: np.ndarray, share: float) -> float:
    defined = values[~np.isnan(values)]
    return float(np.percentile(defined, share)) if len(defined) else math.nan


def _name(pair: Pair) -> str:
    return f"{short(pair.domain, 16)} · {short(pair.task, 16)}"


def _caption(run: RunRecord) -> str:
    loss, auc = run.column("train_loss"), run.column("val_auc/mean")
    parts = []
    if len(loss) == 1:
        parts.append(f"One epoch: training loss {loss[0]:.4f}.")
    else:
        parts.append(f"The training loss goes from {loss[0]:.4f} to {loss[-1]:.4f} in {len(loss)} epochs.")
    if run.best_epoch and not np.isnan(best := _at(run, auc)):
        after = int((run.column("epoch") > run.best_epoch).sum())
        later = "epoch after it was" if after == 1 else f"{after} epochs after it were"
        tail = f"; the {later} no better" if after else ", the last one"
        parts.append(f"The mean validation AUC is best in epoch {run.best_epoch} ({best:.4f}){tail}.")
    elif np.isnan(auc).all():
        parts.append("No epoch has a defined validation AUC.")
    if not tell_apart(run.domains, run.tasks):
        parts.append(f"{len(run.pairs)} pairs are too many for a line each, so bands show their range.")
    return " ".join(parts)


def _at(run: RunRecord, values: Sequence[float]) -> float:
    place = np.flatnonzero(run.column("epoch") == run.best_epoch)
    return float(values[place[0]]) if len(place) else math.nan
