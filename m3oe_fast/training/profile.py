"""Where the time of a run goes: wall seconds by what was being done, in the thread that trains."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")

KERNELS = ("step", "outer", "score")
"""What computes: forward, backward, optimizers (step), the fusion weights' steps (outer), forward alone (score)."""


class Stopwatch:
    """Sums wall seconds by section. Sections do not nest: what runs inside another counts there only.

    Costs about a microsecond a section, so it always runs. On a GPU, whose work goes on after a call returns, the wait
    shows where the program stops for it.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count what runs inside to ``section``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._add(section, time.perf_counter() - start)

    def each(self, section: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; waiting for the next one counts to ``section``."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._add(section, time.perf_counter() - start)
            yield item

    def _add(self, section: str, seconds: float) -> None:
        self.seconds[section] = self.seconds.get(section, 0.0) + seconds
        self.calls[section] = self.calls.get(section, 0) + 1

    def report(self, total: float) -> dict[str, Any]:
        """The content of profile.json.

        Args:
            total: wall seconds of all that was watched.

        Returns:
            "seconds" in all, "sections" with seconds, share and calls of each and "other" for the rest, and
            "outside_kernels", the share of the time in which nothing computed.
        """
        kernels = sum(self.seconds.get(name, 0.0) for name in KERNELS)
        share = 1 / total if total else 0.0
        sections = {
            name: {"seconds": seconds, "share": seconds * share, "calls": self.calls[name]}
            for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1])
        }
        other = max(total - sum(self.seconds.values()), 0.0)
        sections["other"] = {"seconds": other, "share": other * share, "calls": None}
        return {"seconds": total, "outside_kernels": max(1.0 - kernels * share, 0.0), "sections": sections}
