"""AUC against its definition: the share of (positive, negative) pairs in the right order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data.auc import auc, auc_by_pair

ROWS = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0.0, 1.0, np.nan])), max_size=30)


@given(ROWS)
def test_auc_counts_pairs(rows):
    score = np.array([score for score, _ in rows], float)
    label = np.array([label for _, label in rows], np.float32)
    pairs = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    found = auc(score, label)
    if not pairs:
        assert found is None
    else:
        assert np.isclose(found, np.mean(pairs), rtol=0, atol=1e-12)


def test_auc_by_pair_keeps_domains_and_tasks_apart():
    score = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5], [0.6, 0.4]])
    label = np.array([[0, 0], [1, 1], [1, 1], [1, 0]], np.float32)
    table = auc_by_pair(score, label, np.array([0, 0, 1, 1]), ("a", "b"), ("x", "y"))
    assert table == {"mean": 2 / 3, "a/x": 1.0, "a/y": 0.0, "b/x": None, "b/y": 1.0}
