"""t-SNE of what the experts make of a row: the shared, domain and task part, and their fused sum (paper, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from m3oe_fast.reporting.sample import SEED, Inside
from m3oe_fast.reporting.style import COLOURS, GREY, MARKERS, Drawn, blank, legend_below, new_figure, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, TITLE = "embeddings", "Embeddings of the experts"
PERPLEXITY = 30
NEIGHBOURS = 10
LEAST = 8  # rows below which neighbourhoods say nothing


def draw(inside: Inside, domains: Sequence[str], tasks: Sequence[str]) -> Drawn:
    """Four panels; a point is a row with one of its tasks, chosen in turn."""
    n = len(inside.domain)
    if n < LEAST:
        return Drawn(NAME, TITLE, f"{n} test rows are too few for t-SNE, which needs {LEAST}")
    task = np.random.default_rng(SEED).permutation(n) % len(tasks)
    rows = np.arange(n)
    by_domain = _Classes("domain", domains, inside.domain)
    by_task = _Classes("task", tasks, task)
    either = by_domain if len(domains) > 1 else by_task
    panels = (
        ("shared part", inside.shared[rows, task], either),
        ("domain part", inside.of_domain[rows, task], either),
        ("task part", inside.of_task[rows, task], by_task),
        ("fused", inside.fused[rows, task], either),
    )
    shaped = len(domains) > 1 < len(tasks)
    figure = new_figure(9, 8.4)
    said, handles = [], {}
    for axes, (title, values, classes) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        shape = by_task if shaped and title == "fused" else None
        axes.set_title(f"{title}, coloured by {classes.what}" + ("" if shape is None else ", shape by task"))
        if title == "shared part" and not inside.gates.shape[2]:
            blank(axes, "no shared experts (K = 0)")
            continue
        if not np.isfinite(values).all() or not values.std(axis=0).any():
            blank(axes, "all points are the same" if np.isfinite(values).all() else "values are not finite")
            continue
        handles |= _scatter(axes, _project(values), classes, shape)
        said.append(_neighbourhood(title, values, classes))
    legend_below(figure, list(handles.values()), list(handles), columns=4)
    return Drawn(NAME, TITLE, _caption(n, said, domains, tasks), figure)


class _Classes:
    """The class of every point, by name; beyond the palette the rarer ones are one grey class."""

    def __init__(self, what: str, names: Sequence[str], of: np.ndarray) -> None:
        self.what, self.names, self.of = what, names, of
        counts = np.bincount(of, minlength=len(names))
        self.present = int((counts > 0).sum())
        order = np.argsort(-counts, kind="stable")
        palette = COLOURS if what == "domain" else COLOURS[::-1]
        self.shown = np.sort(order[: len(palette)])
        self.colours = dict(zip(self.shown.tolist(), palette, strict=False))
        self.hidden = len(names) - len(self.shown)


def _project(values: np.ndarray) -> np.ndarray:
    """float32 [n, X] to [n, 2]; the same every time."""
    from sklearn.manifold import TSNE

    perplexity = min(PERPLEXITY, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=SEED, max_iter=750).fit_transform(values)


def _scatter(axes: Axes, points: np.ndarray, classes: _Classes, shape: _Classes | None) -> dict[str, object]:
    from matplotlib.lines import Line2D

    handles: dict[str, object] = {}
    # In the order of the rows, so that no class lies on top of the others.
    colour = np.array([classes.colours.get(int(c), GREY) for c in classes.of])
    for s in range(1 if shape is None else len(shape.names)):
        mine = slice(None) if shape is None else shape.of == s
        marker = "o" if shape is None else MARKERS[s % len(MARKERS)]
        axes.scatter(*points[mine].T, c=colour[mine], marker=marker, s=9, alpha=0.75, linewidths=0)
        if shape is not None and len(shape.names) <= len(MARKERS):
            key = f"task {short(shape.names[s], 16)} (shape)"
            handles[key] = Line2D([], [], color="#666666", marker=marker, linestyle="")
    for c in classes.shown:
        key = f"{classes.what} {short(classes.names[c], 16)}"
        handles[key] = Line2D([], [], color=classes.colours[int(c)], marker="o", linestyle="")
    if classes.hidden:
        handles[f"{classes.hidden} other {classes.what}s"] = Line2D([], [], color=GREY, marker="o", linestyle="")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(True)
    return handles


def _neighbourhood(title: str, values: np.ndarray, classes: _Classes) -> str:
    """How often the nearest neighbours of a point, before t-SNE, are of its class, and how often by chance."""
    from sklearn.neighbors import NearestNeighbors

    if classes.present < 2:
        return ""
    k = min(NEIGHBOURS, len(values) - 1)
    near = NearestNeighbors(n_neighbors=k).fit(values).kneighbors(return_distance=False)
    same = float((classes.of[near] == classes.of[:, None]).mean())
    counts = np.bincount(classes.of)
    chance = float((counts * (counts - 1)).sum() / (len(values) * (len(values) - 1)))
    return f"{title} {same:.0%} of the same {classes.what} ({chance:.0%} by chance)"


def _caption(n: int, said: Sequence[str], domains: Sequence[str], tasks: Sequence[str]) -> str:
    text = (
        f"t-SNE of {n:,} test rows, drawn evenly from the domains, each for one of its tasks. The axes have no "
        "unit: only who is near whom means something. "
    )
    if said := [line for line in said if line]:
        text += f"Among the {NEIGHBOURS} nearest neighbours before the projection are: {'; '.join(said)}."
    if len(domains) > len(COLOURS):
        rest = len(domains) - len(COLOURS)
        text += f" The {len(COLOURS)} domains with most points have colours, the other {rest} are grey."
    if len(tasks) > len(MARKERS):
        text += f" {len(tasks)} tasks are too many for shapes of their own."
    return text.rstrip()
