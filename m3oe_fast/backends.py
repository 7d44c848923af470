"""Which implementation runs: `auto | reference | cpu | triton | cuda`, decided once per (device, dtype).

An explicit request that cannot be met raises with every reason; the automatic choice falls back to `reference`
and warns once with the reasons.
"""

from __future__ import annotations

import functools
import warnings

import torch

from m3oe_fast import _extension, kernels
from m3oe_fast.errors import BackendError, ConfigError

NAMES = ("cpu", "triton", "cuda", "reference")
PRECISIONS = ("fp32", "bf16x3", "tf32", "bf16")
CPU_PRECISIONS = ("fp32", "bf16x3", "bf16")


def reasons_against(
    name: str, device: torch.device, dtype: torch.dtype = torch.float32, precision: str = "fp32"
) -> list[str]:
    """Why a backend cannot serve tensors of this device and dtype; empty if it can."""
    reasons = []
    if name == "cpu" and precision == "tf32":
        reasons.append("precision 'tf32' exists on GPUs only")
    if name == "cpu" and precision != "fp32" and dtype != torch.float32:
        reasons.append(f"precision {precision!r} is for float32 tensors, they are {dtype}")
    if name == "reference" and precision != "fp32":
        reasons.append(f"precision {precision!r}: it computes in the dtype of its tensors, ask for fp32")
    if name == "cuda":
        reasons.append("not built yet")
    if name == "triton":
        reasons += _against_triton(device, dtype)
    if name == "cpu":
        if device.type != "cpu":
            reasons.append(f"tensors are on {device.type}")
        if dtype not in (torch.float32, torch.float64):
            reasons.append(f"dtype {dtype} (float32, or float64 on the scalar path)")
        reasons += _extension.reasons_missing()
    return reasons


def _against_triton(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if not kernels.installed():
        reasons.append("Triton is not installed: pip install 'm3oe_fast[triton]'")
    if device.type == "cpu" and not kernels.interpreted():
        reasons.append("tensors are on cpu, where Triton runs only interpreted, for debugging (TRITON_INTERPRET=1)")
    elif device.type not in ("cpu", "cuda"):
        reasons.append(f"tensors are on {device.type}")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append(f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0")
    if dtype != torch.float32:
        reasons.append(f"dtype {dtype} (float32 only)")
    return reasons + _extension.reasons_missing()  # the compiled module declares the ops that Triton implements


@functools.cache
def choose(requested: str, device: torch.device, dtype: torch.dtype, precision: str = "fp32") -> str:
    """The backend that runs for this request.

    Raises:
        ConfigError: an unknown backend or precision name.
        BackendError: an explicitly requested backend cannot run; the message lists every reason.
    """
    if requested not in ("auto", *NAMES):
        raise ConfigError(f"backend must be one of auto, {', '.join(NAMES)}, got {requested!r}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if requested != "auto":
        if reasons := reasons_against(requested, device, dtype, precision):
            raise BackendError(f"backend {requested!r} cannot run here: {'; '.join(reasons)}")
        return requested
    if device.type == "cpu" and (missing := _extension.reasons_missing()):
        # Not a reason to crawl along in eager PyTorch unasked: the installation is broken and the line says the cure.
        raise BackendError(f"{missing[0]}; or ask for backend 'reference' (eager PyTorch, slow)")
    refused = []
    for name in NAMES:
        reasons = reasons_against(name, device, dtype, precision)
        if not reasons:
            if name == "reference":
                warnings.warn(f"m3oe_fast runs eager PyTorch ({'; '.join(refused)})", stacklevel=3)
            return name
        refused.append(f"{name}: {', '.join(reasons)}")
    raise BackendError(f"no backend can run here: {'; '.join(refused)}")


def choose_eager(requested: str, device: torch.device, dtype: torch.dtype, precision: str, model: str) -> str:
    """As `choose` for a model that is no configuration of the kernels: eager PyTorch serves it, or nothing.

    Raises:
        ConfigError: an unknown backend or precision name.
        BackendError: kernels, or a precision that eager PyTorch lacks, were asked for.
    """
    if requested in NAMES and requested != "reference":
        raise BackendError(
            f"backend {requested!r} cannot run {model} as it is configured, which is no configuration of the fused "
            "network; ask for auto or reference (eager PyTorch)"
        )
    return choose("reference" if requested == "auto" else requested, device, dtype, precision)


def compute_precision(backend: str, precision: str) -> str:
    """What the products of this backend really compute in: `precision`, or "fp32" where the processor has no fast
    instructions for it."""
    if backend != "cpu" or precision == "fp32":
        return precision
    module = _extension.load()
    native = module.computes_bf16() if precision == "bf16" else module.computes_bf16x3()
    return precision if native else "fp32"


@functools.cache
def warn_if_fp32(backend: str, precision: str) -> None:
    """Say once per process that a precision is computed in fp32."""
    if compute_precision(backend, precision) != precision:
        isa = _extension.load().cpu_isa()
        needs = "AMX, or AVX512-BF16 on AMD" if precision == "bf16" else "AMX"
        warnings.warn(
            f"precision {precision!r} computes in fp32 here: it needs {needs}, this processor runs {isa}", stacklevel=4
        )
