"""Features of rows as columns of arrays, and a table of them that other rows name by a key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from m3oe_fast.data.feature_lines import Features, Lines

Columns = dict[str, np.ndarray]
"""n rows: a single field int32 [n], -1 for none; a bag int32 [n,most], its values in front and -1 behind them; the
value of a field (see ``value_name``) float64 [n], NaN for none."""


@dataclass(frozen=True)
class FieldNames:
    """Which fields to keep.

    Attributes:
        single: with one id in a row.
        bags: with several.
        valued: those of both whose values are kept too.
        most: ids of a bag that are kept.
    """

    single: tuple[str, ...]
    bags: tuple[str, ...]
    valued: tuple[str, ...]
    most: int

    @cached_property
    def texts(self) -> tuple[bytes, ...]:
        """All of them as the file writes them."""
        return tuple(name.encode() for name in (*self.single, *self.bags))

    @cached_property
    def with_values(self) -> tuple[bytes, ...]:
        """Those whose values must be read: bags keep their ids of the greatest value."""
        return tuple(name.encode() for name in dict.fromkeys((*self.valued, *self.bags)))


def value_name(field: str) -> str:
    """The column of a field's value."""
    return f"D{field}"


def fold(lines: Lines, names: FieldNames) -> Columns:
    """The features of ``lines`` as columns.

    Of a field with one id the first in the row counts. A bag keeps its ``most`` ids of the greatest value, equal ones
    as in the file; the value of a bag is the mean over all its ids.

    Raises:
        DataError: as ``Lines.features``.
    """
    rows = len(lines)
    features = lines.features(names.texts, names.with_values)
    columns: Columns = {}
    for place, name in enumerate(names.single):
        found = features.of(place)
        columns[name] = _first(found.row, found.id, np.full(rows, -1, np.int32))
        if name in names.valued:
            columns[value_name(name)] = _first(found.row, found.value, np.full(rows, np.nan))
    for place, name in enumerate(names.bags, start=len(names.single)):
        found = features.of(place)
        columns[name] = _greatest(found, np.full((rows, names.most), -1, np.int32))
        if name in names.valued:
            columns[value_name(name)] = _mean(found, rows)
    return columns


def stack(blocks: Sequence[Columns]) -> Columns:
    """The rows of all blocks, of which there is at least one; columns in which no row has anything are left out."""
    whole: Columns = {}
    for name in list(blocks[0]):
        column = np.concatenate([block.pop(name) for block in blocks])  # popped: no column is there twice for long
        if not _lacks(column).all():
            whole[name] = column
    return whole


def fill_in(columns: Columns, table: Columns, place: np.ndarray) -> None:
    """Give rows what they lack from the row ``place`` (int64 [n]) of ``table``, which may hold fewer columns."""
    for name, theirs in table.items():
        lacking = np.flatnonzero(_lacks(columns[name]))
        columns[name][lacking] = theirs[place[lacking]]


def to_arrow(column: np.ndarray) -> pa.Array:
    """A column of ``Columns`` with null for no id and 0 for no value; a bag becomes lists."""
    if column.dtype.kind == "f":
        return pa.array(np.where(np.isnan(column), 0.0, column))
    held = column >= 0
    if column.ndim == 1:
        return pa.array(column, mask=~held)
    offsets = np.zeros(len(column) + 1, np.int32)
    np.cumsum(held.sum(axis=1), out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(column[held]))


class Places:
    """Which row of a table a key names; of equal keys the last counts.

    Args:
        keys: bytes [k], k >= 1.
    """

    def __init__(self, keys: np.ndarray) -> None:
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def of(self, keys: np.ndarray) -> np.ndarray:
        """int64 [n] for bytes [n]; -1 for an unknown key."""
        same = keys.astype(self._keys.dtype)  # of another length, searchsorted would copy the table
        found = np.searchsorted(self._keys, same, side="right") - 1
        known = (found >= 0) & (self._keys[found] == same) & (same == keys)
        return np.where(known, self._order[found], -1)


def _first(row: np.ndarray, values: np.ndarray, out: np.ndarray) -> np.ndarray:
    out[row[::-1]] = values[::-1]  # of several assignments to one place, the last stays
    return out


def _greatest(bag: Features, out: np.ndarray) -> np.ndarray:
    order = np.lexsort((-bag.value, bag.row))  # rows increase already, so bag.row is not changed by it
    rank = np.arange(len(order)) - np.searchsorted(bag.row, bag.row)
    kept = rank < out.shape[1]
    out[bag.row[kept], rank[kept]] = bag.id[order][kept]
    return out


def _mean(bag: Features, rows: int) -> np.ndarray:
    count = np.bincount(bag.row, minlength=rows)
    total = np.bincount(bag.row, bag.value, minlength=rows)
    return np.divide(total, count, out=np.full(rows, np.nan), where=count > 0)


def _lacks(column: np.ndarray) -> np.ndarray:
    """bool [n]: whether a row has nothing."""
    return np.isnan(column) if column.dtype.kind == "f" else (column if column.ndim == 1 else column[:, 0]) < 0
