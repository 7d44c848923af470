"""Raw id columns: integer codes [N] into a list of distinct texts, -1 where a row has none.

Readers hand every id field on in this form, so that joins, splits and encoders work on integers
alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

_WHOLE = re.compile(r"(-?[0-9]+)\.0+")


@dataclass(frozen=True)
class Tokens:
    """One id column of N rows.

    Attributes:
        codes: int32 [N], index into ``values``; -1 = the row has no value.
        values: the distinct texts, in any order; an empty text never occurs here.
    """

    codes: np.ndarray
    values: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def merged(cls, codes: np.ndarray, texts: list[str]) -> Tokens:
        """From codes (int [N], -1 = missing) into ``texts``; equal ones merge, empty is missing."""
        place: dict[str, int] = {}
        table = np.full(len(texts) + 1, -1, np.int32)  # the last entry serves code -1
        for code, text in enumerate(texts):
            if text:
                table[code] = place.setdefault(text, len(place))
        return cls(table[codes], tuple(place))

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray) -> Tokens:
        """From a non-empty Arrow column dictionary<int32, string>; empty, null = missing.

        Texts are made canonical: "5.0" becomes "5".
        """
        column = column.unify_dictionaries()
        codes = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in column.chunks])
        return cls.merged(codes, [canonical(text) for text in column.chunk(0).dictionary.to_pylist()])

    def renamed(self, texts: list[str]) -> Tokens:
        """The same rows with ``texts[i]`` for ``values[i]``; equal ones merge, empty is missing."""
        return self.merged(self.codes, texts)

    def gather(self, rows: np.ndarray) -> Tokens:
        """The column at ``rows`` (int [M]; -1 gives a missing value)."""
        return Tokens(np.append(self.codes, np.int32(-1))[rows], self.values)

    def positions_of(self, keys: Tokens) -> np.ndarray:
        """For each row of ``keys`` the row of this column with the same text, or -1; int32.

        This column must not repeat a value (``first_repeat`` is None): it is the key of a table.
        """
        row_of = {self.values[code]: row for row, code in enumerate(self.codes.tolist()) if code >= 0}
        table = np.array([*(row_of.get(value, -1) for value in keys.values), -1], np.int32)
        return table[keys.codes]

    def first_repeat(self) -> int | None:
        """The first row that repeats an earlier row's value, or None."""
        order = np.argsort(self.codes, kind="stable")
        same = np.flatnonzero(self.codes[order][1:] == self.codes[order][:-1])
        return int(order[same + 1].min()) if len(same) else None

    def numbers(self) -> np.ndarray:
        """float64 [N]: each text as a number; NaN where it is missing or no number."""
        return np.array([*(as_number(value) for value in self.values), np.nan])[self.codes]


def canonical(text: str) -> str:
    """An id as it is compared: a whole number with zero decimals ("5.0") is the same id as without ("5")."""
    match = _WHOLE.fullmatch(text)
    return match[1] if match else text


def id_text(value: object) -> str:
    """A value of any type as the text by which ids compare."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))  # pandas turns whole numbers into floats where a column has gaps
    return canonical(str(value))


def first_token(text: str, separators: str) -> str:
    """What stands before the first of the characters ``separators``, leading ones apart."""
    text = text.strip(separators)
    for separator in separators:
        text = text.partition(separator)[0]
    return text


def as_number(text: str) -> float:
    """``text`` as a float, NaN if it is no number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def natural_order(texts: list[str]) -> list[str]:
    """Whole numbers first and by value ("9" before "10"), then other texts alphabetically."""

    def key(text: str) -> tuple[bool, int, str, str]:
        whole = text.isascii() and text.isdigit()
        digits = text.lstrip("0") if whole else ""  # not int(): it refuses thousands of digits
        return (not whole, len(digits), digits, text)

    return sorted(texts, key=key)
