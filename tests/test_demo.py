"""The demo log: the same bytes for the same seed, planted effects, a known ceiling."""

import hashlib

import numpy as np
import pytest

from m3oe_fast.data import demo
from m3oe_fast.metrics import auc

ROWS = 40_000


def digest(log):
    arrays = [*(c.codes for c in log.fields.values()), *log.dense.values(), log.domain, log.label]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


@pytest.fixture(scope="module")
def log():
    return demo.generate(ROWS, seed=1)


def test_same_seed_same_bytes(log):
    assert digest(demo.generate(ROWS, seed=1)) == digest(log)
    assert digest(demo.generate(ROWS, seed=2)) != digest(log)


def test_skewed_domains(log):
    share = np.bincount(log.domain) / ROWS
    assert np.allclose(share, demo.TAB_SHARE, atol=0.01)


def test_labels_follow_the_true_probabilities(log):
    for t, task in enumerate(demo.TASKS):
        label, probability = log.label[:, t], log.probability[:, t]
        for low in np.arange(0, 1, 0.2):
            rows = (probability >= low) & (probability < low + 0.2) & ~np.isnan(label)
            error = abs(label[rows].mean() - probability[rows].mean())
            assert error < 4 * 0.5 / np.sqrt(rows.sum()), (task, low)


def test_tasks_are_correlated_beyond_their_probabilities(log):
    rest = log.label - log.probability
    assert np.corrcoef(rest[:, 0], rest[:, 2])[0, 1] > 0.2


def test_only_like_labels_are_missing(log):
    missing = np.isnan(log.label).mean(axis=0)
    assert missing[0] == missing[2] == 0
    assert abs(missing[1] - demo.LIKE_MISSING) < 0.01


def test_ceiling_is_high_and_a_single_field_does_not_reach_it(log):
    """Neither degenerate nor solved by the mean of one field."""
    for t in range(len(demo.TASKS)):
        present = ~np.isnan(log.label[:, t])
        positive = log.label[present, t] == 1
        best = auc(log.probability[present, t], positive).value
        assert 0.75 < best < 0.9
        for column in log.fields.values():
            codes = column.codes
            count = np.bincount(codes[present])
            mean = np.bincount(codes[present], log.label[present, t]) / np.maximum(count, 1)
            assert auc(mean[codes[present]], positive).value < best - 0.05


def test_domains_and_tasks_differ(log):
    """The same category is liked differently in another tab, and by another task."""
    category, logit = log.fields["category"].codes, np.log(log.probability / (1 - log.probability))

    def by_category(rows, task):
        count = np.bincount(category[rows])
        mean = np.bincount(category[rows], logit[rows, task]) / count
        return mean - mean.mean()

    home, live = log.domain == 0, log.domain == 2
    assert np.abs(by_category(home, 0) - by_category(live, 0)).mean() > 0.3
    assert np.abs(by_category(home, 0) - by_category(home, 1)).mean() > 0.2


def test_rows_stand_in_order_of_time(log):
    assert (np.diff(log.time) >= 0).all()
    assert np.array_equal(log.time // 3600 % 24, log.fields["hour"].codes)


def test_frame_is_the_same_log(log):
    frame = demo.frame(500, seed=3)
    same = demo.generate(500, seed=3)
    assert frame["user_id"].tolist() == [same.fields["user_id"].values[c] for c in same.fields["user_id"].codes]
    assert frame["tab"].tolist() == [demo.TABS[d] for d in same.domain]
    assert np.array_equal(frame["like"], same.label[:, 1], equal_nan=True)
