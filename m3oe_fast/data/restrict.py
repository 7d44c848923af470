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
        if (nobody := self._base.users(0, 0)) is None or not len(rows):
            return nobody
        # Rows of a small domain lie far apart: not all users between the first and the last of them at once.
        near = np.split(rows, np.flatnonzero(np.diff(rows // _CHUNK)) + 1)
        return np.concatenate([self._base.users(some[0], some[-1] + 1)[some - some[0]] for some in near])

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


def labelled_rows(dataset: Dataset, domains: Sequence[int], tasks: Sequence[int]) -> Rows:
    """The rows of some domains that have a label of some of these tasks, of each part.

    One pass over each part; memory is 8 bytes a row found, and meanwhile a byte a row of the part.
    """
    wanted = np.zeros(len(dataset.schema.domains), bool)
    wanted[list(domains)] = True
    found: Rows = {}
    for part in PARTS:
        is_found, start = np.zeros(len(getattr(dataset, part)), bool), 0
        for batch in getattr(dataset, part).batches(_CHUNK):
            labelled = ~np.isnan(batch.label.numpy()[:, list(tasks)]).all(1)
            is_found[start : start + len(labelled)] = wanted[batch.domain.numpy()] & labelled
            start += len(labelled)
        found[part] = np.flatnonzero(is_found)
    return found


def restrict(dataset: Dataset, domains: Sequence[int], tasks: Sequence[int], rows: Rows) -> Dataset:
    """Some domains and tasks as a data set of their own.

    It has no encoder: that of the whole log would give rows the numbers of all its domains.

    Args:
        dataset: the whole log.
        domains, tasks: which ones, counted from 0, ascending.
        rows: those of `labelled_rows`.
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
