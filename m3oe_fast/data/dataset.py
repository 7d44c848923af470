"""A prepared log, opened: memory-mapped columns per part, and batches gathered from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.encode import Encoder
from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import DATASET, ENCODER, PARTS, check, read_json, read_part
from m3oe_fast.errors import DataError

MAX_SHOWN = 8  # domains with a column of their own in the summary


class Part:
    """The N rows of train, val or test, in stored order.

    Args:
        columns: the columns of a part's file (see ``store``), usually memory-mapped.
        schema: what they must fit.
        where: the file, for messages.

    Raises:
        DataError: a column is missing, or a value lies outside the schema (rows counted from 0).
    """

    def __init__(self, columns: dict[str, np.ndarray], schema: Schema, where: str) -> None:
        names = [f"id:{field}" for field in schema.fields]
        wanted = {*names, "domain", "label", *(["dense"] if schema.dense else [])}
        if wanted - columns.keys():
            lacking = ", ".join(sorted(wanted - columns.keys()))
            raise DataError(f"{where}: lacks the columns {lacking}; prepare the log again")
        self._ids = [columns[name] for name in names]
        self.domain: np.ndarray = columns["domain"]
        self.label: np.ndarray = columns["label"]
        self._dense = columns["dense"] if schema.dense else np.empty((len(self), 0), np.float32)
        for name, ids, size in zip(schema.fields, self._ids, schema.vocab_sizes, strict=True):
            _refuse(ids >= size, ids, where, name, f"beyond the vocabulary of {size} ids")
        size = len(schema.domains)
        _refuse(self.domain >= size, self.domain, where, "domain", f"out of range, {size} domains")
        for place, name in enumerate(schema.dense):
            column = self._dense[:, place]
            _refuse(~np.isfinite(column), column, where, name, "not finite")
        for place, name in enumerate(schema.tasks):
            column = self.label[:, place]
            wrong = ~(np.isnan(column) | (column == 0) | (column == 1))
            _refuse(wrong, column, where, name, "neither 0 nor 1 nor missing")

    def __len__(self) -> int:
        return len(self.domain)

    def permutation(self, seed: int, epoch: int) -> np.ndarray:
        """The N row numbers, int64, in an order that (seed, epoch), both >= 0, alone decide."""
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def take(self, rows: np.ndarray) -> Batch:
        """The rows numbered ``rows`` (int [B], in any order) as a batch of its own memory."""
        return self._gather(rows, len(rows))

    def batches(self, batch_size: int, order: np.ndarray | None = None) -> Iterator[Batch]:
        """The rows ``order`` (int [n]; None: all, as stored) in batches; the last may be short."""
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        total = len(self) if order is None else len(order)
        for start in range(0, total, batch_size):
            stop = min(start + batch_size, total)
            rows = slice(start, stop) if order is None else order[start:stop]
            yield self._gather(rows, stop - start)

    def _gather(self, rows: np.ndarray | slice, size: int) -> Batch:
        ids = np.empty((size, len(self._ids)), np.int32)
        for place, column in enumerate(self._ids):
            ids[:, place] = column[rows]
        # np.array copies: a slice is a read-only view of the file, which torch cannot hold.
        dense, label = np.array(self._dense[rows]), np.array(self.label[rows])
        return Batch.from_numpy(ids, dense, self.domain[rows].astype(np.int64), label)


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
    paths = {part: folder / f"{part}.arrow" for part in PARTS}
    parts = {part: Part(read_part(path), encoder.schema, str(path)) for part, path in paths.items()}
    facts["warnings"] = tuple(facts["warnings"])
    return Dataset(**facts, **parts, schema=encoder.schema, encoder=encoder, folder=folder)


def _cells(count: dict[str, Any], shown: tuple[str, ...]) -> list[str]:
    """One row of the summary's table: totals, then the domains ``shown``."""
    domains = (f"{domain['rows']:,} ({_number(domain['users'])})" for domain in map(count["domains"].get, shown))
    return [f"{count['rows']:,}", _number(count["users"]), _number(count["new_users"]), *domains]


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _refuse(wrong: np.ndarray, values: np.ndarray, where: str, name: str, fault: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"{where}, row {row}, field {name}: {values[row]} is {fault}; prepare the log again")
