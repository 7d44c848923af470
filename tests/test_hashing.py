"""Hashes that must never change, and draws that are even."""

import numpy as np
import pytest

from m3oe_fast.data import hashing
from m3oe_fast.data.hashing import buckets_of, hash_texts, mixed, user_codes
from m3oe_fast.errors import DataError


def test_values_are_those_of_every_version():
    assert hash_texts(["foo", "été", "123"]).tolist() == [
        3600424527151052760,
        5908516111345628981,
        16852809109140274091,
    ]
    assert buckets_of(["foo", "123", "été"], 1000).tolist() == [761, 92, 982]
    assert user_codes(["foo"]).tolist() == [3600424527151052760 >> 1]
    assert mixed(np.arange(3), 7).tolist() == [8409816773569330625, 13309476754707697221, 11984929618412882174]


def test_an_empty_text_is_no_value():
    assert buckets_of(["", "a"], 1).tolist() == [0, 1]
    assert user_codes(["", "a"])[0] == -1
    assert user_codes(["a"])[0] >= 0
    assert len(hash_texts([])) == 0


def test_another_hash_is_noticed(monkeypatch):
    monkeypatch.setattr(hashing, "_KNOWN", ("foo", 1))
    hashing._check.cache_clear()
    with pytest.raises(DataError, match=r"pandas \S+ hashes texts in another way than before"):
        hash_texts(["a"])
    hashing._check.cache_clear()


def test_draws_are_even_and_depend_on_both():
    draws = mixed(np.arange(200_000), 7)
    assert np.array_equal(draws[1000:1010], mixed(np.arange(1000, 1010), 7))
    assert not np.isin(draws[:1000], mixed(np.arange(1000), 8)).any()
    counts = np.bincount((draws >> np.uint64(60)).astype(np.int64), minlength=16)
    assert np.abs(counts - 12_500).max() < 6 * np.sqrt(12_500)
    assert len(np.unique(draws)) == len(draws)
    # Neighbouring seeds give unrelated draws.
    high = np.uint64(63)
    agree = ((draws >> high) == (mixed(np.arange(200_000), 8) >> high)).mean()
    assert 0.49 < agree < 0.51
