"""Domain rules: the domain of a row, from bins of a numeric column or from a column's texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from m3oe_fast.data.columns import as_number
from m3oe_fast.errors import DataError

MAX_WHOLE = 2.0**53  # beyond it, neighbouring whole numbers are one float
MAX_DOMAINS = 65_536  # prepared data holds a domain in at most 16 bits


@dataclass(frozen=True)
class DomainRule:
    """A column and how its values fall into domains 0..D-1.

    Attributes:
        column: the column; None puts every row into one domain, "all".
        edges: increasing; domain i holds edges[i-1] <= value < edges[i]. Empty: no bins.
        texts: without edges, the texts of the domains in order.
    """

    column: str | None = None
    edges: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name in self.names:
            if name in seen:
                raise DataError(f"domain column {self.column}: two domains are called {name}; rename one")
            seen.add(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The D domain names: the texts, or for edges 25,35 "<25", "25-34", ">=35"."""
        if self.column is None:
            return ("all",)
        if not self.edges:
            return self.texts
        inner = map(_bin_name, self.edges, self.edges[1:])
        return (f"<{_edge_name(self.edges[0])}", *inner, f">={_edge_name(self.edges[-1])}")

    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [len(texts)]: the domain of each text, -1 where it has none."""
        if self.edges:
            return self.of_numbers(np.array([as_number(text) for text in texts], np.float64))
        place = {text: index for index, text in enumerate(self.texts)}
        return np.array([place.get(text, -1) for text in texts], np.int32)

    def of_numbers(self, numbers: np.ndarray) -> np.ndarray:
        """int32 [N]: the bin of each number (float64 [N]), -1 where it is NaN."""
        bins = np.searchsorted(self.edges, numbers, side="right").astype(np.int32)
        bins[np.isnan(numbers)] = -1
        return bins

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"column": self.column, "edges": list(self.edges), "texts": list(self.texts)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DomainRule:
        """The inverse of ``to_dict``."""
        return cls(values["column"], tuple(values["edges"]), tuple(values["texts"]))


def parse_bins(text: str) -> tuple[float, ...]:
    """Edges from ``25,35``.

    Raises:
        DataError: not numbers, or not increasing.
    """
    return check_edges(tuple(as_number(part.strip()) for part in text.split(",")), f"--domain_bins {text!r}")


def check_edges(edges: tuple[float, ...], where: str) -> tuple[float, ...]:
    """``edges``, if they are finite and increase; ``where`` is for messages.

    Raises:
        DataError: they are not.
    """
    if not np.isfinite(edges).all():
        raise DataError(f"{where}: not numbers; write edges such as 25,35")
    if any(low >= high for low, high in pairwise(edges)):
        raise DataError(f"{where}: the edges must increase; write them as in 25,35")
    return edges


def _bin_name(low: float, high: float) -> str:
    if not (_is_whole(low) and _is_whole(high)):
        return f"{_edge_name(low)}..{_edge_name(high)}"
    return _edge_name(low) if high == low + 1 else f"{_edge_name(low)}-{_edge_name(high - 1)}"


def _edge_name(edge: float) -> str:
    return str(int(edge)) if _is_whole(edge) else repr(float(edge))


def _is_whole(edge: float) -> bool:
    return float(edge).is_integer() and abs(edge) < MAX_WHOLE
