"""Features that give a label away: each alone is tried as a predictor of each task.

A column that is known only afterwards (a purchase among the features of a click) makes every score look splendid and
is worth nothing in service. On a sample of training rows an id field or bag is scored by the mean label of its values
in one half of the sample, measured on the other half, so that ids seen once prove nothing; a dense feature is scored
by its value, in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from m3oe_fast import metrics
from m3oe_fast.data.arrow_columns import Coded
from m3oe_fast.data.hashing import hash_texts, mixed
from m3oe_fast.data.table import take_bag

SAMPLE_ROWS = 200_000
SUSPICIOUS_AUC = 0.99
MIN_EACH = 30  # rows of each class: with fewer, chance might do it
_SEED = 0x1EAC

Sampled = dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]


class Sample:
    """At most ``size`` training rows, the ones with the least draw; draws depend on the row's number alone.

    A column is float64 [n] (dense, or a label of task t as "label:t"), uint64 [n] (an id's hash) or, for a bag,
    (hashes uint64 [m], offsets [n+1]).
    """

    def __init__(self, size: int = SAMPLE_ROWS) -> None:
        self._size = size
        self._limit = np.uint64(2**64 - 1)
        self._draws: list[np.ndarray] = []
        self._pieces: list[Sampled] = []
        self._rows = 0

    def choose(self, rows: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of some rows to add: their places int64 [k] and draws uint64 [k].

        Args:
            rows: int64 [n], numbers in the log.
            train: bool [n].
        """
        draws = mixed(rows, _SEED)
        places = np.flatnonzero(train & (draws <= self._limit))
        return places, draws[places]

    def add(self, draws: np.ndarray, columns: Sampled) -> None:
        """Add the rows that ``choose`` chose; the same columns each time."""
        self._draws.append(draws)
        self._pieces.append(columns)
        self._rows += len(draws)
        if self._rows > 2 * self._size:
            self._shrink()

    def columns(self) -> tuple[np.ndarray, Sampled]:
        """The draws, uint64 [n], and columns of the sample."""
        self._shrink()
        return self._draws[0], self._pieces[0]

    def _shrink(self) -> None:
        draws = np.concatenate(self._draws) if self._draws else np.empty(0, np.uint64)
        columns = {name: _stacked([piece[name] for piece in self._pieces]) for name in self._pieces[0]}
        if len(draws) > self._size:
            kept = np.sort(np.argpartition(draws, self._size)[: self._size])
            draws = draws[kept]
            columns = {name: _taken(column, kept) for name, column in columns.items()}
            self._limit = draws.max()
        self._draws, self._pieces, self._rows = [draws], [columns], len(draws)


def hashed(coded: Coded, places: np.ndarray) -> np.ndarray:
    """uint64 [k]: hashes of the texts at ``places``; 0 where there is none, which may tell something too."""
    used, inverse = np.unique(coded.codes[places], return_inverse=True)
    texts = ["" if code < 0 else coded.texts[code] for code in used]
    hashes = hash_texts(texts)
    hashes[[not text for text in texts]] = 0
    return hashes[inverse]


def hashed_bag(coded: Coded, offsets: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bags at ``places``: hashes uint64 [m] of their texts and offsets int64 [k+1]."""
    codes, offsets = take_bag(coded.codes, offsets, places)
    return hashed(Coded(codes, coded.texts), np.arange(len(codes))), offsets


def warnings(sample: Sample, features: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """A line for each (feature, task) whose AUC exceeds ``SUSPICIOUS_AUC``.

    Args:
        sample: columns ``features`` and "label:<task>" for each task, at least one row.
    """
    draws, columns = sample.columns()
    fit = mixed(draws, _SEED) & np.uint64(1) == 0
    lines = []
    for task in tasks:
        label = columns[f"label:{task}"]
        for name in features:
            auc = _auc_of(columns[name], label, fit)
            if auc is not None and auc > SUSPICIOUS_AUC:
                lines.append(
                    f"feature {name} alone predicts task {task} with AUC {auc:.4f} on {len(label):,} training rows; "
                    "leave it out if it is known only afterwards"
                )
    return lines


def _auc_of(column: np.ndarray | tuple[np.ndarray, np.ndarray], label: np.ndarray, fit: np.ndarray) -> float | None:
    seen = ~np.isnan(label)
    if isinstance(column, np.ndarray) and column.dtype.kind == "f":
        auc = _auc(column[seen], label[seen])
        return None if auc is None else max(auc, 1 - auc)
    scored = seen & ~fit
    score = _mean_labels(column, label, seen & fit)
    return _auc(score[scored], label[scored])


def _mean_labels(column: np.ndarray | tuple[np.ndarray, np.ndarray], label: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """float64 [n]: each row's mean, over its values, of the mean label that the value has in the rows ``fit``."""
    values, offsets = column if isinstance(column, tuple) else (column, np.arange(len(column) + 1))
    overall = label[fit].mean() if fit.any() else 0.0
    row = np.repeat(np.arange(len(label)), np.diff(offsets))
    _, value = np.unique(values, return_inverse=True)
    size = int(value.max(initial=-1)) + 1
    used = fit[row]
    count = np.bincount(value[used], minlength=size)
    total = np.bincount(value[used], label[row[used]], minlength=size)
    mean = np.where(count > 0, total / np.maximum(count, 1), overall)
    lengths = np.diff(offsets)
    return np.where(lengths > 0, np.bincount(row, mean[value], minlength=len(label)) / np.maximum(lengths, 1), overall)


def _auc(score: np.ndarray, label: np.ndarray) -> float | None:
    """AUC of a score, None with few rows of a class."""
    positive = label > 0.5
    if min(positive.sum(), (~positive).sum()) < MIN_EACH:
        return None
    return metrics.auc(score, positive).value


def _stacked(
    pieces: list[np.ndarray | tuple[np.ndarray, np.ndarray]],
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    if not isinstance(pieces[0], tuple):
        return np.concatenate(pieces)
    lengths = np.concatenate([np.diff(offsets) for _, offsets in pieces])
    return np.concatenate([values for values, _ in pieces]), np.concatenate([[0], np.cumsum(lengths)])


def _taken(
    column: np.ndarray | tuple[np.ndarray, np.ndarray], rows: np.ndarray
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    return take_bag(*column, rows) if isinstance(column, tuple) else column[rows]
