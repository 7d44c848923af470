"""What goes into a prepared folder: parts, counts, ceiling, warnings."""

import json

import numpy as np
import pytest

from m3oe_fast.data import demo
from m3oe_fast.data.build import best_auc, build, count_rows, one_class_warnings
from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.splits import Rows, split_rows
from m3oe_fast.data.store import PartFile
from m3oe_fast.metrics import auc

NAN = float("nan")


@pytest.fixture
def log():
    """Users 0..3 and one missing; domain b has one class in train and no row in val."""
    user = Tokens(np.array([0, 0, 1, 2, -1, 3], np.int32), ("u", "v", "w", "x"))
    domain = np.array([0, 0, 1, 0, 1, 1], np.int32)
    label = np.array([[0], [1], [1], [NAN], [0], [1]], np.float32)
    rule = DomainRule("tab", texts=("a", "b"))
    return RawLog("log", {"user": user}, {}, domain, rule, label, (LabelRule("t", "t"),), user)


ROWS = Rows(np.array([0, 1, 2]), np.array([3]), np.array([4, 5]))


def test_counts(log):
    counts = count_rows(log, ROWS)
    assert counts["train"] == {
        "rows": 3,
        "users": 2,
        "new_users": 0,
        "domains": {"a": {"rows": 2, "users": 1}, "b": {"rows": 1, "users": 1}},
    }
    assert counts["test"]["users"] == counts["test"]["new_users"] == 1
    assert counts["val"]["domains"]["b"] == {"rows": 0, "users": 0}


def test_domains_with_one_class_are_warned_of(log):
    assert one_class_warnings(log, ROWS) == [
        "train, domain b, task t: 1 positive and 0 negative labels, so its AUC is undefined",
        "val, domain a, task t: 0 positive and 0 negative labels, so its AUC is undefined",
        "val has no rows of domain b",
        "test has no rows of domain a",
    ]


def test_ceiling_is_that_of_the_true_probabilities_on_test():
    log = demo.generate(5000)
    test = split_rows(log, "random", 0).test
    rows = test[log.domain[test] == 1]
    table = best_auc(log, test)
    label = log.label[rows, 1]
    seen = ~np.isnan(label)
    assert table["discover/like"] == auc(log.probability[rows[seen], 1], label[seen] == 1).value
    assert len(table) == 1 + 3 * 3
    assert table["mean"] == pytest.approx(np.mean([table[key] for key in table if key != "mean"]))


def test_a_log_that_was_not_generated_has_no_ceiling(log):
    assert best_auc(log, ROWS.test) is None


def test_files_hold_the_rows_of_their_part(tmp_path):
    log = demo.generate(2000)
    build(tmp_path, log, "demo", "official", 0, "x")
    rows = split_rows(log, "official", 0)
    vocabulary = json.loads((tmp_path / "encoder.json").read_text())["vocabularies"]["user_id"]
    for part, numbers in zip(Rows._fields, rows, strict=True):
        columns = PartFile(tmp_path / f"{part}.arrow").segments[0]
        assert np.array_equal(columns["label"], log.label[numbers], equal_nan=True)
        assert np.array_equal(columns["domain"], log.domain[numbers])
        assert np.array_equal(columns["user"], log.user.codes[numbers])
        user = log.fields["user_id"]
        for id_, code in zip(columns["id:user_id"], user.codes[numbers], strict=True):
            assert user.values[code] == vocabulary[id_ - 1] if id_ else user.values[code] not in vocabulary
    assert columns["id:user_id"].dtype == np.uint16
    assert columns["id:hour"].dtype == columns["domain"].dtype == np.uint8


def test_same_log_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build(tmp_path / name, demo.generate(2000), "demo", "user", 3, "x")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
