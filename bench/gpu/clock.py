"""Interleaved timing by device events; on a CPU, where only tests run, by the host's clock.

A sample is a burst of calls, issued without waiting, over its length: what a call costs in a loop that trains or
serves, be it the device's time or the host's to launch it. Every round takes one sample of every contender, and starts
with another one. Calls are numbered, so that each takes another batch.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

WARM_UP_CALLS = {"cuda": 5, "cpu": 1}
BURST_SECONDS = 5e-3
LONGEST_BURST = 200

Call = Callable[[int], object]


@dataclass(frozen=True)
class Timed:
    """Seconds per call of every sample, and the calls of one."""

    samples: tuple[float, ...]
    burst: int

    def quartiles(self) -> dict[str, float]:
        """As the other documents keep them."""
        samples = list(self.samples)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        return {"median": median, "q1": q1, "q3": q3, "min": min(samples)}


def interleave(calls: Mapping[str, Call], rounds: int, device: torch.device) -> dict[str, Timed]:
    """Samples of every call, after a warm-up that also settles how long its bursts are."""
    measured = _Events() if device.type == "cuda" else _HostClock()
    bursts, turn = {}, dict.fromkeys(calls, 0)

    def sample(name: str, count: int) -> float:
        first, turn[name] = turn[name], turn[name] + count
        return measured.seconds(calls[name], first, count) / count

    for name in calls:
        sample(name, WARM_UP_CALLS[device.type])
        bursts[name] = burst_of(sample(name, WARM_UP_CALLS[device.type]))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            shift = i % len(names)
            for name in names[shift:] + names[:shift]:
                samples[name].append(sample(name, bursts[name]))
    finally:
        gc.enable()
    return {name: Timed(tuple(samples[name]), bursts[name]) for name in names}


def burst_of(seconds: float) -> int:
    """Calls of a sample that are long enough to make the events' own cost vanish."""
    return max(1, min(LONGEST_BURST, round(BURST_SECONDS / max(seconds, 1e-9))))


class _Events:
    """Seconds between two events around the calls."""

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Call, first: int, count: int) -> float:
        torch.cuda.synchronize()
        self.start.record()
        for i in range(first, first + count):
            call(i)
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


class _HostClock:
    def seconds(self, call: Call, first: int, count: int) -> float:
        start = time.perf_counter()
        for i in range(first, first + count):
            call(i)
        return time.perf_counter() - start
