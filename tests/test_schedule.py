"""Learning rates as functions of the step."""

import math

import pytest

from m3oe_fast.training import TrainOptions
from m3oe_fast.training.schedule import rate_factor


def factors(epochs=4, steps_per_epoch=5, **options):
    chosen = TrainOptions(epochs=epochs, **options)
    return [rate_factor(chosen, step, steps_per_epoch) for step in range(epochs * steps_per_epoch)]


def test_constant_is_one_in_every_step():
    assert factors() == [1.0] * 20


def test_warm_up_ends_at_one_whatever_follows():
    for schedule in ("constant", "linear", "cosine", "step"):
        found = factors(schedule=schedule, warmup=4, schedule_step=100)
        assert found[:4] == [0.25, 0.5, 0.75, 1.0]
        assert found[4] == 1.0


def test_linear_and_cosine_fall_to_almost_nothing_and_never_to_zero():
    linear, cosine = factors(schedule="linear"), factors(schedule="cosine")
    assert linear == pytest.approx([1 - step / 20 for step in range(20)])
    assert cosine == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 20) for step in range(20)])
    assert min(linear) > 0 and min(cosine) > 0


def test_a_warm_up_of_the_whole_run_leaves_no_division_by_zero():
    assert factors(schedule="cosine", warmup=20)[-1] == 1.0
    assert factors(schedule="linear", warmup=50)[-1] == pytest.approx(20 / 50)


def test_step_cuts_every_so_many_epochs():
    found = factors(schedule="step", schedule_step=2, schedule_gamma=0.1)
    assert found == pytest.approx([1.0] * 10 + [0.1] * 10)
