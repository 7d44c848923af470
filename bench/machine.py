"""What a result must carry to be believed: machine, versions, commit. No host or user names."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

import m3oe_fast
from m3oe_fast import _extension

FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
)

PEAK_BURSTS = 20
Measured = TypeVar("Measured")


def describe() -> dict[str, Any]:
    """CPU model, usable cores, instruction-set flags, memory, kernel and C library."""
    cpu = _cpuinfo()
    flags = set(cpu.get("flags", "").split())
    return {
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "m3oe_fast": m3oe_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> dict[str, Any]:
    """{"hash", "modified"} of the repository this file lies in; hash None outside git or before the
    first commit.
    """
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    head = git("rev-parse", "--verify", "HEAD")
    return {"hash": head, "modified": None if head is None else bool(git("status", "--porcelain"))}


def fma_peak(threads: int) -> float | None:
    """fp32 multiply-add peak of `threads` threads in GFLOP/s; None if the compiled module cannot be loaded.

    The best of many bursts of about 15 ms: a disturbed burst only reads too low.
    """
    if _extension.reasons_missing():
        return None
    return max(float(_extension.load().measure_fma_peak(threads)) for _ in range(PEAK_BURSTS))


def under_peak(threads: int, measure: Callable[[], Measured]) -> tuple[Measured, float | None]:
    """What `measure` returns, and the FMA peak measured right before and after it: the higher of both.

    The machine was at least that fast, and no share of it is overstated.
    """
    before = fma_peak(threads)
    result = measure()
    after = fma_peak(threads)
    return result, None if before is None or after is None else max(before, after)


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
