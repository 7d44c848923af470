"""Sums of float64 numbers without rounding: whatever the order, the batches and the processes, the same bits.

A number is cut into integers of 27 bits at fixed places ("limbs"). Their sums are integers that float64 and then int64
hold exactly, and only the final result is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BITS = 27
_LOWEST = -4
"""Numbers below 2**(27 * _LOWEST), 3e-33, count as zero: no probability or loss so small shows in a mean."""
_HIGHEST = 4
"""Numbers must be below 2**(27 * (_HIGHEST + 1)), 4e40: a loss is at most 3.5e38, the largest float32."""
_BELOW = 2  # limbs that a number's 53 bits reach further down
_LIMBS = _HIGHEST - _LOWEST + 1 + _BELOW
_AT_ONCE = 1 << 24  # so many integers of 27 bits add up to less than 2**53


class ExactSum:
    """The sums of G groups.

    Holds up to 2**36 numbers per group, in 88 bytes per group.
    """

    def __init__(self, groups: int) -> None:
        self._limbs = np.zeros((groups, _LIMBS), np.int64)

    def add(self, values: np.ndarray, group: np.ndarray) -> None:
        """Add ``values`` (float64 [n], finite, 0 or above, below 4e40) to the sums of ``group`` (int64 [n])."""
        for start in range(0, len(values), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            self._add(values[part], group[part])

    def merge(self, other: ExactSum) -> None:
        """Add the sums of ``other``."""
        self._limbs += other._limbs

    def totals(self, groups: Sequence[int]) -> tuple[int, int]:
        """The sum over some groups as (numerator, denominator)."""
        limbs = self._limbs[groups].sum(axis=0, dtype=np.int64).tolist()
        numerator = sum(limb << (_BITS * place) for place, limb in enumerate(limbs))
        return numerator, 1 << (_BITS * (_BELOW - _LOWEST))

    def _add(self, values: np.ndarray, group: np.ndarray) -> None:
        fraction, exponent = np.frexp(values)
        limb = exponent // _BITS
        rest = np.ldexp(fraction, exponent - _BITS * limb)
        rest[limb < _LOWEST] = 0.0
        place = group * _LIMBS + np.maximum(limb, _LOWEST) + (_BELOW - _LOWEST)
        for below in range(_BELOW + 1):
            whole = np.floor(rest)
            found = np.bincount(place - below, weights=whole, minlength=self._limbs.size)
            self._limbs += found.reshape(self._limbs.shape).astype(np.int64)
            rest = (rest - whole) * 2.0**_BITS
