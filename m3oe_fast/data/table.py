"""Rows in columns, mapped or in memory, and the batch that they make.

``take`` and ``joined`` are the only ways from stored rows to rows of their own memory, for a batch as for the
window of a reader; none of them goes row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import Columns

Copy: TypeAlias = Callable[[np.ndarray, np.ndarray], None]
"""Copies the second array into the first, of the same shape and dtype: ``np.copyto``, or past the mapping of a file."""


@dataclass(frozen=True)
class Table:
    """n rows as a part's file holds them (see ``store``).

    Attributes:
        ids: F unsigned arrays [n], the schema's fields.
        dense: float32 [n,C].
        domain: unsigned [n].
        label: float32 [n,T].
        weight: float32 [n], None where rows have none.
        bags: for each bag its values uint32 [m] and offsets [n+1] into them, which need not begin with 0.
    """

    ids: tuple[np.ndarray, ...]
    dense: np.ndarray
    domain: np.ndarray
    label: np.ndarray
    weight: np.ndarray | None = None
    bags: tuple[tuple[np.ndarray, np.ndarray], ...] = ()

    @classmethod
    def of(cls, columns: Columns, schema: Schema) -> Table:
        """The columns of ``schema``; all of them must be there."""
        domain = columns["domain"]
        return cls(
            tuple(columns[f"id:{field}"] for field in schema.fields),
            columns["dense"] if schema.dense else np.empty((len(domain), 0), np.float32),
            domain,
            columns["label"],
            columns["weight"] if schema.weighted else None,
            tuple(columns[f"bag:{name}"] for name in schema.bags),
        )

    def __len__(self) -> int:
        return len(self.domain)

    def rows(self, start: int, stop: int) -> Table:
        """The rows start .. stop-1, as views."""
        cut = slice(start, stop)
        return Table(
            tuple(column[cut] for column in self.ids),
            self.dense[cut],
            self.domain[cut],
            self.label[cut],
            None if self.weight is None else self.weight[cut],
            tuple((values, offsets[start : stop + 1]) for values, offsets in self.bags),
        )

    def take(self, rows: np.ndarray) -> Table:
        """The rows numbered ``rows`` (int [B], in any order), in memory of their own."""
        return Table(
            tuple(column.take(rows) for column in self.ids),
            self.dense.take(rows, axis=0),  # ten times as fast as dense[rows]
            self.domain.take(rows),
            self.label.take(rows, axis=0),
            None if self.weight is None else self.weight.take(rows),
            tuple(take_bag(values, offsets, rows) for values, offsets in self.bags),
        )

    def to_batch(self) -> Batch:
        """The rows as a batch, which shares memory with them: only for what ``take`` and ``joined`` return."""
        ids = np.empty((len(self), len(self.ids)), np.int32)
        for place, column in enumerate(self.ids):
            ids[:, place] = column
        bags = [(values.astype(np.int64), offsets.astype(np.int64)) for values, offsets in self.bags]
        return Batch.from_numpy(ids, self.dense, self.domain.astype(np.int64), self.label, self.weight, bags)


def joined(pieces: Sequence[Table], copy: Copy = np.copyto) -> Table:
    """The rows of all pieces (at least one, of the same columns), piece after piece, in memory of their own."""
    first = pieces[0]
    return Table(
        tuple(stacked(columns, copy) for columns in zip(*(piece.ids for piece in pieces), strict=True)),
        stacked([piece.dense for piece in pieces], copy),
        stacked([piece.domain for piece in pieces], copy),
        stacked([piece.label for piece in pieces], copy),
        None if first.weight is None else stacked([piece.weight for piece in pieces], copy),
        tuple(_join_bag([piece.bags[place] for piece in pieces], copy) for place in range(len(first.bags))),
    )


def stacked(columns: Sequence[np.ndarray], copy: Copy = np.copyto) -> np.ndarray:
    """One column, [n] or [n,width], from its pieces, in memory of its own."""
    out = np.empty((sum(map(len, columns)), *columns[0].shape[1:]), columns[0].dtype)
    start = 0
    for column in columns:
        copy(out[start : start + len(column)], column)
        start += len(column)
    return out


def take_bag(values: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows numbered ``rows`` (int [B]) of a bag: values [m] and offsets int64 [B+1]."""
    first, lengths = offsets[rows].astype(np.int64), (offsets[1:][rows] - offsets[rows]).astype(np.int64)
    taken = np.concatenate([[0], np.cumsum(lengths)])
    # Value j of row b lies at first[b] + j, and goes to taken[b] + j.
    places = np.repeat(first - taken[:-1], lengths) + np.arange(taken[-1])
    return values[places], taken


def _join_bag(pieces: Sequence[tuple[np.ndarray, np.ndarray]], copy: Copy) -> tuple[np.ndarray, np.ndarray]:
    offsets = [stacked([ends], copy).astype(np.int64) for _, ends in pieces]
    values = [column[ends[0] : ends[-1]] for (column, _), ends in zip(pieces, offsets, strict=True)]
    lengths = np.concatenate([np.diff(ends) for ends in offsets])
    return stacked(values, copy), np.concatenate([[0], np.cumsum(lengths)])
