"""When to stop starting things: a run that is cut off has measured nothing of what it was at."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Seconds to spend, from now on.

    Args:
        clock: tests bring their own.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._start = clock()

    def used(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def allows(self, reserve: float = 0.0) -> bool:
        """Whether something that may take `reserve` seconds should be started."""
        return self.used() + reserve < self.seconds
