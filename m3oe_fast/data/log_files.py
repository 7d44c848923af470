"""Parquet and CSV files, read in chunks of bounded memory, with messages that name file and row.

``LogFile`` is what both have in common. Rows of a Parquet file are counted from 1 (the message names the row group
too, counted from 0 as pyarrow does), rows of a CSV file so that the header, if there is one, is row 1; empty lines do
not count.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from m3oe_fast.errors import DataError

CHUNK_ROWS = 1 << 18
READ_BYTES = 1 << 20  # of a column of a row group held at a time, whatever the size of the row group
CSV_BLOCK_BYTES = 1 << 23
MAGIC = b"PAR1"
TOKEN, NUMBER, WHOLE = pa.string(), pa.float64(), pa.int64()


class LogFile(Protocol):
    """One file of a log.

    Attributes:
        path: where it lies.
        types: the type of each of its columns.
        rows: how many it has; None where only reading tells.
    """

    path: Path
    types: dict[str, pa.DataType]
    rows: int | None

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """These columns, all rows in order, some at a time."""

    def row_name(self, row: int) -> str:
        """How messages count row ``row``, from 0."""


class ParquetFile:
    """A ``LogFile`` in the Parquet format.

    Raises:
        DataError: the file cannot be read or is no intact Parquet file, or two columns have one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._reading("; fetch or write it again"), self._open() as file:
            self.types = _types(path, file.schema_arrow)
            self.rows: int | None = file.metadata.num_rows
            groups = (file.metadata.row_group(number).num_rows for number in range(file.num_row_groups))
            self._starts = [0, *accumulate(groups)][:-1]

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """As ``LogFile.batches``.

        Raises:
            DataError: the file is damaged.
        """
        with self._reading("; fetch or write it again"), self._open() as file:
            yield from file.iter_batches(CHUNK_ROWS, columns=list(columns), use_threads=False)

    def row_name(self, row: int) -> str:
        """As ``LogFile.row_name``."""
        return f"{row + 1} (row group {bisect_right(self._starts, row) - 1})"

    def _open(self) -> pq.ParquetFile:
        # Without a buffer size a whole row group would be read at once, and some writers make one per file.
        return pq.ParquetFile(self.path, pre_buffer=False, buffer_size=READ_BYTES, memory_map=False)

    @contextmanager
    def _reading(self, remedy: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {_reason(error)}{remedy}") from error
        except (pa.ArrowException, EOFError, ValueError) as error:
            raise DataError(f"{self.path}: {self._fault(error)}{remedy}") from error

    def _fault(self, error: Exception) -> str:
        with self.path.open("rb") as file:
            head = file.read(len(MAGIC))
            size = file.seek(0, 2)
            file.seek(max(size - len(MAGIC), 0))
            tail = file.read()
        if head != MAGIC:
            return "is empty" if not size else "is no Parquet file"
        return "is a Parquet file that is cut short" if tail != MAGIC else f"is damaged ({_reason(error)})"


class CsvFile:
    """A ``LogFile`` of text, with a header line or with names from elsewhere; fields may be quoted.

    Args:
        path: the file; .gz, .bz2, .lz4 and .zst are unpacked on the way.
        delimiter: one character.
        numbers: the columns that hold numbers.
        wholes: those that hold whole numbers. All others hold texts.
        names: of the columns of a file without header.

    Raises:
        DataError: the file cannot be read, has no columns, or two columns have one name.
    """

    rows: int | None = None

    def __init__(
        self,
        path: Path,
        delimiter: str,
        numbers: Collection[str],
        wholes: Collection[str] = (),
        names: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._delimiter, self._names = delimiter, list(names)
        self.types: dict[str, pa.DataType] = {}
        with self._reading():
            found = self._open([]).schema.names
            _types(path, pa.schema([(name, TOKEN) for name in found]))
            kinds = {**dict.fromkeys(numbers, NUMBER), **dict.fromkeys(wholes, WHOLE)}
            self.types = {name: kinds.get(name, TOKEN) for name in found}

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """As ``LogFile.batches``.

        Raises:
            DataError: a line has too many or too few fields, or a value is no number.
        """
        with self._reading():
            yield from self._open(list(columns))

    def row_name(self, row: int) -> str:
        """As ``LogFile.row_name``."""
        return str(row + (1 if self._names else 2))

    def _open(self, columns: list[str]) -> pa.csv.CSVStreamingReader:
        types = {name: self.types[name] for name in columns}
        # Threads lose the row of an error.
        read = pa.csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES, column_names=self._names)
        parse = pa.csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=False)
        return pa.csv.open_csv(
            self.path, read, parse, pa.csv.ConvertOptions(column_types=types, include_columns=columns)
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {_reason(error)}; fetch or write it again") from error
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(self._explain(str(error))) from error

    def _explain(self, message: str) -> str:
        """Arrow's message as one line of ours."""
        row = re.search(r"Row #(\d+)", message)
        place = f"{self.path}, row {row[1]}" if row else f"{self.path}"
        shape = re.search(r"Expected (\d+) columns, got (\d+)", message)
        if shape:
            wanted = f"{shape[1]} are expected" if self._names else f"the header has {shape[1]}"
            return (
                f"{place}: {shape[2]} columns where {wanted} (wrong delimiter, or the line is cut short); mend the file"
            )
        value = re.search(r"In CSV column #(\d+).*invalid value '(.*?)'", message, re.DOTALL)
        if value:
            name, kind = list(self.types.items())[int(value[1])]
            wanted = "whole number" if kind == WHOLE else "number"
            return f"{place}, field {name}: {value[2]!r} is not a {wanted}; mend it"
        if "UTF8" in message or "UTF-8" in message or "utf-8" in message:
            return f"{place}: not UTF-8 text; save the file as UTF-8"
        if "Empty CSV" in message:
            return f"{place}: is empty; fetch or write it again"
        return f"{place}: {message.splitlines()[0]}; mend the file"


def _types(path: Path, schema: pa.Schema) -> dict[str, pa.DataType]:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name} occurs twice; rename one")
    return dict(zip(schema.names, schema.types, strict=True))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
