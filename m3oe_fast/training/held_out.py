"""The training rows that belong to the fusion weights alone, and the batches of their steps."""

from __future__ import annotations

import numpy as np

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Part
from m3oe_fast.data.table import Table, joined
from m3oe_fast.errors import DataError
from m3oe_fast.training.options import TrainOptions

MAX_ROWS = 1 << 20
"""Held-out rows are kept in memory, and a million of them judge four weights well enough."""

_STREAM = 0x6F75746572  # keeps these draws apart from the permutations of the inner level
_CHUNK = 1 << 18


class HeldOut:
    """Rows of a training part, and seeded batches of them; every draw is a function of (seed, number).

    Args:
        part: the training part.
        options: ``bilevel`` decides whether rows are held out (``TrainOptions.holds_out``), and ``outer_fraction`` how
            many. In the published mode the batches are drawn from all rows, and no row is held out.
        name: of the data set, for messages.

    Attributes:
        mask: bool [N], True for a row that no inner step sees; None if there is none.
        batch_rows: rows of a batch.

    Raises:
        DataError: a single row cannot be divided.
    """

    def __init__(self, part: Part, options: TrainOptions, name: str) -> None:
        self._seed = options.seed
        self.mask: np.ndarray | None = None
        self._source: Part | Table = part
        if options.holds_out:
            if len(part) < 2:
                raise DataError(f"the training part of {name} has one row; use bilevel off or joint")
            self.mask = _choose(len(part), options)
            self._source = _gather(part, self.mask)
        self.batch_rows = min(options.batch_size, len(self._source))
        self._turn: tuple[int, np.ndarray] | None = None

    def batch(self, number: int) -> Batch:
        """The batch of outer step ``number`` (from 0): shuffled passes over the rows, none twice in a pass."""
        taken = self._source.take(self.rows(number))
        return taken.to_batch() if isinstance(taken, Table) else taken

    def rows(self, number: int) -> np.ndarray:
        """The rows of that batch, numbered among the held-out rows, or among all where none is held out."""
        size = self.batch_rows
        turn, position = divmod(number, len(self._source) // size)
        if self._turn is None or self._turn[0] != turn:
            self._turn = (turn, _draws(self._seed, 1 + turn).permutation(len(self._source)))
        return self._turn[1][position * size : (position + 1) * size]


def _choose(rows: int, options: TrainOptions) -> np.ndarray:
    """bool [rows]: about ``outer_fraction`` of them, drawn chunk by chunk so that memory stays at a byte a row."""
    fraction = min(options.outer_fraction, MAX_ROWS / rows)
    rng = _draws(options.seed, 0)
    mask = np.empty(rows, bool)
    for start in range(0, rows, _CHUNK):
        part = mask[start : start + _CHUNK]
        part[:] = rng.random(len(part)) < fraction
    if not mask.any() or mask.all():  # a handful of rows: both levels need one
        mask[:] = False
        mask[rng.integers(rows)] = True
    return mask


def _gather(part: Part, mask: np.ndarray) -> Table:
    """The rows of the mask, in memory; the part is read once from start to end, and does not stay there."""
    pieces = []
    for start in range(0, len(part), _CHUNK):
        own = np.flatnonzero(mask[start : start + _CHUNK])
        pieces.append(part.read([(start, min(start + _CHUNK, len(part)))]).take(own))
    return joined(pieces)


def _draws(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, _STREAM, number])
