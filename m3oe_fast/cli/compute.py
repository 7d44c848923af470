"""Where and how a command computes: the options, and a saved model put there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from m3oe_fast import backends, checkpoint, models
from m3oe_fast.data.options import option
from m3oe_fast.models import AnyModel
from m3oe_fast.training.device import Device, choose_device
from m3oe_fast.training.evaluation import device_of


@dataclass(frozen=True)
class ComputeOptions:
    """Device, backend and precision."""

    device: Device = option(
        "auto",
        "Where to compute: auto takes the GPU where there is one that backend triton can use, else the processor.",
    )
    backend: Literal[("auto", *backends.NAMES)] = option(
        "auto", "What computes: auto takes the fastest that runs here, reference is plain PyTorch."
    )
    precision: Literal[backends.PRECISIONS] = option(
        "fp32",
        "Operands of matrix products on backend cpu: fp32, bf16x3 (each split into two bf16 numbers, about as exact "
        "as fp32) or bf16 (rounded); sums and weights stay fp32, and a processor without fast instructions for one "
        "computes in fp32. tf32 is for GPUs.",
    )

    def choose(self) -> tuple[torch.device, str]:
        """The device, and the backend that computes there.

        Raises:
            ConfigError: there is no such device.
            BackendError: the backend cannot run on it.
        """
        device = choose_device(self.device, self.backend, self.precision)
        return device, backends.choose(self.backend, device, torch.float32, self.precision)

    def load(self, path: str) -> AnyModel:
        """The model in ``path``, a run folder, checkpoint folder or file, where it is to compute, in ``eval()`` mode.

        Raises:
            ConfigError, BackendError: as ``choose``.
            CheckpointError: missing, damaged, or not a checkpoint of this package.
        """
        device, backend = self.choose()
        content = checkpoint.read(path)
        if not models.config_of(content, path).fused:
            backend = self.backend
        model = models.from_checkpoint(content, path, backend=backend, precision=self.precision)
        return model.to(device)


def place(model: AnyModel) -> str:
    """What computes a model, in words: backend, instruction set, precision, and GPU or threads."""
    device = device_of(model)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    isa = f", instruction set {model.isa_name}" if model.isa_name else ""
    computed = model.compute_precision
    precision = model.precision + (f" (computed in {computed} here)" if computed != model.precision else "")
    return f"{model.backend_name}{isa}, {precision}, {where}"
