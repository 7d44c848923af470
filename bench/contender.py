"""What every contender offers, and what a training step is for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.workload import Batch

# Adam does its work, but the update is lost in rounding: every round computes with the weights
# that passed the gate.
LEARNING_RATE = 1e-20
WEIGHT_DECAY = 1e-5


class Contender(ABC):
    """One way of computing the network; holds its own copy of the workload's weights.

    Attributes:
        name: as printed.
        own: whether it is m3oe_fast.
        precision: that of its products, which the gate judges it by.
        optimizers: the Adam variants its training step is measured with, "fused" or "default".
    """

    name: str
    own: bool = False
    precision: str = "fp32"
    optimizers: tuple[str, ...] = ("fused",)

    @abstractmethod
    def forward(self, batch: Batch) -> Tensor:
        """Logits [B, T] from ids, in the batch's row order; called without gradients."""

    def predict(self, batch: Batch) -> Tensor:
        """Probabilities [B, T] from ids; called without gradients."""
        return torch.sigmoid(self.forward(batch))

    @abstractmethod
    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        """Logits [B, T] from x [B, I], in row order; called without gradients."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The training loss, a differentiable scalar."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """What Adam updates."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """The gradients that `train` left, under the names of `M3oE.named_parameters()`."""

    def train(self, batch: Batch) -> None:
        """Forward and backward, from no gradients to fresh ones."""
        for parameter in self.parameters():
            parameter.grad = None
        self.loss(batch).backward()

    def adam(self, optimizer: str = "fused") -> torch.optim.Adam:
        """Adam over all parameters, "fused" or "default"."""
        fused = True if optimizer == "fused" else None
        return torch.optim.Adam(self.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)

    def stepper(self, batch: Batch, adam: torch.optim.Adam) -> Callable[[], None]:
        """A whole training step on this batch: zero_grad, forward, loss, backward, Adam."""

        def step() -> None:
            adam.zero_grad(set_to_none=True)
            self.loss(batch).backward()
            adam.step()

        return step


def named_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a module by parameter name, zeros where none arrived."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
