"""Every protocol divides all rows, 8:1:1, the way its name says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.splits import SPLITS, split_rows
from m3oe_fast.errors import DataError


def make_log(rows, users=None, time=None):
    user = None if users is None else Tokens(np.asarray(users, np.int32), tuple(map(str, range(99))))
    zeros = np.zeros(rows, np.int32)
    label = np.zeros((rows, 1), np.float32)
    return RawLog("log", {}, {}, zeros, DomainRule(), label, (LabelRule("t", "t"),), user, time)


@settings(deadline=None)
@given(st.sampled_from(SPLITS), st.integers(30, 300), st.integers(0, 9))
def test_each_row_lands_in_one_part(split, rows, seed):
    rng = np.random.default_rng(seed)
    log = make_log(rows, rng.integers(-1, 40, rows), rng.integers(0, 9, rows).astype(float))
    parts = split_rows(log, split, seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(rows))
    if split != "user":
        assert [len(part) for part in parts] == [
            rows * 8 // 10,
            rows * 9 // 10 - rows * 8 // 10,
            rows - rows * 9 // 10,
        ]


def test_random_depends_on_the_seed_alone():
    log = make_log(100)
    first, again, other = (split_rows(log, "random", seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, first, again))
    assert not np.array_equal(first.test, other.test)
    assert not np.array_equal(first.train, np.arange(80))


def test_temporal_trains_on_the_oldest_and_keeps_file_order_of_ties():
    time = np.array([5, 1, 9, 1, 3, 8, 8, 7, 2, 6], float)
    parts = split_rows(make_log(10, time=time), "temporal", 0)
    assert [part.tolist() for part in parts] == [[1, 3, 8, 4, 0, 9, 7, 5], [6], [2]]


@given(st.integers(10, 40), st.integers(0, 20))
def test_user_puts_no_user_into_two_parts(users, seed):
    rng = np.random.default_rng(seed)
    user = np.concatenate([np.arange(users), rng.integers(0, users, 200)])
    parts = split_rows(make_log(len(user), user), "user", seed)
    groups = [set(user[part].tolist()) for part in parts]
    assert sum(map(len, groups)) == users == len(set.union(*groups))
    assert [len(group) for group in groups[:2]] == [
        users * 8 // 10,
        users * 9 // 10 - users * 8 // 10,
    ]


def test_official_goes_by_position():
    parts = split_rows(make_log(20), "official", 7)
    assert np.array_equal(np.concatenate(parts), np.arange(20))


@pytest.mark.parametrize(
    ("log", "split", "seed", "message"),
    [
        (make_log(5), "random", 0, r"log: split random leaves val without rows \(5 rows in all\)"),
        (make_log(50, [0] * 50), "user", 0, "split user leaves train without rows"),
        (make_log(50), "user", 0, "split user needs a column user_id"),
        (make_log(50), "temporal", 0, "split temporal needs a column timestamp"),
        (make_log(50, time=np.full(50, np.nan)), "temporal", 0, "50 rows have no timestamp"),
        (make_log(50), "other", 0, "'other' is unknown; choose one of random, temporal, user"),
        (make_log(50), "random", -1, "--split_seed -1 is negative"),
    ],
)
def test_impossible_splits(log, split, seed, message):
    with pytest.raises(DataError, match=message):
        split_rows(log, split, seed)
