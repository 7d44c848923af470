"""One (domain, task) pair of a prepared log as a log of its own: one domain, one task, the same columns.

Nothing is copied: a restricted part holds the numbers of its rows and reads them from the part it is a view of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import cached_property

import numpy as np

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.data.store import PARTS
from m3oe_fast.data.table import Table

_CHUNK = 1 << 18


class RestrictedPart(Part):
    """Some rows of a part, all of one domain, with one of its labels.

    Args:
        base: the part they are of.
        rows: their numbers in it, increasing int64 [n].
        task: which of the T labels.
    """

    def __init__(self, base: Part, rows: np.ndarray, task: int) -> None:
        self._base, self._rows, self._task = base, rows, task

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def domain(self) -> np.ndarray:
        """uint8 [n], all 0."""
        return np.zeros(len(self), np.uint8)

    @cached_property
    def label(self) -> np.ndarray:
        """float32 [n,1]."""
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
        label = batch.label[:, self._task : self._task + 1].contiguous()
        return batch._replace(domain=batch.domain.new_zeros(batch.domain.shape), label=label)

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


def restrict(dataset: Dataset, domain: int, task: int, rows: Rows) -> Dataset:
    """The pair as a data set of D = 1 and T = 1.

    It has no encoder: that of the whole log would give rows the numbers of all its domains.

    Args:
        dataset: the whole log.
        domain, task: which pair, counted from 0.
        rows: of ``rows_of_pairs``.
    """
    schema = dataset.schema
    name, label = schema.domains[domain], schema.tasks[task]
    parts = {part: RestrictedPart(getattr(dataset, part), rows[part], task) for part in PARTS}
    counts = {
        part: {
            "rows": len(rows[part]),
            "users": None,
            "new_users": None,
            "domains": {name: {"rows": len(rows[part]), "users": None}},
        }
        for part in PARTS
    }
    return dataclasses.replace(
        dataset,
        **parts,
        name=f"{dataset.name} ({name}, {label})",
        schema=dataclasses.replace(schema, domains=(name,), tasks=(label,)),
        encoder=None,
        best_auc=None,
        counts=counts,
        warnings=(),
        identity=f"{dataset.identity}/{domain}/{task}",
    )
