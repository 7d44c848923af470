"""Some domains and tasks of a prepared log as a log of its own, with the same columns.

Nothing is copied: a restricted part holds the numbers of its rows and reads them from the part it is a view of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import torch

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.data.store import PARTS
from m3oe_fast.data.table import Table

_CHUNK = 1 << 18


class RestrictedPart(Part):
    """Some rows of a part, of some domains, with some of its labels.

    Args:
        base: the part they are of.
        rows: their numbers in it, increasing int64 [n].
        domains: those of the rows, in the order in which the view numbers them from 0.
        tasks: which of the T labels, in the order of the view.
    """

    def __init__(self, base: Part, rows: np.ndarray, domains: Sequence[int], tasks: Sequence[int]) -> None:
        self._base, self._rows, self._tasks = base, rows, list(tasks)
        self._number = np.zeros(max(domains) + 1, np.int64)
        self._number[list(domains)] = np.arange(len(domains))

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def domain(self) -> np.ndarray:
        """uint8 [n], numbered as in the view; uint16 of more than 256 domains."""
        number = self._number.astype(np.uint8 if len(self._number) <= 1 << 8 else np.uint16)
        return number[self._base.domain[self._rows]]

    @cached_property
    def label(self) -> np.ndarray:
        """float32 [n,T] of the view's tasks."""
        return self.take(np.arange(len(self))).label.numpy()

    def users(self, start: int, stop: int) -> np.ndarray | None:
        """Whom the rows start .. stop-1 are about, as ``Part.users``."""
        rows = self._rows[start:stop]
        first = int(rows[0]) if len(rows) else 0
        users = self._base.users(first, int(rows[-1]) + 1 if len(rows) else 0)
        return None if users is None else users[rows - first]

    def take(self, rows: np.ndarray) -> Batch:
        """The rows numbered ``rows`` (int [B], in any order) as a batch of its own memory."""
        batch = self._base.take(self._rows[rows])
        label = batch.label[:, self._tasks].contiguous()
        return batch._replace(domain=torch.from_numpy(self._number)[batch.domain], label=label)

    def read(self, ranges: Iterable[tuple[int, int]]) -> Table:
        """The rows start .. stop-1 of each (start, stop), range after range, in memory of their own."""
        batch = self.take(np.concatenate([np.empty(0, np.int64), *(np.arange(*ends) for ends in ranges)]))
        return Table(
            tuple(batch.ids.numpy().T),
            batch.dense.numpy(),
            batch.domain.numpy(),
            batch.label.numpy(),
            None if batch.row_weight is None else batch.row_weight.numpy(),
            tuple((bag.values.numpy(), bag.offsets.numpy()) for bag in batch.bags),
        )


Rows = dict[str, np.ndarray]
"""Row numbers int64 [n] by part: "train", "val", "test"."""


def rows_of_pairs(dataset: Dataset) -> list[list[Rows]]:
    """The labelled rows of every (domain, task) pair: for each domain, for each task, those of each part.

    One pass over each part; memory is 8 bytes for each label that is there.
    """
    domains, tasks = len(dataset.schema.domains), len(dataset.schema.tasks)
    found: list[list[dict[str, list[np.ndarray]]]] = [
        [{part: [np.empty(0, np.int64)] for part in PARTS} for _ in range(tasks)] for _ in range(domains)
    ]
    for part in PARTS:
        start = 0
        for batch in getattr(dataset, part).batches(_CHUNK):
            domain, labelled = batch.domain.numpy(), ~np.isnan(batch.label.numpy())
            for d in np.unique(domain):
                for t in range(tasks):
                    found[d][t][part].append(start + np.flatnonzero((domain == d) & labelled[:, t]))
            start += len(domain)
    return [[{part: np.concatenate(rows) for part, rows in pair.items()} for pair in pairs] for pairs in found]


def labelled_rows(dataset: Dataset, domains: Sequence[int], tasks: Sequence[int]) -> Rows:
    """The rows of some domains that have a label of some of these tasks, of each part.

    One pass over each part; memory is 8 bytes a row found.
    """
    wanted = np.zeros(len(dataset.schema.domains), bool)
    wanted[list(domains)] = True
    found: Rows = {}
    for part in PARTS:
        numbers, start = [np.empty(0, np.int64)], 0
        for batch in getattr(dataset, part).batches(_CHUNK):
            labelled = ~np.isnan(batch.label.numpy()[:, list(tasks)]).all(1)
            numbers.append(start + np.flatnonzero(wanted[batch.domain.numpy()] & labelled))
            start += len(batch.domain)
        found[part] = np.concatenate(numbers)
    return found


def restrict(dataset: Dataset, domains: Sequence[int], tasks: Sequence[int], rows: Rows) -> Dataset:
    """Some domains and tasks as a data set of their own.

    It has no encoder: that of the whole log would give rows the numbers of all its domains.

    Args:
        dataset: the whole log.
        domains, tasks: which ones, counted from 0, ascending.
        rows: those of `labelled_rows`, or for one pair of `rows_of_pairs`.
    """
    schema = dataset.schema
    names, labels = tuple(schema.domains[d] for d in domains), tuple(schema.tasks[t] for t in tasks)
    parts = {part: RestrictedPart(getattr(dataset, part), rows[part], domains, tasks) for part in PARTS}
    counts = {
        part: {
            "rows": len(rows[part]),
            "users": None,
            "new_users": None,
            "domains": {
                name: {"rows": int(count), "users": None}
                for name, count in zip(names, np.bincount(view.domain, minlength=len(names)), strict=True)
            },
        }
        for part, view in parts.items()
    }
    return dataclasses.replace(
        dataset,
        **parts,
        name=f"{dataset.name} ({_some(names, schema.domains, 'domains')}, {_some(labels, schema.tasks, 'tasks')})",
        schema=dataclasses.replace(schema, domains=names, tasks=labels),
        encoder=None,
        best_auc=None,
        counts=counts,
        warnings=(),
        identity=f"{dataset.identity}/{'+'.join(map(str, domains))}/{'+'.join(map(str, tasks))}",
    )


def _some(names: Sequence[str], every: Sequence[str], what: str) -> str:
    return f"all {what}" if len(names) == len(every) > 1 else ", ".join(names)
