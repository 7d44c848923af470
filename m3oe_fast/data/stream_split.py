"""The protocols of ``splits`` for rows that stream by: which part a row belongs to, chunk by chunk.

random     a draw that (split seed, number of the row in the log) alone decide: 8:1:1 up to chance
temporal   exactly as in ``splits``: the rows at 80 and 90 % of the order by time, equal times in file order, are
           found by counting (a radix selection over the times, spilled to a file: 8 bytes per row on disk, a
           megabyte in memory). Rows stay in file order within their part
user       a draw from (split seed, hash of the user): 8:1:1 of the users up to chance; rows without one are one user
official   by position in the files, one after the other; where the publisher gives files for testing, the others
           train, and a draw as in random halves the given ones into val and test
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from m3oe_fast.data.chunk import Chunk
from m3oe_fast.data.hashing import mixed
from m3oe_fast.data.log_files import LogFile
from m3oe_fast.data.splits import SPLITS
from m3oe_fast.data.tabular import TabularLog
from m3oe_fast.errors import DataError

_DIGIT_BITS = 16
_READ_ROWS = 1 << 20
_TRAIN, _VAL = (np.uint64(2**64 * tenths // 10) for tenths in (8, 9))
_HALF = _SIGN = np.uint64(1 << 63)

Assign = Callable[[Chunk], np.ndarray]
"""Part of each row of a chunk, int8 [n]: 0 train, 1 val, 2 test. Chunks must come in order, none left out."""


class Split(NamedTuple):
    """How to divide a log.

    Attributes:
        columns: what a chunk must hold.
        start: begins a pass over all chunks.
    """

    columns: tuple[str, ...]
    start: Callable[[], Assign]


def make_split(log: TabularLog, split: str, seed: int, scratch: Path) -> Split:
    """Prepare to divide ``log``; temporal and, for CSV, official read it once for this.

    Args:
        split: a name of ``SPLITS``.
        seed: of the draws, not negative.
        scratch: a folder for a temporary file without a name.

    Raises:
        DataError: an unknown split, a missing user or time column, a row without time.
    """
    if split not in SPLITS:
        raise DataError(f"--split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0:
        raise DataError(f"--split_seed {seed} is negative; choose 0 or more")
    user, timestamp = log.schema.user, log.schema.timestamp
    if split == "random":
        return Split((), lambda: lambda chunk: _drawn(chunk.rows, seed))
    if split == "official" and log.given_test:
        return Split((), lambda: lambda chunk: _given(chunk, log.given_test, seed))
    if split == "official":
        ends = np.array(_ends(log.count_rows()))
        return Split((), lambda: lambda chunk: np.searchsorted(ends, chunk.rows, side="right").astype(np.int8))
    if split == "user":
        if user is None:
            raise DataError(
                f"{log.path}: split user needs a user; name its column in the schema, or choose another --split"
            )
        return Split((user,), lambda: lambda chunk: _drawn(chunk.user(user), seed))
    if timestamp is None:
        raise DataError(
            f"{log.path}: split temporal needs a timestamp; name its column in the schema, or choose another --split"
        )
    cuts = _temporal_cuts(log, timestamp, scratch)
    return Split((timestamp,), lambda: _Temporal(timestamp, cuts))


class Cut(NamedTuple):
    """The rows before a place in the order by time: those with a lesser key, and the first ``ties`` with this one."""

    key: int
    ties: int


class _Temporal:
    """Assigns by two cuts; how many rows with a cut's key have gone by is all it remembers."""

    def __init__(self, column: str, cuts: tuple[Cut, Cut]) -> None:
        self._column, self._cuts = column, cuts
        self._seen = [0, 0]

    def __call__(self, chunk: Chunk) -> np.ndarray:
        key = chunk.time(self._column)
        part = np.zeros(len(key), np.int8)
        for place, cut in enumerate(self._cuts):
            equal = np.flatnonzero(key == cut.key)
            before = key < cut.key
            before[equal[: max(cut.ties - self._seen[place], 0)]] = True
            self._seen[place] += len(equal)
            part += ~before
        return part


def _drawn(numbers: np.ndarray, seed: int) -> np.ndarray:
    draw = mixed(numbers, seed)
    return (draw >= _TRAIN).astype(np.int8) + (draw >= _VAL).astype(np.int8)


def _given(chunk: Chunk, given_test: tuple[LogFile, ...], seed: int) -> np.ndarray:
    if chunk.file not in given_test:
        return np.zeros(len(chunk), np.int8)
    return 1 + (mixed(chunk.rows, seed) >= _HALF).astype(np.int8)


def _ends(rows: int) -> tuple[int, int]:
    return rows * 8 // 10, rows * 9 // 10


def _temporal_cuts(log: TabularLog, timestamp: str, scratch: Path) -> tuple[Cut, Cut]:
    with tempfile.TemporaryFile(dir=scratch) as file:
        rows = 0
        for chunk in log.chunks((timestamp,)):
            # The sign bit turned round, so that keys sort as unsigned numbers, digit by digit.
            file.write((chunk.time(timestamp).view(np.uint64) ^ _SIGN).tobytes())
            rows += len(chunk)
        file.flush()
        first, second = _ends(rows)
        return _select(file.fileno(), rows, first), _select(file.fileno(), rows, second)


def _select(file: int, rows: int, rank: int) -> Cut:
    """The cut before the row of rank ``rank`` (from 0) in the stable order of the keys in ``file``."""
    prefix, ties = 0, rank
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for keys in _blocks(file, rows):
            if shift + _DIGIT_BITS < 64:
                keys = keys[keys >> np.uint64(shift + _DIGIT_BITS) == np.uint64(prefix)]
            digits = (keys >> np.uint64(shift)) & np.uint64((1 << _DIGIT_BITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
        below = np.cumsum(counts) - counts
        digit = int(np.searchsorted(below, ties, side="right")) - 1
        prefix, ties = prefix << _DIGIT_BITS | digit, ties - int(below[digit])
    return Cut(prefix - 2**63, ties)


def _blocks(file: int, rows: int) -> Iterator[np.ndarray]:
    for start in range(0, rows, _READ_ROWS):
        count = min(_READ_ROWS, rows - start)
        yield np.frombuffer(os.pread(file, 8 * count, 8 * start), np.uint64)
