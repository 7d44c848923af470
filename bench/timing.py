"""Interleaved timing: every round calls every contender once, so that drift of the machine meets
all of them alike.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Sample(NamedTuple):
    """One call: wall and process CPU time in seconds, page faults served without reading a disk."""

    wall: float
    cpu: float
    faults: int


class Summary(NamedTuple):
    """Of all rounds: quartiles and minimum of the wall time, medians of CPU time (seconds) and page
    faults.
    """

    median: float
    q1: float
    q3: float
    least: float
    cpu: float
    faults: float

    def quartiles(self) -> dict[str, float]:
        """The wall times as documents keep them."""
        return {"median": self.median, "q1": self.q1, "q3": self.q3, "min": self.least}


def interleave(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int, burst: int = 1
) -> dict[str, list[Sample]]:
    """Time every call `rounds` times after `warmup` untimed rounds; each round starts with another
    contender.

    Args:
        burst: calls in a row before it is the next contender's turn, each timed by itself.
    """
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name] += [time_call(calls[name]) for _ in range(burst)]
    finally:
        gc.enable()
    return samples


def summarise(samples: list[Sample]) -> Summary:
    """Medians and quartiles of one contender's samples."""
    walls = [sample.wall for sample in samples]
    q1, median, q3 = statistics.quantiles(walls, n=4, method="inclusive") if len(walls) > 1 else walls * 3
    cpu = statistics.median(sample.cpu for sample in samples)
    return Summary(median, q1, q3, min(walls), cpu, statistics.median(sample.faults for sample in samples))


def time_call(call: Callable[[], object]) -> Sample:
    """Time one call."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Sample(wall, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
