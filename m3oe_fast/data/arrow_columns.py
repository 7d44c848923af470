"""Arrow columns of any type -> what an encoder needs: codes into texts, numbers, times, multi-hot values.

Nothing here goes row by row in Python; texts are looked at once per distinct value of a column. Texts come out as
they do from a pandas frame: 5, 5.0, "5" and "5.0" are one id, NaN and "" are none.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from m3oe_fast.data.columns import id_text

_WHOLE = r"^(-?[0-9]+)\.0+$"  # columns.canonical, for Arrow
_NO_TIME = "is empty, and split temporal needs it; fill it in or choose another --split"
_SIGN = np.int64(-(2**63))


class Coded(NamedTuple):
    """n texts: row i has ``texts[codes[i]]``, where code -1 and the text "" mean that it has none.

    ``codes`` is int32 [n]. A text may occur twice, and need not occur in a row.
    """

    codes: np.ndarray
    texts: list[str]


class BadValue(Exception):
    """Row ``row`` (from 0) of a column holds a value that does not fit its role."""

    def __init__(self, row: int, fault: str) -> None:
        super().__init__(fault)
        self.row = row


def is_text(kind: pa.DataType) -> bool:
    """Whether a type holds texts, in a dictionary or not."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_number(kind: pa.DataType) -> bool:
    """Whether a type holds numbers or truth values; a column that is null throughout counts."""
    if pa.types.is_dictionary(kind):
        return is_number(kind.value_type)
    checks = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null)
    return any(check(kind) for check in checks)


def is_time(kind: pa.DataType) -> bool:
    """Whether a type holds dates or points in time."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def is_list(kind: pa.DataType) -> bool:
    """Whether a type holds lists of texts or numbers."""
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in checks) and (is_text(kind.value_type) or is_number(kind.value_type))


def texts_of(column: pa.Array) -> Coded:
    """A column of texts or numbers as texts."""
    if not pa.types.is_dictionary(column.type):
        column = _plain(column).dictionary_encode()
    codes = column.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)
    return Coded(codes, _as_texts(_plain(column.dictionary)))


def numbers_of(column: pa.Array) -> np.ndarray:
    """A column of numbers, or of their texts, as float64 [n]; NaN where it is null or "".

    Raises:
        BadValue: a text is no number.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if is_text(column.type):
        codes, texts = texts_of(column)
        numbers = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(np.float64)
        bad = np.isnan(numbers) & np.array([bool(text) for text in texts], bool)
        _refuse(np.append(bad, False)[codes], codes, texts, "is not a number")
        return np.append(numbers, np.nan)[codes]
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


def times_of(column: pa.Array) -> np.ndarray:
    """Points in time as int64 [n] keys that sort as they do: numbers, dates, texts of numbers or ISO 8601 texts.

    Raises:
        BadValue: a row has none, or a text is neither.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        raise BadValue(int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), _NO_TIME)
    if pa.types.is_date32(column.type):
        column = column.cast(pa.int32())
    if is_time(column.type) or (pa.types.is_integer(column.type) and not pa.types.is_uint64(column.type)):
        return column.cast(pa.int64()).to_numpy()
    numbers = _clock(column) if is_text(column.type) else numbers_of(column)
    missing = np.isnan(numbers)
    if missing.any():
        raise BadValue(int(np.argmax(missing)), _NO_TIME)
    # The bits of a float sort like a whole number once those of negative ones are turned round; + 0.0 makes -0.0 0.0.
    bits = (numbers + 0.0).view(np.int64)
    return np.where(bits < 0, ~bits ^ _SIGN, bits)


def bag_of(column: pa.Array, separator: str | None) -> tuple[Coded, np.ndarray]:
    """A column of lists, or of texts with a separator: the values of all rows and offsets int64 [n+1] into them.

    A row that is null has no values; values that are null or "" are left out.
    """
    if pa.types.is_null(column.type):
        column = column.cast(pa.list_(pa.string()))
    if not is_list(column.type):
        texts = texts_of(column)
        table = np.array([*texts.texts, ""], object)[texts.codes]
        column = pc.split_pattern(pa.array(table, pa.string()), separator)
    codes, texts = texts_of(pc.list_flatten(column))
    parents = pc.list_parent_indices(column).to_numpy()
    kept = np.append(np.array([bool(text) for text in texts], bool), False)[codes]
    lengths = np.bincount(parents[kept], minlength=len(column))
    return Coded(codes[kept], texts), np.concatenate([[0], np.cumsum(lengths)])


def _plain(column: pa.Array) -> pa.Array:
    return column.cast(pa.string()) if is_text(column.type) else column


def _as_texts(values: pa.Array) -> list[str]:
    if pa.types.is_integer(values.type):
        return ["" if text is None else text for text in values.cast(pa.string()).to_pylist()]
    if not pa.types.is_string(values.type):
        return ["" if value is None or value != value else id_text(value) for value in values.to_pylist()]
    if pc.any(pc.match_substring(values, ".0")).as_py():
        values = pc.replace_substring_regex(values, _WHOLE, r"\1")
    return ["" if text is None else text for text in values.to_pylist()]


def _clock(column: pa.Array) -> np.ndarray:
    """Texts of numbers, or of dates as microseconds since 1970; float64 [n], NaN where there is none."""
    codes, texts = texts_of(column)
    series = pd.Series(texts, dtype=object)
    numbers = pd.to_numeric(series, errors="coerce").to_numpy(np.float64, copy=True)
    dates = np.flatnonzero(np.isnan(numbers) & (series != "").to_numpy())
    if len(dates):
        found = pd.to_datetime(series.iloc[dates], errors="coerce", utc=True, format="ISO8601")
        micro = found.dt.as_unit("us").astype(np.int64).to_numpy().astype(np.float64)
        numbers[dates] = np.where(found.isna(), np.nan, micro)
    bad = np.isnan(numbers) & (series != "").to_numpy()
    _refuse(np.append(bad, False)[codes], codes, texts, "is neither a number nor an ISO 8601 time")
    return np.append(numbers, np.nan)[codes]


def _refuse(bad: np.ndarray, codes: np.ndarray, texts: list[str], fault: str) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise BadValue(row, f"{texts[codes[row]]!r} {fault}; mend it")
