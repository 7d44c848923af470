"""Domain rules: bins, texts, names, and bad edges."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data.domains import DomainRule, parse_bins
from m3oe_fast.errors import DataError

AGES = DomainRule("age", edges=(25.0, 35.0))


def test_ages_of_the_paper():
    codes = np.array([1, 18, 25, 35, 45, 50, 56], float)
    assert AGES.of_numbers(codes).tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert AGES.names == ("<25", "25-34", ">=35")


def test_texts_fall_into_bins_as_numbers_do():
    assert AGES.of_texts(["24", "25", "34.9", "x"]).tolist() == [0, 1, 1, -1]


def test_nan_has_no_domain():
    assert AGES.of_numbers(np.array([np.nan])).tolist() == [-1]


def test_domains_by_text():
    rule = DomainRule("tab", texts=("home", "live"))
    assert rule.names == ("home", "live")
    assert rule.of_texts(["live", "other", "home"]).tolist() == [1, -1, 0]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("3", ("<3", ">=3")),
        ("0.5,1.5", ("<0.5", "0.5..1.5", ">=1.5")),
        ("1,2,5", ("<1", "1", "2-4", ">=5")),
    ],
)
def test_names_of_bins(text, names):
    assert DomainRule("x", edges=parse_bins(text)).names == names


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6, unique=True), st.floats(-1e6, 1e6))
def test_every_number_lies_in_its_bin(edges, number):
    edges = tuple(sorted(edges))
    (bin_,) = DomainRule("x", edges=edges).of_numbers(np.array([number]))
    low, high = (-np.inf, *edges)[bin_], (*edges, np.inf)[bin_]
    assert low <= number < high


@pytest.mark.parametrize("text", ["35,25", "25,25"])
def test_bins_not_increasing(text):
    with pytest.raises(DataError, match=rf"--domain_bins '{text}': the edges must increase"):
        parse_bins(text)


@pytest.mark.parametrize("text", ["a", "25,", "nan", "25;35", "inf"])
def test_bins_that_are_no_numbers(text):
    with pytest.raises(DataError, match="not numbers; write edges such as 25,35"):
        parse_bins(text)


def test_rules_survive_json():
    for rule in (AGES, DomainRule("tab", texts=("a", "b")), DomainRule()):
        assert DomainRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert DomainRule().names == ("all",)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("1000000,1000001,1234567", ("<1000000", "1000000", "1000001-1234566", ">=1234567")),
        ("0.1234567,0.1234568", ("<0.1234567", "0.1234567..0.1234568", ">=0.1234568")),
        ("1,1e300", ("<1", "1..1e+300", ">=1e+300")),
    ],
)
def test_near_edges_have_names_of_their_own(text, names):
    assert DomainRule("x", edges=parse_bins(text)).names == names


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, unique=True))
def test_names_never_repeat(edges):
    assert len(set(DomainRule("x", edges=tuple(sorted(edges))).names)) == len(edges) + 1


def test_two_domains_of_one_name():
    with pytest.raises(DataError, match="domain column tab: two domains are called home"):
        DomainRule("tab", texts=("home", "live", "home"))
