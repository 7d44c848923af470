"""Label expressions and what they make of values."""

import json

import numpy as np
import pytest

from m3oe_fast.data.labels import LabelRule, parse_labels
from m3oe_fast.errors import DataError

NAN = float("nan")


@pytest.mark.parametrize(
    ("comparison", "wanted"),
    [
        (">", [0, 0, 1]),
        (">=", [0, 1, 1]),
        ("<", [1, 0, 0]),
        ("<=", [1, 1, 0]),
        ("==", [0, 1, 0]),
        ("!=", [1, 0, 1]),
    ],
)
def test_comparisons_leave_missing_values_missing(comparison, wanted):
    (rule,) = parse_labels(f"click = rating {comparison} 3")
    label = rule.apply(np.array([2, 3, 4, NAN]), "f", int)
    assert label.dtype == np.float32
    assert np.array_equal(label, [*wanted, NAN], equal_nan=True)


def test_several_tasks_in_order():
    assert parse_labels("click=rating>3,like=rating>=4.5,seen=is_seen") == (
        LabelRule("click", "rating", ">", 3.0),
        LabelRule("like", "rating", ">=", 4.5),
        LabelRule("seen", "is_seen"),
    )


def test_rules_survive_json():
    rules = parse_labels("click=rating>3,seen=is_seen")
    assert tuple(LabelRule(**json.loads(json.dumps(rule.to_dict()))) for rule in rules) == rules


@pytest.mark.parametrize(
    "text",
    [
        "",
        "click",
        "click=",
        "=rating>3",
        "click=rating>",
        "click=rating>x",
        "click=a=b",
        "a=b>3,",
        "a=b>1>2",
        "click=rating>nan",
        "click=rating<inf",
    ],
)
def test_bad_expressions(text):
    with pytest.raises(DataError, match=r"--labels: cannot read .*for example click=rating>3"):
        parse_labels(text)


def test_task_defined_twice():
    with pytest.raises(DataError, match="task click is defined twice"):
        parse_labels("click=rating>3,click=rating>4")


@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("inf")])
def test_label_outside_0_and_1(value):
    rule = LabelRule("seen", "is_seen")
    with pytest.raises(DataError, match=r"a\.inter, row 4, field is_seen: label seen is .*not 0 or 1"):
        rule.apply(np.array([0, NAN, value]), "a.inter", lambda row: row + 2)
