"""Tables of `bench.complexity`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.markdown import ms, table

TIMES = ("predict_1", "predict", "step")


def render(document: dict[str, Any]) -> list[str]:
    """The base point in full, then for each of D, T and K what it does to counts, bytes and times."""
    points, settings = document["points"], document["settings"]
    base = next(point for point in points if all(point[axis] == value for axis, value in document["base"].items()))
    rows = settings["batch"]
    lines = ["A quick run, to see whether it works: its times say nothing.", ""] if settings["quick"] else []
    lines += [f"**D = {base['D']}, T = {base['T']}, K = {base['K']}**", "", *_full(base["models"], rows), ""]
    for axis in dict.fromkeys(point["axis"] for point in points):
        along = [point for point in points if point["axis"] == axis]
        for title, cell in _cells(rows).items():
            lines += [f"**By {axis}: {title}**", "", *_along(axis, along, cell), ""]
    if any("step" not in one for point in points for one in point["models"].values()):
        lines += [f"-: not timed, as a training step would need more than {settings['most_gflop']:g} GFLOP.", ""]
    return lines


def names_along(points: list[dict[str, Any]]) -> list[str]:
    """The models that all points of an axis have: along K those with shared experts."""
    return [name for name in points[0]["models"] if all(name in point["models"] for point in points)]


def _cells(rows: int) -> dict[str, Callable[[dict[str, Any]], str]]:
    """What a cell of a table along an axis holds, by the table's title."""
    return {
        "KB of fp32 weights without tables, all / those a row reads": lambda one: _pair(one, "bytes", "bytes_read"),
        "thousand multiply-adds of a row, as computed / with everything on every row": lambda one: _pair(
            one, "multiply_adds", "reference_multiply_adds"
        ),
        f"ms for `predict` of 1 row / of {rows:,} rows / a training step of {rows:,} rows": lambda one: " / ".join(
            _ms(one, what) for what in TIMES
        ),
    }


def _pair(one: dict[str, Any], first: str, second: str) -> str:
    return f"{one[first] / 1e3:,.0f} / {one[second] / 1e3:,.0f}"


def _full(models: dict[str, Any], rows: int) -> list[str]:
    head = ["model", "parameters", "with tables", "KB", "KB a row reads"]
    head += ["multiply-adds a row", "everything on every row"]
    head += ["predict 1 row, ms", f"predict {rows:,} rows, ms", f"step of {rows:,} rows, ms", "computed by"]
    return table(
        head,
        [
            [
                name,
                f"{one['parameters']:,}",
                f"{one['parameters_with_tables']:,}",
                f"{one['bytes'] / 1e3:,.0f}",
                f"{one['bytes_read'] / 1e3:,.0f}",
                f"{one['multiply_adds']:,}",
                f"{one['reference_multiply_adds']:,}",
                *(_ms(one, what) for what in TIMES),
                "eager PyTorch" if one["backend"] == "reference" else "kernels",
            ]
            for name, one in models.items()
        ],
    )


def _along(axis: str, points: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
    names = names_along(points)
    head = ["model", *(f"{axis} = {point['value']}" for point in points)]
    return table(head, [[name, *(cell(point["models"][name]) for point in points)] for name in names])


def _ms(one: dict[str, Any], what: str) -> str:
    return ms(one[what]["seconds"]["median"]) if what in one else "-"
