"""What happens to one batch: a step of the network or of the fusion weights, one by one or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from m3oe_fast.data.batch import Batch
from m3oe_fast.model import M3oE
from m3oe_fast.training.evaluation import device_of, to_device
from m3oe_fast.training.graph import Capture, GraphedStep, StaticBatch
from m3oe_fast.training.optimizers import Optimizers


class Steps(Protocol):
    """The two kinds of step of a run. Batches are tensors on the CPU."""

    def running(self) -> AbstractContextManager[None]:
        """Surrounds the steps of a run. Between two steps inside, no weight, optimizer state or gradient may be
        replaced, only written in place: so a run is resumed outside."""

    def begin_epoch(self) -> None:
        """Start the sum of the loss from zero."""

    def inner(self, batch: Batch) -> None:
        """Move all but the fusion weights down the gradient of the loss on ``batch``."""

    def outer(self, batch: Batch) -> None:
        """Move the fusion weights, and nothing else, down the gradient of the loss on ``batch``."""

    def loss_sum(self) -> float:
        """Sum over the epoch's inner batches of loss times rows; waits for the device."""


class EagerSteps:
    """`Steps` that run as they come, on whatever device the model lies."""

    def __init__(self, model: M3oE, optimizers: Optimizers) -> None:
        self._model = model
        self._optimizers = optimizers
        self._total = torch.zeros((), dtype=torch.float64)

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def begin_epoch(self) -> None:
        self._total = torch.zeros((), dtype=torch.float64, device=device_of(self._model))

    def inner(self, batch: Batch) -> None:
        batch = to_device(batch, device_of(self._model))
        _inner_step(self._model, self._optimizers, batch, len(batch.domain), self._total)

    def outer(self, batch: Batch) -> None:
        batch = to_device(batch, device_of(self._model))
        self._optimizers.outer_step(lambda: self._model.loss(*batch))

    def loss_sum(self) -> float:
        return self._total.item()


class GraphedSteps:
    """`Steps` that are captured once, each kind for itself, and replayed.

    Args:
        model: lies where ``capture`` can work and stays there.
        optimizers: with rates on the device (``tensor_lr``).
        capture: how.
        inner_rows, outer_rows: rows of the largest batch of each kind; a shorter one is filled up.
    """

    def __init__(self, model: M3oE, optimizers: Optimizers, capture: Capture, inner_rows: int, outer_rows: int) -> None:
        device = device_of(model)
        self._total = total = torch.zeros((), dtype=torch.float64, device=device)
        of_inner, of_outer = (StaticBatch(rows, model.config, device) for rows in (inner_rows, outer_rows))
        self.inner = GraphedStep(
            lambda: _inner_step(model, optimizers, of_inner.batch, of_inner.rows, total), of_inner, capture
        )
        self.outer = GraphedStep(lambda: optimizers.outer_step(lambda: model.loss(*of_outer.batch)), of_outer, capture)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.inner.release()
            self.outer.release()

    def begin_epoch(self) -> None:
        self._total.zero_()

    def loss_sum(self) -> float:
        return self._total.item()


def _inner_step(model: M3oE, optimizers: Optimizers, batch: Batch, rows: int | Tensor, total: Tensor) -> None:
    """One step of the network, whose loss times ``rows`` is added to ``total``, a float64 scalar."""
    # Captured, this runs once and leaves gradients in the graph's memory, which every replay writes anew.
    optimizers.zero_grad()
    loss = model.loss(*batch)
    loss.backward()
    optimizers.step()
    # The sum stays where it is: reading it every step would stall a GPU.
    total.add_(loss.detach().double() * rows)
