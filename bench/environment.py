"""Process settings that must be there before the interpreter starts: C allocator thresholds and
OpenMP waiting.

glibc hands every temporary above 32 MiB back to the kernel and page-faults it anew on the next
call, which halves the speed of every contender that keeps [B, .] temporaries. Raised thresholds
make it keep the memory. Spinning OpenMP threads steal time from whatever shares the machine. All
contenders run in the one process, so all get the same settings.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

ALLOCATORS = ("tuned", "default")
BOTH = "both"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


def wanted(allocator: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment to run in: `environ` with the waiting policy and, if `allocator` is "tuned",
    the thresholds.

    Thresholds that the user has already set are kept under "tuned" and dropped under "default".
    """
    if allocator == "tuned":
        return {**KEEP_MEMORY, **WAITING, **environ}
    return {**WAITING, **{k: v for k, v in environ.items() if k not in KEEP_MEMORY}}


def ensure(allocator: str) -> None:
    """Start this process again with the wanted environment, unless it already has it.

    For "both" this process times nothing: it starts others, one with each.
    """
    if allocator == BOTH:
        return
    environ = wanted(allocator, os.environ)
    if environ != dict(os.environ):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, sys.orig_argv, environ)


def record() -> dict[str, str | None]:
    """The settings in force, by variable name; None = unset."""
    return {name: os.environ.get(name) for name in (*KEEP_MEMORY, *WAITING)}
