"""Tables of `bench.complexity`."""

from __future__ import annotations

from typing import Any

from bench.markdown import ms, table


def render(document: dict[str, Any]) -> list[str]:
    """The base point in full, then a table of training steps for each of D, T and K."""
    points = document["points"]
    base = next(point for point in points if all(point[axis] == value for axis, value in document["base"].items()))
    rows = document["settings"]["batch"]
    lines = [f"**D = {base['D']}, T = {base['T']}, K = {base['K']}**", "", *_full(base["models"], rows), ""]
    for axis in dict.fromkeys(point["axis"] for point in points):
        along = [point for point in points if point["axis"] == axis]
        lines += [
            f"**Training step of {rows:,} rows in ms, and thousands of parameters without tables, by {axis}**",
            "",
        ]
        lines += [*_along(axis, along), ""]
    return lines


def _full(models: dict[str, Any], rows: int) -> list[str]:
    head = ["model", "parameters", "with tables", "multiply-adds a row", "everything on every row", "KB a row reads"]
    head += ["predict 1 row, ms", f"predict {rows:,} rows, ms", f"step of {rows:,} rows, ms", "computed by"]
    return table(
        head,
        [
            [
                name,
                f"{one['parameters']:,}",
                f"{one['parameters_with_tables']:,}",
                f"{one['multiply_adds']:,}",
                f"{one['reference_multiply_adds']:,}",
                "-" if one["bytes_read"] is None else f"{one['bytes_read'] / 1e3:,.0f}",
                *(_ms(one, what) for what in ("predict_1", "predict", "step")),
                "eager PyTorch" if one["backend"] == "reference" else "kernels",
            ]
            for name, one in models.items()
        ],
    )


def _along(axis: str, points: list[dict[str, Any]]) -> list[str]:
    names = list(points[0]["models"])
    head = ["model", *(f"{axis} = {point['value']}" for point in points)]
    return table(
        head,
        [
            [
                name,
                *(f"{_ms(p['models'][name], 'step')} ({p['models'][name]['parameters'] / 1e3:,.0f} k)" for p in points),
            ]
            for name in names
        ],
    )


def _ms(one: dict[str, Any], what: str) -> str:
    return ms(one[what]["seconds"]["median"]) if what in one else "-"
