"""How much of the shared experts each (domain, task) pair uses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3oe_fast.reporting.sample import Inside
from m3oe_fast.reporting.style import Drawn, Pair, new_figure, short

NAME, TITLE = "gates", "Use of the shared experts"
MAX_ROWS = 24
MAX_NUMBERS = 16  # experts beside each other up to which the cells hold their number


def draw(inside: Inside, domains: Sequence[str], tasks: Sequence[str]) -> Drawn:
    """A heat map of the mean softmax gate, a row per pair and a column per expert."""
    experts = inside.gates.shape[2]
    if not experts:
        return Drawn(NAME, TITLE, "the model has no shared experts (K = 0), so nothing is gated")
    pairs, means, rows = mean_gates(inside, domains, tasks)
    if not pairs:
        return Drawn(NAME, TITLE, "no row was drawn")
    total = len(pairs)
    if total > MAX_ROWS:
        # The pairs whose gates choose most, in the order of the schema.
        chosen = np.sort(np.argsort(-means.max(axis=1), kind="stable")[:MAX_ROWS])
        pairs, means = [pairs[i] for i in chosen], means[chosen]
    figure = new_figure(min(10.0, 4.2 + 0.62 * experts), 1.4 + 0.3 * len(pairs))
    axes = figure.subplots()
    top = float(means.max())
    image = axes.imshow(means, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(experts), [str(k + 1) for k in range(experts)])
    axes.set_yticks(range(len(pairs)), [f"{short(pair.domain, 18)} · {short(pair.task, 18)}" for pair in pairs])
    axes.set_xlabel("shared expert")
    axes.set_ylabel("domain · task")
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if experts <= MAX_NUMBERS:
        for (row, column), value in np.ndenumerate(means):
            ink = "white" if value < 0.55 * top else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    figure.colorbar(image, ax=axes, label="mean gate (sums to 1 in a row)", shrink=min(1.0, 3 / len(pairs) + 0.4))
    return Drawn(NAME, TITLE, _caption(pairs, means, rows, total), figure)


def mean_gates(inside: Inside, domains: Sequence[str], tasks: Sequence[str]) -> tuple[list[Pair], np.ndarray, int]:
    """The pairs that have rows, their mean gates float64 [pairs, K], and the number of rows in all."""
    pairs, means = [], []
    for d, domain in enumerate(domains):
        own = inside.gates[inside.domain == d]
        if len(own):
            pairs += [Pair(domain, task) for task in tasks]
            means += list(own.mean(axis=0, dtype=np.float64))
    return pairs, np.array(means), len(inside.domain)


def _caption(pairs: Sequence[Pair], means: np.ndarray, rows: int, total: int) -> str:
    experts = means.shape[1]
    text = f"Mean of the softmax gate over {rows:,} test rows, drawn evenly from the domains. "
    if experts == 1:
        text += "There is one shared expert, so every gate is 1."
    else:
        row, column = np.unravel_index(int(means.argmax()), means.shape)
        text += (
            f"An even use would be {1 / experts:.2f} everywhere; the strongest preference is "
            f"{short(pairs[row].key, 40)} for expert {column + 1} ({means[row, column]:.2f})."
        )
        share = means.mean(axis=0)
        unused = [str(k + 1) for k in np.flatnonzero(share < 0.1 / experts)]
        if unused:
            text += f" Hardly used at all: expert {', '.join(unused)}."
    if total > len(pairs):
        text += f" Of {total} pairs the {len(pairs)} with the strongest preferences are shown."
    return text
