"""Text tables with one delimiter -> Arrow columns, with errors that name file, row and field.

A row is a line of the file, counted from 1; a header line counts.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv

from m3oe_fast.data.columns import Tokens
from m3oe_fast.errors import DataError

TOKEN = pa.dictionary(pa.int32(), pa.string())
NUMBER = pa.float64()


@dataclass(frozen=True)
class Layout:
    """How a table is written.

    Attributes:
        names: the column names, in file order.
        delimiter: one character between columns; quotes mean nothing.
        header_rows: lines before the first row of data.
        encoding: of the text.
    """

    names: tuple[str, ...]
    delimiter: str = "\t"
    header_rows: int = 0
    encoding: str = "utf8"


@dataclass(frozen=True)
class Table:
    """The columns read from one file, all of the same length.

    Attributes:
        where: the file, for messages.
        tokens: id columns.
        numbers: float64 [N] columns, NaN where the file has no value.
        first_row: the first line of the file that may hold row 0.
        data: the text that was read, to count its empty lines for messages; None: it has none.
    """

    where: str
    tokens: dict[str, Tokens]
    numbers: dict[str, np.ndarray]
    first_row: int
    data: pa.Buffer | None = None

    def line(self, row: int) -> int:
        """The line of the file on which a row stands."""
        return row + self.first_row if self.data is None else _line_of(row, self.data, self.first_row)

    def at(self, row: int, name: str) -> str:
        """``file, row, field`` of a value, for messages."""
        return f"{self.where}, row {self.line(row)}, field {name}"


def read_delimited(data: pa.Buffer, where: str, layout: Layout, types: dict[str, pa.DataType]) -> Table:
    """Read the columns named in ``types`` (each TOKEN or NUMBER).

    Raises:
        DataError: no rows, a row with the wrong number of columns, or a value that is no number.
    """
    read = pa.csv.ReadOptions(
        use_threads=False,  # row numbers in errors are known only then
        column_names=list(layout.names),
        skip_rows=layout.header_rows,
        encoding=layout.encoding,
    )
    parse = pa.csv.ParseOptions(delimiter=layout.delimiter, quote_char=False)
    convert = pa.csv.ConvertOptions(column_types=types, include_columns=list(types))
    try:
        table = pa.csv.read_csv(pa.BufferReader(data), read, parse, convert)
    except pa.ArrowInvalid as error:
        raise DataError(_explain(str(error), where, layout, data)) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not {layout.encoding} text; save the file as UTF-8") from error
    if table.num_rows == 0:
        raise DataError(f"{where}: holds no rows; fetch the file again")
    return Table(
        where,
        {n: Tokens.from_arrow(table[n]) for n, t in types.items() if t == TOKEN},
        {n: table[n].to_numpy() for n, t in types.items() if t == NUMBER},
        layout.header_rows + 1,
        data,
    )


def require_finite(table: Table, name: str, column: np.ndarray, remedy: str) -> None:
    """Refuse a feature, float64 [N] for the rows of ``table``, with NaN or infinite values.

    Raises:
        DataError: names the first such row, and ``remedy``.
    """
    wrong = np.flatnonzero(~np.isfinite(column))
    if len(wrong):
        more = f" ({len(wrong):,} such rows)" if len(wrong) > 1 else ""
        raise DataError(f"{table.at(int(wrong[0]), name)}: no finite number{more}; {remedy}")


def _line_of(row: int, data: pa.Buffer, first: int) -> int:
    """The line of row ``row`` (from 0) where rows start on line ``first`` and empty lines hold none."""
    lines = enumerate(data.to_pybytes().splitlines()[first - 1 :], start=first)
    full = (number for number, text in lines if text)
    return next(itertools.islice(full, row, None), first + row)


def _explain(message: str, where: str, layout: Layout, data: pa.Buffer) -> str:
    """Arrow's message as one line of ours."""
    row = re.search(r"Row #(\d+)", message)
    first = layout.header_rows + 1
    place = f"{where}, row {_line_of(int(row[1]) - first, data, first)}" if row else where
    shape = re.search(r"Expected (\d+) columns, got (\d+)", message)
    if shape:
        fault = "wrong separator, or the line is cut short"
        return f"{place}: {shape[2]} columns where {shape[1]} are expected ({fault}); mend the file"
    column = re.search(r"In CSV column #(\d+)", message)
    value = re.search(r"invalid value '(.*?)'", message, re.DOTALL)
    if column and value:
        field = layout.names[int(column[1])]
        return f"{place}, field {field}: {value[1]!r} is not a number; mend the file"
    if "UTF8" in message or "UTF-8" in message:
        return f"{place}: not {layout.encoding} text; save the file as UTF-8"
    if "Empty CSV" in message or "Could not skip" in message:
        return f"{place}: holds no rows; fetch the file again"
    return f"{place}: {message.splitlines()[0]}; mend the file"
