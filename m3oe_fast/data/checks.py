"""Whether the columns of a part fit their schema: a file can be intact and still be another program's."""

from __future__ import annotations

import numpy as np

from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import Column, Columns, rows_of
from m3oe_fast.data.table import Table
from m3oe_fast.errors import DataError

REMEDY = "prepare the log again"


def check_columns(columns: Columns, schema: Schema, where: str) -> None:
    """Check names, dtypes and shapes.

    Raises:
        DataError: a column is missing or of another kind than ``store`` describes.
    """
    wanted = _kinds(schema)
    lacking = sorted(wanted.keys() - columns.keys())
    if lacking:
        raise DataError(f"{where}: lacks the columns {', '.join(lacking)}; {REMEDY}")
    for name, kind in {**wanted, "user": ("int64", ())}.items():
        if name in columns and _kind_of(columns[name]) != kind:
            raise DataError(
                f"{where}, field {name}: holds {_told(_kind_of(columns[name]))}, not {_told(kind)}; {REMEDY}"
            )
    rows = {name: rows_of(columns[name]) for name in wanted.keys() | (columns.keys() & {"user"})}
    if len(set(rows.values())) > 1:
        raise DataError(f"{where}: columns of different lengths {rows}; {REMEDY}")


def check_values(table: Table, first: int, schema: Schema, where: str) -> None:
    """Check every value.

    Args:
        table: consecutive rows of a part, as ``table.joined`` returns them.
        first: the number of the first of them, for messages.
        schema: what they must fit.
        where: the file, for messages.

    Raises:
        DataError: a value lies outside the schema; rows are counted from 0.
    """

    def refuse(wrong: np.ndarray, values: np.ndarray, name: str, fault: str) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(f"{where}, row {first + row}, field {name}: {values[row]} is {fault}; {REMEDY}")

    for name, ids, size in zip(schema.fields, table.ids, schema.vocab_sizes, strict=True):
        refuse(ids >= size, ids, name, f"beyond the vocabulary of {size} ids")
    size = len(schema.domains)
    refuse(table.domain >= size, table.domain, "domain", f"out of range, {size} domains")
    for place, name in enumerate(schema.dense):
        column = table.dense[:, place]
        refuse(~np.isfinite(column), column, name, "not finite")
    for place, name in enumerate(schema.tasks):
        column = table.label[:, place]
        refuse(~(np.isnan(column) | (column == 0) | (column == 1)), column, name, "neither 0 nor 1 nor missing")
    if table.weight is not None:
        refuse(~(np.isfinite(table.weight) & (table.weight >= 0)), table.weight, "weight", "no weight (0 or more)")
    for name, (values, offsets), size in zip(schema.bags, table.bags, schema.bag_vocab_sizes, strict=True):
        lengths = np.diff(offsets)
        refuse(lengths < 0, lengths, name, "no length of a list")
        if offsets[-1] != len(values):
            raise DataError(f"{where}, field {name}: lists end beyond their values; {REMEDY}")
        wrong = np.flatnonzero(values >= size)
        if len(wrong):
            row = int(np.searchsorted(offsets, wrong[0], side="right")) - 1
            fault = f"beyond the vocabulary of {size} ids"
            raise DataError(f"{where}, row {first + row}, field {name}: {values[wrong[0]]} is {fault}; {REMEDY}")


def _kinds(schema: Schema) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The dtype and the shape of a row, for each column that must be there."""
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {f"id:{field}": ("unsigned", ()) for field in schema.fields}
    kinds["domain"] = ("unsigned", ())
    kinds["label"] = ("float32", (len(schema.tasks),))
    if schema.dense:
        kinds["dense"] = ("float32", (len(schema.dense),))
    if schema.weighted:
        kinds["weight"] = ("float32", ())
    return kinds | {f"bag:{name}": ("lists of unsigned", ()) for name in schema.bags}


def _kind_of(column: Column) -> tuple[str, tuple[int, ...]]:
    if isinstance(column, tuple):
        return f"lists of {_kind_of(column[0])[0]}", ()
    return "unsigned" if column.dtype.kind == "u" else column.dtype.name, column.shape[1:]


def _told(kind: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = kind
    return f"{dtype} {list(shape)}" if shape else dtype
