"""Every kind of model that is a configuration of the network op, on backend triton: logits, loss and gradients against
its readable reference in float64."""

from __future__ import annotations

import copy

import pytest

from tests.test_models import CASES, batch, check_against_the_oracle, configure, make

# One of each kind; interpreted programs are slow, and their sizes are those of the compiled kernels' tests.
KINDS = ("mlp", "shared_bottom", "mmoe", "ple-mdl", "adatt-several", "star", "gated", "without tasks")


@pytest.mark.parametrize("case", KINDS)
def test_logits_loss_and_every_gradient_against_the_oracle(case):
    config = configure(CASES[case])
    ours = make(config, backend="triton")
    assert ours.backend_name == "triton"
    eager, oracle = copy.deepcopy(ours), copy.deepcopy(ours).double()
    check_against_the_oracle(ours, eager, oracle, batch(config, rows=60, absent=1))
