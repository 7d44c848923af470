"""A 64-bit hash of texts that stays the same: over runs, machines and versions.

It is the SipHash of ``pandas.util.hash_array``, whose values the tests of pandas pin; should a version of pandas
ever compute another, ids of hashed fields would silently change, so that is checked before first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from m3oe_fast.errors import DataError

_KNOWN = ("foo", 3600424527151052760)


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """uint64 [n]: the hash of each of n texts.

    Raises:
        DataError: the installed pandas computes another hash.
    """
    _check()
    return _hash(texts)


def user_codes(texts: Sequence[str]) -> np.ndarray:
    """int64 [n], at least 0: the upper 63 bits of the hash; -1 for an empty text, which is no user."""
    codes = (hash_texts(texts) >> np.uint64(1)).astype(np.int64)
    codes[[not text for text in texts]] = -1
    return codes


def buckets_of(texts: Sequence[str], buckets: int) -> np.ndarray:
    """int64 [n]: 1 + hash modulo ``buckets``; 0 for an empty text, which is no value."""
    ids = 1 + (hash_texts(texts) % np.uint64(buckets)).astype(np.int64)
    ids[[not text for text in texts]] = 0
    return ids


def mixed(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n]: a draw that (number, seed) alone decide, even over all 64 bits (the finisher of SplitMix64).

    Args:
        numbers: int64 or uint64 [n], for example row numbers.
        seed: not negative.
    """
    start = _finished(np.array([seed & (2**64 - 1)], np.uint64) + _GAMMA)
    return _finished(numbers.astype(np.uint64) * _GAMMA + start)


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _finished(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _hash(texts: Sequence[str]) -> np.ndarray:
    values = np.empty(len(texts), object)
    values[:] = texts
    return pd.util.hash_array(values, categorize=False)


@lru_cache
def _check() -> None:
    text, wanted = _KNOWN
    if int(_hash([text])[0]) != wanted:
        raise DataError(f"pandas {pd.__version__} hashes texts in another way than before; install another version")
