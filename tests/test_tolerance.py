"""The tolerance rule itself: it accepts rounding and rejects a wrong value, a wrong sign, a NaN and a wrong shape."""

import pytest
import torch

from tests.tolerance import FORWARD, assert_close_to_oracle


def sample():
    oracle = torch.linspace(-3, 3, 101, dtype=torch.float64).sin()
    eager = oracle.float() * (1 + 1e-6)
    return eager.clone(), eager, oracle


def test_accepts_the_same_error_as_eager():
    assert_close_to_oracle(*sample(), factor=FORWARD)


def test_rejects_three_times_the_error_of_eager():
    _, eager, oracle = sample()
    with pytest.raises(AssertionError, match=r"x eager"):
        assert_close_to_oracle(oracle.float() * (1 + 6e-6), eager, oracle, factor=FORWARD)


@pytest.mark.parametrize("spoil", [lambda v: -v, lambda v: v * float("nan"), lambda v: v[1:], lambda v: v.double()])
def test_rejects_wrong_results(spoil):
    actual, eager, oracle = sample()
    with pytest.raises(AssertionError):
        assert_close_to_oracle(spoil(actual), eager, oracle, factor=FORWARD)


def test_rejects_a_wrong_slice_beside_one_with_larger_values():
    oracle = torch.stack([torch.full((5,), 1e8), torch.ones(5)]).double()
    actual = oracle.float()
    actual[1] = 0
    assert_close_to_oracle(actual, oracle.float(), oracle, factor=FORWARD)
    with pytest.raises(AssertionError):
        assert_close_to_oracle(actual, oracle.float(), oracle, factor=FORWARD, stacked=1)


def test_rejects_one_wrong_element_where_eager_is_exact():
    oracle = torch.ones(1000, dtype=torch.float64)
    actual = oracle.float()
    actual[7] += 1e-4
    with pytest.raises(AssertionError):
        assert_close_to_oracle(actual, oracle.float(), oracle, factor=FORWARD)
