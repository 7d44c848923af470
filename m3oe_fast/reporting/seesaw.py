"""Who gains and who loses against models of one domain and one task: the seesaw that M3oE is to level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m3oe_fast.reporting.style import COLOURS, Drawn, new_figure, short

NAME, TITLE = "seesaw", "Gain over models of one domain and one task"
MAX_BARS = 24


def draw(seesaw: Mapping[str, Any] | None) -> Drawn:
    """Bars of the change in test AUC, the best pair on top; of many pairs the best and the worst."""
    if seesaw is None:
        return Drawn(NAME, TITLE, "seesaw.json is missing: the report with --seesaw trains the baselines and writes it")
    pairs = seesaw.get("pairs")
    changes = _changes(pairs) if isinstance(pairs, Mapping) else {}
    if not changes:
        return Drawn(NAME, TITLE, "seesaw.json holds no pair with both AUCs defined")
    order = sorted(changes, key=lambda key: -changes[key])
    shown = order if len(order) <= MAX_BARS else order[: MAX_BARS // 2] + order[-MAX_BARS // 2 :]
    figure = new_figure(8, 1.1 + 0.28 * len(shown))
    axes = figure.subplots()
    values = [100 * changes[key] for key in shown]
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    axes.barh(range(len(shown)), values, color=colours, height=0.7)
    axes.axvline(0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(shown)), [short(key.replace("/", " · "), 34) for key in shown])
    axes.invert_yaxis()
    axes.set_xlabel("change in test AUC (points of 0.01): right, M3oE is better; left, the pair's own model")
    axes.grid(axis="y", visible=False)
    for place, value in enumerate(values):
        axes.annotate(
            f"{value:+.2f}",
            (value, place),
            xytext=(4 if value >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if value >= 0 else "right",
            va="center",
            fontsize=8,
        )
    axes.margins(x=0.14)
    return Drawn(NAME, TITLE, _caption(changes, order, shown, len(pairs)), figure)


def _changes(pairs: Mapping[str, Any]) -> dict[str, float]:
    found = {key: value.get("difference") for key, value in pairs.items() if isinstance(value, Mapping)}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _caption(changes: Mapping[str, float], order: Sequence[str], shown: Sequence[str], total: int) -> str:
    gain, lose = (sum(sign * value > 0 for value in changes.values()) for sign in (1, -1))
    mean = 100 * sum(changes.values()) / len(changes)
    worst, best = (f"{100 * changes[key]:+.2f} ({short(key, 40)})" for key in (order[-1], order[0]))
    text = (
        f"{gain} of {len(changes)} pairs gain and {lose} lose against a model of the same configuration that was "
        f"trained on that domain's rows and that label alone; {mean:+.2f} points on average, from {worst} to {best}. "
        "One seed: small changes are noise."
    )
    if len(shown) < len(order):
        text += f" The {MAX_BARS // 2} best and the {MAX_BARS // 2} worst pairs are shown."
    if total > len(changes):
        text += f" {total - len(changes)} pairs are left out, as an AUC is undefined."
    return text
