"""A feature that tells the label is found, one that only looks like it is not."""

import numpy as np
import pytest

from m3oe_fast.data import leakage
from m3oe_fast.data.arrow_columns import Coded
from m3oe_fast.data.leakage import Sample, hashed, hashed_bag, warnings

ROWS = 4000


def sample_of(label, size=ROWS, chunk=500, **columns):
    sample = Sample(size)
    for start in range(0, len(label), chunk):
        rows = np.arange(start, min(start + chunk, len(label)))
        places, draws = sample.choose(rows, np.ones(len(rows), bool))
        taken = {name: column[rows[places]] for name, column in columns.items()}
        sample.add(draws, {**taken, "label:click": label[rows[places]]})
    return sample


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_features_known_only_afterwards_are_named(rng):
    label = rng.integers(0, 2, ROWS).astype(float)
    sample = sample_of(
        label,
        paid=label.astype(np.uint64) * 3 + 1,
        seconds=-label + rng.normal(0, 0.1, ROWS),  # in either direction
        noise=rng.normal(0, 1, ROWS),
        user=rng.integers(0, 50, ROWS).astype(np.uint64),
    )
    lines = warnings(sample, ["paid", "seconds", "noise", "user"], ["click"])
    assert [line.split()[:6] for line in lines] == [
        ["feature", name, "alone", "predicts", "task", "click"] for name in ("paid", "seconds")
    ]
    assert "AUC 1.0000" in lines[0]
    assert lines[0].endswith("leave it out if it is known only afterwards")


def test_ids_seen_once_prove_nothing(rng):
    label = rng.integers(0, 2, ROWS).astype(float)
    assert not warnings(sample_of(label, row=np.arange(ROWS).astype(np.uint64)), ["row"], ["click"])


def test_a_value_that_only_positives_lack_is_a_leak(rng):
    label = rng.integers(0, 2, ROWS).astype(float)
    reason = np.where(label == 1, 0, rng.integers(1, 9, ROWS)).astype(np.uint64)  # 0: missing
    assert len(warnings(sample_of(label, reason=reason), ["reason"], ["click"])) == 1


def test_bags(rng):
    label = rng.integers(0, 2, ROWS).astype(float)
    texts = ["bought", "a", "b", "c"]
    rows = [[*([0] if y else []), *rng.integers(1, 4, rng.integers(0, 3))] for y in label]
    codes = np.array([code for row in rows for code in row], np.int32)
    offsets = np.cumsum([0, *map(len, rows)])
    for only, found in ((codes, 1), (np.maximum(codes, 1), 0)):
        sample = Sample()
        places, draws = sample.choose(np.arange(ROWS), np.ones(ROWS, bool))
        bag = hashed_bag(Coded(only, texts), offsets, places)
        sample.add(draws, {"tags": bag, "label:click": label})
        assert len(warnings(sample, ["tags"], ["click"])) == found


@pytest.mark.parametrize("ones", [0, leakage.MIN_EACH - 1])
def test_few_rows_of_a_class_prove_nothing(ones):
    label = np.zeros(ROWS)
    label[:ones] = 1
    assert not warnings(sample_of(label, same=label + 0.0), ["same"], ["click"])


def test_missing_labels_are_left_out(rng):
    label = rng.integers(0, 2, ROWS).astype(float)
    value = label.copy()
    label[rng.random(ROWS) < 0.5] = np.nan
    value[np.isnan(label)] = 0.5
    assert len(warnings(sample_of(label, x=value), ["x"], ["click"])) == 1
    assert not warnings(sample_of(np.full(ROWS, np.nan), x=value), ["x"], ["click"])


def test_the_sample_is_bounded_and_does_not_depend_on_chunks():
    label = np.arange(10_000) % 2.0
    row = np.arange(10_000).astype(np.uint64)
    draws, columns = sample_of(label, 300, 500, row=row).columns()
    again, others = sample_of(label, 300, 9_999, row=row).columns()
    assert len(draws) == 300
    assert sorted(columns["row"]) == sorted(others["row"])
    assert sorted(draws) == sorted(again)
    assert np.abs(columns["row"].mean() - 5000) < 6 * 2887 / np.sqrt(300)


def test_validation_rows_are_never_sampled():
    sample = Sample()
    places, _ = sample.choose(np.arange(6), np.array([True, False, True, False, False, True]))
    assert places.tolist() == [0, 2, 5]


def test_texts_hash_alike_whatever_their_code():
    one = hashed(Coded(np.array([0, 1, -1, 2], np.int32), ["a", "b", ""]), np.arange(4))
    two = hashed(Coded(np.array([1, 0, -1], np.int32), ["b", "a"]), np.arange(3))
    assert one[:3].tolist() == two.tolist()
    assert one[2] == one[3] == 0
