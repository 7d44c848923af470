"""A prepared log, opened: memory-mapped columns per part, and batches gathered from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.checks import check_columns, check_values
from m3oe_fast.data.encode import Encoder
from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import DATASET, ENCODER, PARTS, Columns, PartFile, check, read_json
from m3oe_fast.data.table import Copy, Table, joined, stacked

CHECK_ROWS = 1 << 18  # values checked at a time, to bound the memory it takes
MAX_SHOWN = 8  # domains with a column of their own in the summary


class Part:
    """The N rows of train, val or test, in stored order.

    Args:
        columns: the columns of each segment of a part's file (see ``store``), or those of its only one.
        schema: what they must fit.
        where: the file, for messages.
        copy: how to copy consecutive rows of a column; for mapped files ``PartFile.copyto``.

    Raises:
        DataError: a column is missing, or a value lies outside the schema (rows counted from 0).
    """

    def __init__(
        self, columns: Columns | Sequence[Columns], schema: Schema, where: str, copy: Copy = np.copyto
    ) -> None:
        segments = [columns] if isinstance(columns, dict) else list(columns)
        for segment in segments:
            check_columns(segment, schema, where)
        self._segments = [Table.of(segment, schema) for segment in segments]
        self._starts = [0, *accumulate(map(len, self._segments))]
        self._users = [segment["user"] for segment in segments] if "user" in segments[0] else None
        self._copy = copy
        for start in range(0, len(self), CHECK_ROWS):
            check_values(self.read([(start, min(start + CHECK_ROWS, len(self)))]), start, schema, where)

    def __len__(self) -> int:
        return self._starts[-1]

    @cached_property
    def domain(self) -> np.ndarray:
        """The domain of each row, unsigned [N]. For a large file read batches instead."""
        return _whole([segment.domain for segment in self._segments])

    @cached_property
    def label(self) -> np.ndarray:
        """The labels of each row, float32 [N,T]. For a large file read batches instead."""
        return _whole([segment.label for segment in self._segments])

    def users(self, start: int, stop: int) -> np.ndarray | None:
        """Whom the rows start .. stop-1 are about, int64, -1 unknown; None where the log tells of nobody."""
        if self._users is None:
            return None
        views = [self._users[number][first:last] for number, first, last in self._spans(start, stop)]
        return stacked(views or [self._users[0][:0]], self._copy)

    def permutation(self, seed: int, epoch: int) -> np.ndarray:
        """The N row numbers, int64, in an order that (seed, epoch), both >= 0, alone decide."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def take(self, rows: np.ndarray) -> Batch:
        """The rows numbered ``rows`` (int [B], in any order) as a batch of its own memory.

        Reads through the mapping of the file: its pages that hold these rows stay in memory.
        """
        if len(self._segments) == 1:
            return self._segments[0].take(rows).to_batch()
        return self._take_across(rows).to_batch()

    def read(self, ranges: Iterable[tuple[int, int]]) -> Table:
        """The rows start .. stop-1 of each (start, stop), range after range, in memory of their own.

        Reads past the mapping: nothing else of the file becomes resident.
        """
        spans = [span for start, stop in ranges for span in self._spans(start, stop)]
        pieces = [self._segments[number].rows(first, last) for number, first, last in spans]
        return joined(pieces or [self._segments[0].rows(0, 0)], self._copy)

    def batches(self, batch_size: int, order: np.ndarray | None = None) -> Iterator[Batch]:
        """The rows ``order`` (int [n]; None: all, as stored) in batches; the last may be short.

        In stored order memory holds no more than the batch, however large the file.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        total = len(self) if order is None else len(order)
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            yield self.read([(start, stop)]).to_batch() if order is None else self.take(order[start:stop])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where the rows start .. stop-1 lie: the number of a segment, and the first and the end of them in it."""
        for number in range(max(bisect_right(self._starts, start) - 1, 0), len(self._segments)):
            low, high = self._starts[number : number + 2]
            if low >= stop:
                break
            if max(start, low) < min(stop, high):
                yield number, max(start, low) - low, min(stop, high) - low

    def _take_across(self, rows: np.ndarray) -> Table:
        """``take`` from several segments: what each of them has, and then all in the order asked for."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} .. {rows.max()} of {len(self)}")
        number = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(number, kind="stable")
        bounds = np.searchsorted(number[order], np.arange(len(self._segments) + 1)).tolist()
        pieces = [
            segment.take(rows[order[first:last]] - start)
            for segment, start, (first, last) in zip(self._segments, self._starts, pairwise(bounds), strict=False)
        ]
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return joined(pieces).take(place)


@dataclass(frozen=True)
class Dataset:
    """A prepared log.

    Attributes:
        name: what the user called it.
        split: the protocol that divided its rows (see ``splits``).
        split_seed: the seed of that division.
        schema: names and sizes.
        encoder: encodes further raw rows the same way.
        train, val, test: the rows. ``.domain`` is unsigned and as small as it can be: widen it before arithmetic.
        best_auc: the test AUC of the true probabilities, keys "mean" and "<domain>/<task>", None where undefined; None
            as a whole for logs that were not generated.
        counts: for each part its "rows", "users", "new_users" (not among the training users), and
            "domains": {name: {"rows", "users"}}; users are None where the log names none.
        warnings: one line each.
        identity: digest of everything the prepared rows depend on.
        folder: where the prepared log lies.
        notes: one line each, for example on the rows that were left out.
    """

    name: str
    split: str
    split_seed: int
    schema: Schema
    encoder: Encoder
    train: Part
    val: Part
    test: Part
    best_auc: dict[str, float | None] | None
    counts: dict[str, Any]
    warnings: tuple[str, ...]
    identity: str
    folder: Path
    notes: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """For a person: the split, rows and users per part and domain, sizes, warnings."""
        seeded = f" (split seed {self.split_seed})" if self.split in ("random", "user") else ""
        fields = zip(self.schema.fields, self.schema.vocab_sizes, strict=True)
        shown, hidden = self.schema.domains[:MAX_SHOWN], len(self.schema.domains) - MAX_SHOWN
        more = [f"({hidden} more)"] if hidden > 0 else []
        rows = [["", "rows", "users", "not in train", *shown, *more]]
        rows += [[part, *_cells(self.counts[part], shown), *("" for _ in more)] for part in PARTS]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            f"data {self.name}, split {self.split}{seeded}; rows and (users) of each domain:",
            *("  ".join(map(str.rjust, row, widths)) for row in rows),
            "id fields " + ", ".join(f"{name} {size:,}" for name, size in fields),
            "dense     " + (", ".join(self.schema.dense) or "none"),
            "tasks     " + ", ".join(self.schema.tasks),
            *self.notes,
            *self._best(),
            *(f"warning: {line}" for line in self.warnings),
        ]

    def _best(self) -> list[str]:
        mean = None if self.best_auc is None else self.best_auc["mean"]
        return [] if mean is None else [f"best reachable mean test AUC {mean:.4f}"]


def open_dataset(folder: Path) -> Dataset:
    """Open a prepared folder; the columns stay on disk until they are read.

    Raises:
        Damaged: the folder is incomplete or a file differs from what was written.
        DataError: the files are intact, but their values contradict the schema.
    """
    check(folder)
    facts = read_json(folder / DATASET)
    encoder = Encoder.from_dict(read_json(folder / ENCODER))
    parts = {part: _open_part(folder / f"{part}.arrow", encoder.schema) for part in PARTS}
    facts |= {name: tuple(facts.get(name, ())) for name in ("notes", "warnings")}
    return Dataset(**facts, **parts, schema=encoder.schema, encoder=encoder, folder=folder)


def _open_part(path: Path, schema: Schema) -> Part:
    file = PartFile(path)
    return Part(file.segments, schema, str(path), file.copyto)


def _cells(count: dict[str, Any], shown: tuple[str, ...]) -> list[str]:
    """One row of the summary's table: totals, then the domains ``shown``."""
    domains = (f"{domain['rows']:,} ({_number(domain['users'])})" for domain in map(count["domains"].get, shown))
    return [f"{count['rows']:,}", _number(count["users"]), _number(count["new_users"]), *domains]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _whole(columns: list[np.ndarray]) -> np.ndarray:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
