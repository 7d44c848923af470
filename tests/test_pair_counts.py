"""Rows and labels are counted the same in one piece or many."""

import numpy as np
import pytest

from m3oe_fast.data.pair_counts import MAX_WARNINGS, PairCounts


@pytest.mark.parametrize("pieces", [1, 7])
def test_counts(pieces):
    rng = np.random.default_rng(0)
    part, domain = rng.integers(0, 3, 500), rng.integers(0, 4, 500).astype(np.uint8)
    label = rng.choice([0, 1, np.nan], (500, 2)).astype(np.float32)
    counts = PairCounts(("a", "b", "c", "d"), ("s", "t"))
    for rows in np.array_split(np.arange(500), pieces):
        counts.add(part[rows].astype(np.int8), domain[rows], label[rows])
    for p in range(3):
        for d in range(4):
            own = label[(part == p) & (domain == d)]
            assert counts.rows[p, d] == len(own)
            assert counts.ones[p, d].tolist() == (own == 1).sum(axis=0).tolist()
            assert counts.zeros[p, d].tolist() == (own == 0).sum(axis=0).tolist()
    assert counts.warnings() == []


def test_many_warnings_are_shortened():
    lines = PairCounts(tuple(map(str, range(100))), ("t",)).warnings()
    assert len(lines) == MAX_WARNINGS + 1
    assert lines[0] == "train has no rows of domain 0"
    assert lines[-1] == f"{300 - MAX_WARNINGS} more domains or tasks like these"
