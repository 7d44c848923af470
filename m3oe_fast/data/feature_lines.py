r"""Lines ``column,...,n,features`` of the Ali-CCP files, parsed a block at a time, never row by row in Python.

``features`` is n times ``field \x02 id \x03 value``, joined by \x01. Columns are separated by commas, which no column
holds; nothing is quoted, there is no header, and rows are counted from 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from m3oe_fast.errors import DataError

BLOCK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 28
MAX_FIELD_BYTES = 8  # of a field's name, which is compared as one 64-bit number
MAX_NUMBER_BYTES = 40
MAX_KEY_BYTES = 64
_LINE, _COLUMN = 10, 44  # bytes \n and ,
_NEXT, _ID, _VALUE = 1, 2, 3
_PADDING = max(MAX_FIELD_BYTES, MAX_NUMBER_BYTES, MAX_KEY_BYTES)
_MARKS = np.isin(np.arange(256), (_LINE, _COLUMN, _NEXT, _ID, _VALUE))
_DAMAGED = "the line is damaged; fetch the file again"


class Features(NamedTuple):
    """m features of some rows, in file order.

    Attributes:
        row: int64 [m], increasing, the row in the block.
        field: int64 [m], the place of the field's name among those asked for.
        id: int32 [m], not negative.
        value: float64 [m].
    """

    row: np.ndarray
    field: np.ndarray
    id: np.ndarray
    value: np.ndarray

    def of(self, field: int) -> Features:
        """Those of one field."""
        chosen = self.field == field
        return Features(*(column[chosen] for column in self))


@dataclass(frozen=True)
class Lines:
    """n >= 1 consecutive lines of a file.

    Attributes:
        path: the file.
        first: how many lines stand before them.
        names: of the c columns, of which the last two are the number of features and the features.
        data: uint8, the n lines, each with its newline, and some bytes more.
        marks: int64, increasing: the places in ``data`` of all separators.
        start, stop: int64 [n,c], where each column begins and ends in ``data``.
    """

    path: Path
    first: int
    names: tuple[str, ...]
    data: np.ndarray
    marks: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def keys(self, name: str) -> np.ndarray:
        """A column as texts of bytes, [n] of the dtype S with the greatest length.

        Raises:
            DataError: one is longer than ``MAX_KEY_BYTES``.
        """
        column = self.names.index(name)
        start, length = self.start[:, column], self.stop[:, column] - self.start[:, column]
        wrong = length > MAX_KEY_BYTES
        if wrong.any():
            raise self.error(int(np.argmax(wrong)), name, f"is longer than {MAX_KEY_BYTES} characters; {_DAMAGED}")
        width = max(int(length.max()), 1)
        window = self._windows(start, width)
        window[np.arange(width) >= length[:, None]] = 0
        return window.view(f"S{width}")[:, 0]

    def whole(self, name: str) -> np.ndarray:
        """A column of whole numbers, int64 [n].

        Raises:
            DataError: one is none.
        """
        column = self.names.index(name)
        rows = np.arange(len(self))
        return self._numbers(self.start[:, column], self.stop[:, column], rows, pa.int64(), name)

    def features(self, fields: Sequence[bytes], valued: Sequence[bytes]) -> Features:
        """The features whose field is one of ``fields``.

        Args:
            fields: names of at most ``MAX_FIELD_BYTES`` bytes.
            valued: those of them whose values are read; the others have the value 0.

        Raises:
            DataError: a feature is not ``field id value``, their number is not the stated one, an id or value is no
                number.
        """
        row, begin, middle, last, end = self._split()
        place = _places(self._words(begin, middle - begin), fields)
        kept = np.flatnonzero(place >= 0)
        row, place = row[kept], place[kept]
        ids = self._numbers(middle[kept] + 1, last[kept], row, pa.int32(), "features")
        value = np.zeros(len(kept))
        chosen = np.flatnonzero(np.isin(np.arange(len(fields)), [fields.index(field) for field in valued])[place])
        texts = last[kept[chosen]] + 1, end[kept[chosen]]
        value[chosen] = self._numbers(*texts, row[chosen], pa.float64(), "features")
        wrong = np.flatnonzero(~np.isfinite(value))
        if len(wrong):
            place = int(wrong[0])
            raise self._no_number(last[kept] + 1, end[kept], row, place, "features")
        return Features(row, place, ids, value)

    def error(self, row: int, name: str, fault: str) -> DataError:
        """An error about a column of a row."""
        return DataError(f"{self.path}, row {self.first + row + 1}, field {name}: {fault}")

    def _split(self) -> tuple[np.ndarray, ...]:
        """Each feature's row, and where its field begins, \\x02 and \\x03 stand, and it ends."""
        signs = self.data[self.marks]
        ends = np.flatnonzero((signs == _NEXT) | (signs == _LINE))
        row = np.cumsum(signs[ends] == _LINE) - (signs[ends] == _LINE)
        filled = (self.start[:, -1] < self.stop[:, -1])[row]
        ends, row = ends[filled], row[filled]
        # Right before an end stand \x03, \x02, and the end of the feature before or the comma before the column.
        before = signs[ends - 3]
        fits = (signs[ends - 1] == _VALUE) & (signs[ends - 2] == _ID) & ((before == _NEXT) | (before == _COLUMN))
        if not fits.all():
            place = int(row[np.argmin(fits)])
            raise self.error(place, "features", rf"a feature is not field\x02id\x03value; {_DAMAGED}")
        stated = self.whole(self.names[-2])
        found = np.bincount(row, minlength=len(self))
        wrong = np.flatnonzero(stated != found)
        if len(wrong):
            place = int(wrong[0])
            raise self.error(place, self.names[-2], f"says {stated[place]} features, {found[place]} follow; {_DAMAGED}")
        return row, *(self.marks[ends - 3] + 1, self.marks[ends - 2], self.marks[ends - 1], self.marks[ends])

    def _numbers(
        self, start: np.ndarray, stop: np.ndarray, row: np.ndarray, kind: pa.DataType, name: str
    ) -> np.ndarray:
        """The numbers written at ``start`` .. ``stop`` (int64 [m]) in rows ``row``."""
        length = stop - start
        wrong = length > MAX_NUMBER_BYTES
        if wrong.any():
            raise self._no_number(start, stop, row, int(np.argmax(wrong)), name)
        if not len(length):
            return np.empty(0, kind.to_pandas_dtype())
        width = max(int(length.max()), 1)
        flat = self._windows(start, width)[np.arange(width) < length[:, None]]
        offsets = np.zeros(len(length) + 1, np.int32)
        np.cumsum(length, out=offsets[1:])
        texts = pa.StringArray.from_buffers(len(length), pa.py_buffer(offsets), pa.py_buffer(flat))
        try:
            numbers = texts.cast(kind).to_numpy()
        except pa.ArrowInvalid:
            raise self._no_number(start, stop, row, _first_wrong(texts, kind), name) from None
        if pa.types.is_integer(kind) and numbers.min() < 0:
            raise self._no_number(start, stop, row, int(np.argmax(numbers < 0)), name)
        return numbers

    def _no_number(self, start: np.ndarray, stop: np.ndarray, row: np.ndarray, wrong: int, name: str) -> DataError:
        text = self.data[start[wrong] : min(stop[wrong], start[wrong] + MAX_NUMBER_BYTES)].tobytes()
        shown = text.decode("utf8", "backslashreplace")
        return self.error(int(row[wrong]), name, f"{shown!r} is no number in range; {_DAMAGED}")

    def _windows(self, start: np.ndarray, width: int) -> np.ndarray:
        """uint8 [m,width]: the bytes from each ``start`` on."""
        return np.lib.stride_tricks.sliding_window_view(self.data, width)[start]

    def _words(self, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        """uint64 [m]: texts of at most 8 bytes, the first lowest; all ones, which is no text, for longer ones."""
        words = self._windows(start, MAX_FIELD_BYTES).view("<u8")[:, 0]
        words &= _WORD_MASKS[np.minimum(length, MAX_FIELD_BYTES)]
        words[length > MAX_FIELD_BYTES] = _WORD_MASKS[-1]
        return words


_WORD_MASKS = np.array([(1 << 8 * length) - 1 for length in range(MAX_FIELD_BYTES + 1)], np.uint64)


def read_lines(path: Path, names: tuple[str, ...]) -> Iterator[Lines]:
    """All lines of a file in order, in blocks of about ``BLOCK_BYTES``.

    Args:
        path: the file.
        names: of its c columns, for messages and to ask for them.

    Raises:
        DataError: the file cannot be read or is empty, or a line has not c columns.
    """
    first = 0
    for block in _blocks(path):
        lines = _cut(path, first, names, block)
        first += len(lines)
        yield lines
    if not first:
        raise DataError(f"{path}: is empty; fetch the file again")


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, and ``_PADDING`` zeros behind them."""
    padding = bytes(_PADDING)
    try:
        with path.open("rb") as file:
            rest = b""
            while block := file.read(BLOCK_BYTES):
                head, newline, tail = block.rpartition(b"\n")
                if newline:
                    yield b"".join((rest, head, newline, padding))
                    rest = tail
                else:
                    rest += tail
                if len(rest) > MAX_LINE_BYTES:
                    raise DataError(f"{path}: a line is longer than {MAX_LINE_BYTES >> 20} MB; fetch the file again")
            if rest:
                yield b"".join((rest, b"\n", padding))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the file") from error


def _cut(path: Path, first: int, names: tuple[str, ...], block: bytes) -> Lines:
    data = np.frombuffer(block, np.uint8)
    marks = np.flatnonzero(_MARKS[data])
    signs = data[marks]
    ends, commas = marks[signs == _LINE], marks[signs == _COLUMN]
    found = np.diff(np.searchsorted(commas, ends), prepend=0) + 1
    wrong = np.flatnonzero(found != len(names))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            f"{path}, row {first + row + 1}: {found[row]} columns where {len(names)} are expected "
            f"({', '.join(names)}); {_DAMAGED}"
        )
    begins = np.concatenate([[0], ends[:-1] + 1])
    inner = commas.reshape(len(ends), len(names) - 1)
    start = np.column_stack([begins, inner + 1])
    return Lines(path, first, names, data, marks, start, np.column_stack([inner, ends]))


def _places(words: np.ndarray, fields: Sequence[bytes]) -> np.ndarray:
    """int64 [m]: the place of each word among ``fields``, -1 where it is none of them."""
    known = np.array([int.from_bytes(field, "little") for field in fields], np.uint64)
    order = np.argsort(known)
    found = np.minimum(np.searchsorted(known[order], words), len(known) - 1)
    return np.where(known[order][found] == words, order[found], -1)


def _first_wrong(texts: pa.Array, kind: pa.DataType) -> int:
    """The first text that is no number, of which there is one."""
    low, high = 0, len(texts)  # the first ``low`` are numbers, not all of the first ``high``
    while high - low > 1:
        middle = (low + high) // 2
        try:
            texts[low:middle].cast(kind)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low
