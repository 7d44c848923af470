"""Pooled bags in front of the dense columns, through the Triton kernels, against the oracle."""

from __future__ import annotations

import pytest

from tests.test_bags import assert_as_close_as_eager


@pytest.mark.parametrize("name", ["network", "network_loss"])
def test_ops_with_bags_against_the_oracle(name):
    assert_as_close_as_eager(name, "triton")
