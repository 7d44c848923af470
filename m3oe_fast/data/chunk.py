"""Some consecutive rows of a log file, each column in the form that its role needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from m3oe_fast.data.arrow_columns import BadValue, Coded, bag_of, numbers_of, texts_of, times_of
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.hashing import user_codes
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.log_files import LogFile
from m3oe_fast.errors import DataError


class Chunk:
    """n rows.

    Args:
        columns: the raw columns that were asked for.
        file: where they stand.
        first: number of row 0 in the file, from 0.
        start: number of row 0 in the log, from 0.
        places: where rows in between were left out, int64 [n]: how many rows after ``first`` each stands.

    Every method raises DataError, with file, row and field, where a value does not fit.
    """

    def __init__(
        self, columns: pa.Table, file: LogFile, first: int, start: int, places: np.ndarray | None = None
    ) -> None:
        self._columns, self.file, self._first, self.start = columns, file, first, start
        self._places = places
        self._coded: dict[str, Coded] = {}

    def __len__(self) -> int:
        return self._columns.num_rows

    @property
    def rows(self) -> np.ndarray:
        """int64 [n]: the numbers of the rows in the log."""
        return np.arange(self.start, self.start + len(self))

    def texts(self, name: str) -> Coded:
        """A column of ids."""
        if name not in self._coded:
            self._coded[name] = texts_of(self._raw(name))
        return self._coded[name]

    def bag(self, name: str, separator: str | None) -> tuple[Coded, np.ndarray]:
        """A multi-hot column: values and offsets int64 [n+1] into them."""
        return bag_of(self._raw(name), separator)

    def dense(self, name: str) -> np.ndarray:
        """float64 [n], finite."""
        numbers = self._numbers(name)
        wrong = ~np.isfinite(numbers)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise self._error(name, row, f"{numbers[row]:g} is no finite number; fill it in or leave the column out")
        return numbers

    def domain(self, rule: DomainRule) -> np.ndarray:
        """int32 [n], 0..D-1."""
        domain = self._domain(rule)
        wrong = domain < 0
        if wrong.any():
            row = int(np.argmax(wrong))
            value = self._raw(rule.column)[row].as_py()
            raise self._error(
                rule.column, row, f"{value!r} is in no domain ({', '.join(rule.names)}); mend or drop the row"
            )
        return domain

    def within(self, rule: DomainRule, start: int) -> Chunk:
        """The rows that lie in a domain; ``start`` becomes the number of the first of them in the log."""
        places = np.flatnonzero(self._domain(rule) >= 0)
        return Chunk(self._columns.take(pa.array(places)), self.file, self._first, start, places)

    def label(self, rules: tuple[LabelRule, ...]) -> np.ndarray:
        """float32 [n,T] of 0, 1, NaN (not observed)."""
        label = np.empty((len(self), len(rules)), np.float32)
        for place, rule in enumerate(rules):
            label[:, place] = rule.apply(self._numbers(rule.column), str(self.file.path), self._row_name)
        return label

    def weight(self, name: str) -> np.ndarray:
        """float32 [n], finite and not negative."""
        with np.errstate(over="ignore"):
            weight = self._numbers(name).astype(np.float32)
        wrong = ~(np.isfinite(weight) & (weight >= 0))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise self._error(name, row, f"{weight[row]:g} is no weight; write a finite number, 0 or more")
        return weight

    def user(self, name: str) -> np.ndarray:
        """int64 [n]: a hash of the user, at least 0; -1 where the row names none."""
        codes, texts = self.texts(name)
        return np.append(user_codes(texts), -1)[codes]

    def time(self, name: str) -> np.ndarray:
        """int64 [n]: keys that sort as the points in time do."""
        with self._locating(name):
            return times_of(self._raw(name))

    def _domain(self, rule: DomainRule) -> np.ndarray:
        """int32 [n], -1 for rows in no domain."""
        if rule.column is None:
            return np.zeros(len(self), np.int32)
        if rule.edges:
            return rule.of_numbers(self._numbers(rule.column))
        codes, texts = self.texts(rule.column)
        return np.append(rule.of_texts(texts), np.int32(-1))[codes]

    def _numbers(self, name: str) -> np.ndarray:
        with self._locating(name):
            return numbers_of(self._raw(name))

    def _raw(self, name: str) -> pa.Array:
        column = self._columns.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    @contextmanager
    def _locating(self, name: str) -> Iterator[None]:
        try:
            yield
        except BadValue as error:
            raise self._error(name, error.row, str(error)) from error

    def _error(self, name: str, row: int, fault: str) -> DataError:
        return DataError(f"{self.file.path}, row {self._row_name(row)}, field {name}: {fault}")

    def _row_name(self, row: int) -> str:
        return self.file.row_name(self._first + (row if self._places is None else int(self._places[row])))
