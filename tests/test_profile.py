"""The stopwatch: what it counts to which section."""

import json

import pytest

from m3oe_fast.training import profile
from m3oe_fast.training.profile import Stopwatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves by hand."""
    now = [0.0]
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_sections_add_up_and_the_rest_is_other(clock):
    watch = Stopwatch()
    for _ in range(2):
        with watch("step"):
            clock(3.0)
        clock(1.0)
    with watch("metrics"):
        clock(2.0)
    found = watch.report(10.0)
    assert found["sections"]["step"] == {"seconds": 6.0, "share": pytest.approx(0.6), "calls": 2}
    assert found["sections"]["other"]["seconds"] == pytest.approx(2.0)
    assert found["outside_kernels"] == pytest.approx(0.4)
    json.dumps(found, allow_nan=False)


def test_waiting_for_an_item_counts_and_using_it_does_not(clock):
    def slow():
        for item in range(3):
            clock(1.0)
            yield item
        clock(0.5)

    watch = Stopwatch()
    for _ in watch.each("read", slow()):
        clock(10.0)
    assert watch.seconds == {"read": 3.5}


def test_time_counts_also_if_what_runs_inside_fails(clock):
    watch = Stopwatch()
    with pytest.raises(ValueError), watch("step"):
        clock(1.0)
        raise ValueError
    assert watch.seconds == {"step": 1.0}


def test_nothing_watched_is_no_division_by_zero():
    assert Stopwatch().report(0.0)["outside_kernels"] == 1.0
