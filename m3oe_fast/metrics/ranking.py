"""AUC of any number of groups of rows at once, from one sort of 64-bit integers.

A row is packed as group (31 bits), score (32 bits, ordered as float32 numbers are), class (1 bit). Sorted, rows of
equal group and score form a run, the negatives first; what is computed from the counts of the runs are whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from m3oe_fast.metrics.scores import NO_ROWS, NOT_FINITE, ONLY_NEGATIVES, ONLY_POSITIVES, Measure

MOST_GROUPS = 1 << 31
_ONE, _KEY_BITS = np.uint64(1), np.uint64(32)
_SIGN = np.uint32(1 << 31)


@dataclass(frozen=True)
class Runs:
    """Rows counted by group and score.

    Attributes:
        code: uint64 [R], group * 2**32 + score key, strictly ascending.
        negatives, positives: int64 [R].
    """

    code: np.ndarray
    negatives: np.ndarray
    positives: np.ndarray

    def __len__(self) -> int:
        return len(self.code)


@dataclass(frozen=True)
class Areas:
    """What the AUC of each group is made of.

    Attributes:
        group: int64 [G], ascending; groups without rows are not there.
        negatives, positives: int64 [G].
        twice_ordered: [G], twice the number of (positive, negative) pairs in order, where a tie counts half; int64, or
            float64 where that would overflow.
        tied: [G], pairs that tie; of the same type.
    """

    group: np.ndarray
    negatives: np.ndarray
    positives: np.ndarray
    twice_ordered: np.ndarray
    tied: np.ndarray


def keys_of(score: np.ndarray) -> np.ndarray:
    """uint32 [...] in the order of ``score`` (float32 [...], finite); the signed zeros are equal."""
    bits = (score + np.float32(0.0)).view(np.uint32)  # -0.0 + 0.0 is 0.0
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def runs_of_rows(group: np.ndarray | None, key: np.ndarray, positive: np.ndarray) -> Runs:
    """Count rows.

    Args:
        group: int [n] in [0, 2**31); None: all the same.
        key: uint32 [n], as from `keys_of`.
        positive: bool [n].
    """
    packed = key.astype(np.uint64)
    packed <<= _ONE
    packed |= positive
    if group is not None:
        packed |= group.astype(np.uint64) << np.uint64(33)
    packed.sort()
    code = packed >> _ONE
    starts = _starts(code)
    packed &= _ONE
    positives = _sums(packed.view(np.int64), starts)
    return Runs(code[starts], np.diff(starts, append=len(code)) - positives, positives)


def combined(code: np.ndarray, negatives: np.ndarray, positives: np.ndarray) -> Runs:
    """Runs of counts in any order; equal codes are added up."""
    order = np.argsort(code, kind="stable")  # often two or more ascending parts, which it merges
    return _added(code[order], negatives[order], positives[order])


def coarsened(runs: Runs, bits: int) -> Runs:
    """The same rows with the lowest ``bits`` (0..32) of every score cleared."""
    if not bits:
        return runs
    return _added(runs.code & ~np.uint64((1 << bits) - 1), runs.negatives, runs.positives)


def areas(runs: Runs) -> Areas:
    """Count the pairs in order of each group of ``runs``."""
    group = (runs.code >> _KEY_BITS).view(np.int64)
    starts = _starts(group)
    group = group[starts]
    negatives, positives = _sums(runs.negatives, starts), _sums(runs.positives, starts)
    most = int(negatives.max(initial=0)) * int(positives.max(initial=0)) * 2
    number = np.int64 if most < 2**63 else np.float64
    # In place, since this is where a meter needs most memory.
    below = np.cumsum(runs.negatives)
    below -= runs.negatives
    below -= np.repeat(below[starts], np.diff(starts, append=len(below)))
    below = below.astype(number, copy=False)
    below *= 2
    below += runs.negatives
    below *= runs.positives
    tied = np.multiply(runs.positives, runs.negatives, dtype=number)
    return Areas(group, negatives, positives, _sums(below, starts), _sums(tied, starts))


def auc(score: np.ndarray, positive: np.ndarray) -> Measure:
    """Area under the ROC curve: the share of (positive, negative) pairs in order, a tie is half.

    Args:
        score: float32 [n], any monotone score (logits are fine); of another type it is rounded to float32.
        positive: bool [n].
    """
    score = np.asarray(score, np.float32)
    if not len(score):
        return Measure(None, NO_ROWS)
    if not np.isfinite(score).all():
        return Measure(None, NOT_FINITE)
    found = areas(runs_of_rows(None, keys_of(score), positive))
    return measure_of(found, 0)


def measure_of(found: Areas, place: int, exact: bool = True) -> Measure:
    """The AUC of the group at ``place`` of ``found``; scores that only ``exact`` tells apart may count as ties."""
    negatives, positives = int(found.negatives[place]), int(found.positives[place])
    if not negatives:
        return Measure(None, ONLY_POSITIVES)
    if not positives:
        return Measure(None, ONLY_NEGATIVES)
    twice = 2 * positives * negatives
    within = 0.0 if exact else found.tied[place].item() / twice
    return Measure(found.twice_ordered[place].item() / twice, within=within)


def _added(code: np.ndarray, negatives: np.ndarray, positives: np.ndarray) -> Runs:
    """Runs of ascending codes that may repeat."""
    starts = _starts(code)
    return Runs(code[starts], _sums(negatives, starts), _sums(positives, starts))


def _starts(code: np.ndarray) -> np.ndarray:
    """int64: where in ascending ``code`` a new value begins."""
    new = np.ones(len(code), bool)
    np.not_equal(code[1:], code[:-1], out=new[1:])
    return np.flatnonzero(new)


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, starts) if len(starts) else values[:0]
