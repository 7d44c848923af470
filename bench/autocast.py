"""A contender under torch.autocast: what PyTorch offers for bf16 on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.contender import Contender
from bench.workload import Batch


class AutocastContender(Contender):
    """Forward, loss and prediction of another contender under bf16 autocast; backward follows what forward did."""

    precision = "bf16"

    def __init__(self, inner: Contender) -> None:
        self.inner = inner
        self.name = f"{inner.name}, bf16 autocast"
        self.optimizers = inner.optimizers

    def forward(self, batch: Batch) -> Tensor:
        with _autocast():
            return self.inner.forward(batch)

    def predict(self, batch: Batch) -> Tensor:
        with _autocast():
            return self.inner.predict(batch)

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        with _autocast():
            return self.inner.network(x, domain)

    def loss(self, batch: Batch) -> Tensor:
        with _autocast():
            return self.inner.loss(batch)

    def parameters(self) -> list[nn.Parameter]:
        return self.inner.parameters()

    def gradients(self) -> dict[str, Tensor]:
        return self.inner.gradients()


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)
