"""The machine: what it is, the two ceilings of every kernel on it, and the memory a call takes."""

from __future__ import annotations

import gc
import importlib.metadata
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from bench.gpu import clock
from m3oe_fast.errors import UserError

# torch.set_float32_matmul_precision; what is left in fp32 beside bf16 products gets tensor cores too, for all.
MATMUL_PRECISION = {"fp32": "highest", "tf32": "high", "bf16": "high"}
DEFAULT_CACHE_BYTES = 1 << 16
COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 16}
SQUARE = {"cuda": 8192, "cpu": 64}
CEILING_ROUNDS = 10


def find(name: str) -> torch.device:
    """The device of this name.

    Raises:
        UserError: there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("bench.gpu needs an NVIDIA GPU, and torch sees none here (torch.cuda.is_available() is false)")
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


def describe(device: torch.device) -> dict[str, Any]:
    """GPU, driver and the versions of what compiles for it; for a dry run on a CPU only that it is one."""
    described: dict[str, Any] = {"type": device.type, "triton": _version("triton"), "cuda": torch.version.cuda}
    if device.type != "cuda":
        return described
    properties = torch.cuda.get_device_properties(device)
    return described | {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": round(cache_bytes(device) / 2**20, 1),
        "driver": _driver(),
    }


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache."""
    if device.type != "cuda":
        return DEFAULT_CACHE_BYTES
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def ceilings(device: torch.device) -> dict[str, float]:
    """Bytes per second of a large copy on the device, read and written ones counted, and FLOP/s of large products."""
    found = {"copy_bytes_per_second": _copy_rate(device)}
    for name, setting in MATMUL_PRECISION.items():
        with matmul_precision(setting):
            found[f"{name}_flops_per_second"] = _matmul_rate(device, torch.bfloat16 if name == "bf16" else torch.float)
    return found


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    """Products of float32 tensors by torch within the block: "highest" is fp32, "high" tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises what it has failed with."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Within it, the most device memory taken above what was taken before: `extra`, in bytes; None off a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.extra: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda" and kind is None:
            torch.cuda.synchronize(self.device)
            self.extra = torch.cuda.max_memory_allocated(self.device) - self._before


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _copy_rate(device: torch.device) -> float:
    source = torch.rand(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES[device.type] / _median(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    n = SQUARE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median(lambda: torch.mm(a, b, out=out), device)


def _median(call: Callable[[], object], device: torch.device) -> float:
    timed = clock.interleave({"": lambda _: call()}, CEILING_ROUNDS, device)[""]
    return timed.quartiles()["median"]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None
