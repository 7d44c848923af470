"""Training batches of a part, epoch by epoch, in a seeded order, from memory or from a file larger than it.

An epoch is a stream of rows cut into batches. Either the stream is a permutation of all rows, gathered through the
mapping of the file. Or it goes by windows: blocks of BLOCK_ROWS consecutive rows in a shuffled order, as many at a
time as a window holds, read from the file into memory of their own, and the rows of a window shuffled among
themselves. Either way the stream is a function of (seed, epoch) and of the rows left out, and so is batch k of it,
whether or not the batches before it are read.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Part
from m3oe_fast.data.prefetch import ahead
from m3oe_fast.data.table import Table, joined
from m3oe_fast.errors import CheckpointError, DataError

BLOCK_ROWS = 1 << 14
"""Rows read in one go: a few tens of KB a column, so the order of the blocks costs no speed even on a disk."""

# Keep the draws of blocks and windows apart from one another and from `Part.permutation`.
_BLOCKS, _WINDOWS = 1, 2


class Reader:
    """The batches of one part for training.

        reader = Reader(part, 4096, seed=0, window=1 << 20)
        for batch in reader.epoch(1): ...

    Args:
        part: the rows.
        batch_size: rows of every batch but the last of an epoch.
        seed: >= 0; decides, with the number of the epoch, the order.
        skip: bool [N], rows to leave out; None: none. Not copied: do not write to it afterwards.
        window: rows to shuffle at a time, rounded down to whole blocks, but at least one. 0, or no fewer than N: all
            rows at once. A window takes as much memory as its rows take in the file.
        prefetch: batches made ahead in a thread; 0: none, and no thread.
        pin: put batches into pinned memory, for an asynchronous copy to a GPU.

    Attributes:
        rows: rows of an epoch.
        steps_per_epoch: its batches.

    Raises:
        ValueError: an argument is out of range.
        DataError: no row is left.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        seed: int,
        *,
        skip: np.ndarray | None = None,
        window: int = 0,
        prefetch: int = 2,
        pin: bool = False,
    ) -> None:
        if batch_size < 1 or seed < 0 or window < 0 or prefetch < 0:
            raise ValueError(
                f"batch_size {batch_size} must be at least 1, seed {seed}, window {window} and prefetch {prefetch} "
                "at least 0"
            )
        if skip is not None and (skip.dtype != bool or skip.shape != (len(part),)):
            raise ValueError(f"skip is {skip.dtype} {skip.shape}, must be bool ({len(part)},)")
        self.part = part
        self.batch_size = batch_size
        self.seed = seed
        self.window = _whole_blocks(window, len(part))
        self._skip = skip
        self._prefetch = prefetch
        self._pin = pin
        self.rows = len(part) if skip is None else len(part) - int(np.count_nonzero(skip))
        if not self.rows:
            raise DataError("no training rows are left to read; hold fewer back")
        self.steps_per_epoch = math.ceil(self.rows / batch_size)
        self._position = {"epoch": 0, "batch": 0}

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch ``number`` (>= 0) from batch ``start`` on.

        Close the iterator, or drop it, to stop before the end. An error of the thread is raised here.

        Raises:
            ValueError: there is no such batch; ``start`` may be ``steps_per_epoch``, behind which nothing follows.
        """
        if number < 0 or not 0 <= start <= self.steps_per_epoch:
            raise ValueError(f"epoch {number}, batch {start}: an epoch has {self.steps_per_epoch} batches")
        return self._handed_out(number, start)

    def state_dict(self) -> dict[str, Any]:
        """Where the last iterator is, "epoch" and "batch" (the next one to come), and what decides its batches."""
        return {**self._position, **self._fixed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the position, to go on with ``epoch(*reader.position)``.

        Raises:
            CheckpointError: the state is of a reader of other batches, or lacks something.
        """
        for name, value in self._fixed().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the position in the training rows was saved with {name} {state.get(name)}, here it is {value}; "
                    f"resume with the {name} of the run"
                )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not (_is_count(epoch) and _is_count(batch) and batch <= self.steps_per_epoch):
            raise CheckpointError(
                f"the position in the training rows is epoch {epoch}, batch {batch} of {self.steps_per_epoch}; "
                "the checkpoint is damaged, take another"
            )
        self._position = {"epoch": epoch, "batch": batch}

    @property
    def position(self) -> tuple[int, int]:
        """The epoch and the batch that comes next in it."""
        return self._position["epoch"], self._position["batch"]

    def _fixed(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "window": self.window, "rows": self.rows}

    def _handed_out(self, number: int, start: int) -> Generator[Batch, None, None]:
        """The batches of an epoch, made ahead; counts those that the consumer has got, not those that are ready."""
        self._position = {"epoch": number, "batch": start}
        batches = self._windowed(number, start) if self.window else self._permuted(number, start)
        if self._pin:
            batches = _pinned(batches)
        if self._prefetch:
            batches = ahead(batches, self._prefetch)
        try:
            for place, batch in enumerate(batches, start=start + 1):
                self._position = {"epoch": number, "batch": place}
                yield batch
        finally:
            batches.close()

    def _permuted(self, number: int, start: int) -> Generator[Batch, None, None]:
        order = self.part.permutation(self.seed, number)
        if self._skip is not None:
            order = order[~self._skip[order]]
        yield from self.part.batches(self.batch_size, order[start * self.batch_size :])

    def _windowed(self, number: int, start: int) -> Generator[Batch, None, None]:
        """Cut the windows into batches; what is too little for one goes before the rows of the next window."""
        carried: list[Table] = []
        lacking = self.batch_size
        for table, order in self._windows(number, start * self.batch_size):
            place = 0
            while len(order) - place >= lacking:
                batch = joined([*carried, table.take(order[place : place + lacking])])
                place, lacking, carried = place + lacking, self.batch_size, []
                yield batch.to_batch()
            if place < len(order):
                carried.append(table.take(order[place:]))
                lacking -= len(order) - place
            del table  # before the next window is read
        if carried:
            yield joined(carried).to_batch()

    def _windows(self, number: int, done: int) -> Iterator[tuple[Table, np.ndarray]]:
        """The windows of an epoch behind its first ``done`` rows: rows, and the order (int [n]) to take them in.

        Windows that lie before are not read.
        """
        blocks = np.random.default_rng([self.seed, number, _BLOCKS]).permutation(math.ceil(len(self.part) / BLOCK_ROWS))
        for place, first in enumerate(range(0, len(blocks), self.window // BLOCK_ROWS)):
            ranges = [self._block(block) for block in blocks[first : first + self.window // BLOCK_ROWS].tolist()]
            kept = self._kept(ranges)
            if done >= len(kept):
                done -= len(kept)
                continue
            order = np.random.default_rng([self.seed, number, _WINDOWS, place]).permutation(kept)
            yield self.part.read(ranges), order[done:]
            done = 0

    def _block(self, number: int) -> tuple[int, int]:
        return number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, len(self.part))

    def _kept(self, ranges: list[tuple[int, int]]) -> np.ndarray:
        """Which rows of a window belong to the epoch, counted in the window: int64, ascending."""
        if self._skip is None:
            return np.arange(sum(stop - start for start, stop in ranges))
        return np.flatnonzero(~np.concatenate([self._skip[start:stop] for start, stop in ranges]))


def _whole_blocks(window: int, rows: int) -> int:
    """The window in whole blocks; 0 where it holds all rows."""
    return 0 if window == 0 or window >= rows else max(window // BLOCK_ROWS, 1) * BLOCK_ROWS


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _pinned(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    for batch in batches:
        yield batch.map(lambda tensor: tensor.pin_memory())
