"""A log whose rows take columns from tables of their users or items, joined while it streams.

    log.csv    user_id, video_id, is_click     ->  user_id, video_id, is_click, degree, author_id
    users.csv  user_id, degree
    videos.csv video_id, author_id

The log is never in memory; of a side table memory holds the columns that are joined, 4 bytes a row and each distinct
text once. Rows without a partner have no value there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from m3oe_fast.data.arrow_columns import is_text
from m3oe_fast.data.log_files import LogFile
from m3oe_fast.errors import DataError

SMALL_DICTIONARY = 1 << 12  # texts that it costs little to hand on with every batch


class SideTable:
    """One row for each user, or each item. Its file is read when the first row of a log asks for it.

    Args:
        file: the table.
        key: its column of whole numbers, int64, that no two rows share; the log has a column of that name.
        columns: those to join.

    Raises:
        DataError: the file lacks one of them.
    """

    def __init__(self, file: LogFile, key: str, columns: Sequence[str]) -> None:
        for name in (key, *columns):
            if name not in file.types:
                raise DataError(
                    f"{file.path}: has no column {name}; its columns are {', '.join(file.types)}; fetch the file again"
                )
        self.path, self.key = file.path, key
        self.types = {name: file.types[name] for name in columns}
        self._file = file

    def rows_of(self, keys: pa.Array) -> pa.Array:
        """For each of n keys (int64) its row, int64 [n], null where the table has none.

        Raises:
            DataError: the file is damaged, or a key is missing or occurs twice.
        """
        known, order, _ = self._content
        if not len(known):
            return pa.nulls(len(keys), pa.int64())
        wanted = keys.fill_null(0).to_numpy()
        place = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        lost = (known[place] != wanted) | keys.is_null().to_numpy(zero_copy_only=False)
        return pa.array(order[place], mask=lost)

    def take(self, name: str, rows: pa.Array) -> pa.Array:
        """The column ``name`` at ``rows`` (of ``rows_of``)."""
        column = self._content[2][name]
        found = column.take(rows)
        if pa.types.is_dictionary(column.type) and len(column.dictionary) > SMALL_DICTIONARY:
            return found.dictionary_decode()  # the same for all batches, which must be of one type
        return found

    @cached_property
    def _content(self) -> tuple[np.ndarray, np.ndarray, dict[str, pa.Array]]:
        """The keys in order, int64 [n]; the row of each, int64 [n]; the columns by row."""
        pieces: dict[str, list[pa.Array]] = {name: [] for name in (self.key, *self.types)}
        for batch in self._file.batches(pieces.keys()):
            for name, arrays in pieces.items():
                column = batch.column(name)
                arrays.append(column.dictionary_encode() if is_text(column.type) else column)
        key = _whole(pieces.pop(self.key), pa.int64())
        if key.null_count:
            row = int(np.argmax(key.is_null().to_numpy(zero_copy_only=False)))
            raise self._error(row, "is empty; fill it in or drop the row")
        numbers = key.to_numpy()
        order = np.argsort(numbers, kind="stable")
        known = numbers[order]
        repeats = order[1:][known[1:] == known[:-1]]
        if len(repeats):
            row = int(repeats.min())
            raise self._error(row, f"{numbers[row]} occurs a second time; keep one row for each {self.key}")
        return known, order, {name: _whole(arrays, self.types[name]) for name, arrays in pieces.items()}

    def _error(self, row: int, fault: str) -> DataError:
        return DataError(f"{self.path}, row {self._file.row_name(row)}, field {self.key}: {fault}")


class Computed(NamedTuple):
    """A column worked out from another one of the log.

    Attributes:
        source: that column.
        type: what comes out.
        of: works out a batch, n values from n values.
    """

    source: str
    type: pa.DataType
    of: Callable[[pa.Array], pa.Array]


class JoinedFile:
    """A ``LogFile`` with the columns of side tables, and computed ones, beside its own.

    Args:
        base: the log.
        sides: the tables; no two of all these have a column in common, but for the keys.
        computed: further columns, by name.

    Raises:
        DataError: the log lacks the key of a side table.
    """

    def __init__(self, base: LogFile, sides: Sequence[SideTable], computed: Mapping[str, Computed]) -> None:
        needed = [*(side.key for side in sides), *(column.source for column in computed.values())]
        for name in needed:
            if name not in base.types:
                raise DataError(
                    f"{base.path}: has no column {name}; its columns are {', '.join(base.types)}; fetch the file again"
                )
        self._base, self._sides, self._computed = base, tuple(sides), dict(computed)
        self.path: Path = base.path
        self.rows = base.rows
        self.types = {name: column.type for name, column in computed.items()} | dict(base.types)
        for side in sides:
            self.types |= side.types

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """As ``LogFile.batches``.

        Raises:
            DataError: a file is damaged, or a line cannot be read.
        """
        sides = [side for side in self._sides if any(name in side.types for name in columns)]
        own = [name for name in columns if name in self._base.types]
        computed = {name: self._computed[name] for name in columns if name in self._computed}
        needed = [*own, *(side.key for side in sides), *(column.source for column in computed.values())]
        for batch in self._base.batches(tuple(dict.fromkeys(needed))):
            found = {name: batch.column(name) for name in own}
            found |= {name: column.of(batch.column(column.source)) for name, column in computed.items()}
            for side in sides:
                rows = side.rows_of(batch.column(side.key))
                found |= {name: side.take(name, rows) for name in columns if name in side.types}
            yield pa.RecordBatch.from_pydict({name: found[name] for name in columns})

    def row_name(self, row: int) -> str:
        """As ``LogFile.row_name``."""
        return self._base.row_name(row)


def _whole(pieces: list[pa.Array], kind: pa.DataType) -> pa.Array:
    """The pieces of a column as one; of texts as a dictionary."""
    if not pieces:
        return pa.array([], kind)
    return pa.chunked_array(pieces).unify_dictionaries().combine_chunks()
