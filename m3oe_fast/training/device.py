"""Where a run computes."""

from __future__ import annotations

from typing import Literal

import torch

from m3oe_fast import backends
from m3oe_fast.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]


def choose_device(requested: Device, backend: str, precision: str) -> torch.device:
    """The device for a request: "auto" takes the GPU if there is one and backend triton is wanted and runs on it.

    Args:
        requested: "auto", "cpu" or "cuda".
        backend, precision: as asked for, see ``backends.choose``.

    Raises:
        ConfigError: cuda was asked for and torch has none; the message says why.
    """
    gpu = torch.device("cuda")
    if requested == "cuda":
        if reason := _missing_gpu():
            raise ConfigError(f"device cuda cannot be used here: {reason}")
        return gpu
    usable = requested == "auto" and backend in ("auto", "triton") and not _missing_gpu()
    if usable and not backends.reasons_against("triton", gpu, torch.float32, precision):
        return gpu
    return torch.device("cpu")


def _missing_gpu() -> str | None:
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "torch sees no GPU"
