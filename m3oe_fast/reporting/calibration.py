"""Reliability curves: is what the model calls 30 % seen in 30 % of the rows?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from m3oe_fast.reporting.sample import Scored
from m3oe_fast.reporting.style import COLOURS, Drawn, Pair, blank, legend_below, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, TITLE = "calibration", "Calibration"
BINS = 10
ROWS_PER_BIN = 20  # fewer rows have fewer bins
MAX_PANELS = 12


@dataclass(frozen=True)
class Curve:
    """The reliability of one pair in bins of (nearly) equal counts, in order of the prediction.

    Attributes:
        predicted, observed: float64 [bins], mean probability and share of positives.
        low, high: float64 [bins], 95 % interval of ``observed`` (Wilson).
        rows, positives: labelled rows and positives.
        ratio: sum of the predictions by the number of positives, NaN without positives.
    """

    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    rows: int
    positives: int
    ratio: float


def curve(probability: np.ndarray, label: np.ndarray) -> Curve | None:
    """The curve of n rows, float [n] each, labels 0, 1 or NaN; None without labelled rows or with scores not finite."""
    observed = ~np.isnan(label)
    probability, label = probability[observed].astype(np.float64), label[observed].astype(np.float64)
    if not len(label) or not np.isfinite(probability).all():
        return None
    order = np.argsort(probability, kind="stable")
    bins = np.array_split(order, min(BINS, max(len(label) // ROWS_PER_BIN, 1)))
    counts = np.array([len(rows) for rows in bins], dtype=np.float64)
    share = np.array([label[rows].mean() for rows in bins])
    low, high = _wilson(share, counts)
    positives = int(label.sum())
    return Curve(
        np.array([probability[rows].mean() for rows in bins]),
        share,
        low,
        high,
        len(label),
        positives,
        float(probability.sum()) / positives if positives else math.nan,
    )


def curves(scored: Scored, domains: Sequence[str], tasks: Sequence[str]) -> dict[Pair, Curve | None]:
    """The curve of every pair."""
    found = {}
    for d, domain in enumerate(domains):
        rows = np.flatnonzero(scored.domain == d)
        for t, task in enumerate(tasks):
            found[Pair(domain, task)] = curve(scored.probability[rows, t], scored.label[rows, t])
    return found


def draw(found: dict[Pair, Curve | None], scored: Scored) -> Drawn:
    """A panel per pair, those with most labelled rows where there are many."""
    defined = {pair: curve for pair, curve in found.items() if curve is not None}
    if not defined:
        return Drawn(NAME, TITLE, "no pair has a labelled test row with a finite score")
    largest = sorted(defined, key=lambda pair: -defined[pair].rows)[:MAX_PANELS]
    shown = [pair for pair in defined if pair in largest]
    shown, columns = _arranged(shown)
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(max(0.7 + 2.35 * columns, 4.6), 0.7 + 2.5 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, object] = {}
    for place, (axes, pair) in enumerate(zip(panels.flat, shown, strict=False)):
        handles = _panel(axes, pair, defined[pair])
        if place % columns == 0:
            axes.set_ylabel("share of positives")
        if place + columns >= len(shown):
            axes.set_xlabel("predicted probability")
    for axes in panels.flat[len(shown) :]:
        blank(axes, "")
    legend_below(figure, list(handles.values()), list(handles))
    return Drawn(NAME, TITLE, _caption(found, defined, shown, scored), figure)


def _arranged(shown: Sequence[Pair]) -> tuple[list[Pair], int]:
    """The panels in their order, and how many stand in a row: one per domain where that fills them, else four."""
    domains = list(dict.fromkeys(pair.domain for pair in shown))
    tasks = list(dict.fromkeys(pair.task for pair in shown))
    if 2 <= len(domains) <= 4 and len(shown) == len(domains) * len(tasks):
        return [Pair(domain, task) for task in tasks for domain in domains], len(domains)
    return list(shown), min(len(shown), 4)


def _panel(axes: Axes, pair: Pair, curve: Curve) -> dict[str, object]:
    top = float(min(max(curve.predicted.max(), curve.high.max()) * 1.06, 1.0)) or 1.0
    diagonal = axes.plot([0, top], [0, top], color="#888888", linewidth=1, linestyle="--")[0]
    error = np.abs(np.stack([curve.low, curve.high]) - curve.observed)
    bars = axes.errorbar(
        curve.predicted, curve.observed, error, color=COLOURS[0], marker="o", markersize=4, linewidth=1.2, elinewidth=1
    )
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_aspect("equal")
    axes.locator_params(nbins=4)
    per_bin = curve.rows // len(curve.observed)
    axes.set_title(
        f"{short(pair.domain, 16)} · {short(pair.task, 14)}\n{curve.rows:,} rows, {per_bin:,} per bin", fontsize=8.5
    )
    return {"predicted = observed": diagonal, "bin with 95 % interval": bars}


def _wilson(share: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % interval of a share among ``count`` rows; it stays within 0 and 1 and has a width at both ends."""
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return np.minimum(centre - half, share).clip(0), np.maximum(centre + half, share).clip(max=1)


def _caption(found: dict[Pair, Curve | None], defined: dict[Pair, Curve], shown: Sequence[Pair], scored: Scored) -> str:
    text = "Test rows by prediction, in bins of equal counts; points below the diagonal were predicted too high. "
    ratios = {pair: curve.ratio for pair, curve in defined.items() if not math.isnan(curve.ratio)}
    if ratios:
        low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
        text += "Predicted by observed positives: "
        if low == high:
            text += f"{ratios[low]:.3f}."
        else:
            text += f"from {ratios[low]:.3f} ({short(low.key, 40)}) to {ratios[high]:.3f} ({short(high.key, 40)})."
    if not scored.whole:
        text += f" {len(scored.domain):,} of {scored.of:,} test rows were drawn."
    if len(shown) < len(defined):
        text += f" Of {len(defined)} pairs the {len(shown)} with most labelled rows are shown."
    if len(defined) < len(found):
        count = len(found) - len(defined)
        text += f" {count} {'pair has' if count == 1 else 'pairs have'} no labelled test row with a finite score."
    return text
