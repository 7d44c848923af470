"""Markdown tables and the way numbers look in them."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, padded so that it reads as plain text too; every column but the first is
    right-aligned.
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(head), line(rule), *map(line, rows)]


def ms(seconds: float) -> str:
    """Milliseconds, to about three digits."""
    if seconds < 1e-3:
        return f"{1e3 * seconds:.3f}"
    return f"{1e3 * seconds:.2f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def percent(share: float | None) -> str:
    """A share, "-" where it is not known."""
    return "-" if share is None else f"{100 * share:.0f} %"


def auc(value: float | None) -> str:
    """An AUC, "-" where it is not defined."""
    return "-" if value is None else f"{value:.5f}"


def times(ratio: float | None) -> str:
    """How many times as much."""
    return "-" if ratio is None else f"{ratio:.2f}x"
