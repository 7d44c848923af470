"""Named protocols that divide a log's rows 8:1:1 into train, val and test.

random     rows drawn at random: every user may occur in every part
temporal   by time: the oldest 80 % train, the newest 10 % test; equal times stay in file order
user       users drawn at random, no user in two parts; 8:1:1 of the users, roughly of the rows
official   by position in the file, as the published code cuts it
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import numpy as np

from m3oe_fast.data.options import SplitName
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.errors import DataError

SPLITS: tuple[str, ...] = get_args(SplitName)


class Rows(NamedTuple):
    """Row numbers of each part, int64, increasing (for temporal: in order of time)."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def split_rows(log: RawLog, split: str, seed: int) -> Rows:
    """Divide the rows of ``log``; every row lands in exactly one part.

    Args:
        split: a name of ``SPLITS``.
        seed: of the random and user splits, not negative.

    Raises:
        DataError: an unknown split, a missing user or time column, or a part that would be empty.
    """
    if split not in SPLITS:
        raise DataError(f"--split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    if seed < 0:
        raise DataError(f"--split_seed {seed} is negative; choose 0 or more")
    rows = _SPLITTERS[split](log, np.random.default_rng(seed))
    for part, numbers in zip(Rows._fields, rows, strict=True):
        if len(numbers) == 0:
            raise DataError(
                f"{log.where}: split {split} leaves {part} without rows ({len(log)} rows in all); "
                "take a larger log or another --split"
            )
    return rows


def _cut(order: np.ndarray) -> Rows:
    first, second = len(order) * 8 // 10, len(order) * 9 // 10
    return Rows(order[:first], order[first:second], order[second:])


def _random(log: RawLog, rng: np.random.Generator) -> Rows:
    # Sorted: a part's rows then lie in file order, and evaluation reads the source sequentially.
    return Rows(*map(np.sort, _cut(rng.permutation(len(log)))))


def _temporal(log: RawLog, rng: np.random.Generator) -> Rows:
    if log.time is None:
        raise DataError(f"{log.where}: split temporal needs a column timestamp; choose another --split")
    missing = np.flatnonzero(np.isnan(log.time))
    if len(missing):
        raise DataError(
            f"{log.where}: split temporal, but {len(missing)} rows have no timestamp; fill it in "
            "or choose another --split"
        )
    return _cut(np.argsort(log.time, kind="stable"))


def _user(log: RawLog, rng: np.random.Generator) -> Rows:
    if log.user is None:
        raise DataError(f"{log.where}: split user needs a column user_id; choose another --split")
    codes = log.user.codes  # -1, no user, counts as one more user
    part_of = np.empty(len(log.user.values) + 1, np.int8)
    for part, users in enumerate(_cut(rng.permutation(np.unique(codes)))):
        part_of[users] = part
    return Rows(*(np.flatnonzero(part_of[codes] == part) for part in range(3)))


def _official(log: RawLog, rng: np.random.Generator) -> Rows:
    return _cut(np.arange(len(log)))


_SPLITTERS = {"random": _random, "temporal": _temporal, "user": _user, "official": _official}
