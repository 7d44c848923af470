"""How every Triton kernel of this package is started: counted, and seen by whoever asks.

`launches()` lets a test or a user prove that Triton ran. An observer sees each launch instead of running it: the proof
that every kernel compiles for a GPU nobody has at hand replays exactly the launches that the code makes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_count = 0
_observer: Callable[[Launch], None] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and what it was called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def launches() -> int:
    """Triton kernels launched by this process since import."""
    return _count


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start `kernel` over `grid`; an empty grid starts nothing."""
    global _count
    if 0 in grid:
        return
    if _observer is not None:
        _observer(Launch(kernel, grid, arguments, options))
        return
    kernel[grid](*arguments, **options)
    _count += 1


@contextlib.contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Within it launches go to `observer` and nothing runs; outputs stay as they were allocated."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
