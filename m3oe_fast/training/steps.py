"""What happens to the batches of a step: of the network or of the fusion weights, one by one or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from m3oe_fast.data.batch import Batch
from m3oe_fast.model import RankingModel
from m3oe_fast.training import bilevel
from m3oe_fast.training.evaluation import device_of, to_device
from m3oe_fast.training.graph import Capture, GraphedStep, StaticBatch
from m3oe_fast.training.optimizers import Optimizers
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.weighting import LossWeighting


class Steps(Protocol):
    """The two kinds of step of a run. Batches are tensors on the CPU."""

    def running(self) -> AbstractContextManager[None]:
        """Surrounds the steps of a run. Between two steps inside, no weight, optimizer state or gradient may be
        replaced, only written in place: so a run is resumed outside."""

    def begin_epoch(self, loss_sum: float) -> None:
        """Let the sum of the loss go on from ``loss_sum``: 0 unless an epoch is resumed."""

    def inner(self, batches: Sequence[Batch]) -> None:
        """Move the inner level down the gradient of the loss on all ``batches`` together."""

    def outer(self, held_out: Batch, training: Batch) -> None:
        """Move the fusion weights, and nothing else.

        Args:
            held_out: what they are judged by.
            training: what the network is trained on next, for the modes that look through its step.
        """

    def loss_sum(self) -> float:
        """Sum over the epoch's steps of loss times rows; waits for the device."""


class EagerSteps:
    """`Steps` that run as they come, on whatever device the model lies."""

    def __init__(
        self, model: RankingModel, optimizers: Optimizers, weighting: LossWeighting, options: TrainOptions
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._weighting = weighting
        self._options = options
        self._total = torch.zeros((), dtype=torch.float64)

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def begin_epoch(self, loss_sum: float) -> None:
        self._total = torch.full((), loss_sum, dtype=torch.float64, device=device_of(self._model))

    def inner(self, batches: Sequence[Batch]) -> None:
        device = device_of(self._model)
        batches = [to_device(batch, device) for batch in batches]
        rows = sum(len(batch.domain) for batch in batches)
        _inner_step(self._model, self._optimizers, self._weighting, batches, rows, self._total)

    def outer(self, held_out: Batch, training: Batch) -> None:
        device = device_of(self._model)
        held_out = to_device(held_out, device)
        if self._options.bilevel not in bilevel.HIGHER_ORDER:
            _outer_step(self._model, self._optimizers, self._weighting, held_out)
            return
        problem = bilevel.ModelProblem(self._model, to_device(training, device), held_out, self._weighting.loss)
        rate = self._optimizers.virtual_rate()
        self._optimizers.outer_step(
            lambda: bilevel.fusion_gradient(
                self._options.bilevel,
                problem,
                rate=rate,
                scale=self._optimizers.preconditioner(problem.weights),
                terms=self._options.neumann_terms,
            )
        )

    def loss_sum(self) -> float:
        return self._total.item()


class GraphedSteps:
    """`Steps` that are captured once, each kind for itself, and replayed.

    Args:
        model: lies where ``capture`` can work and stays there.
        optimizers: with rates on the device (``tensor_lr``).
        weighting: on the model's device.
        capture: how.
        inner_rows, outer_rows: rows of the largest batch of each kind; a shorter one is filled up.
        weighted: whether batches have row weights.
    """

    def __init__(
        self,
        model: RankingModel,
        optimizers: Optimizers,
        weighting: LossWeighting,
        capture: Capture,
        inner_rows: int,
        outer_rows: int,
        weighted: bool = False,
    ) -> None:
        device = device_of(model)
        self._total = total = torch.zeros((), dtype=torch.float64, device=device)
        of_inner, of_outer = (StaticBatch(rows, model.config, device, weighted) for rows in (inner_rows, outer_rows))
        self._inner = GraphedStep(
            lambda: _inner_step(model, optimizers, weighting, [of_inner.batch], of_inner.rows, total), of_inner, capture
        )
        self._outer = GraphedStep(lambda: _outer_step(model, optimizers, weighting, of_outer.batch), of_outer, capture)

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._inner.release()
            self._outer.release()

    def begin_epoch(self, loss_sum: float) -> None:
        self._total.fill_(loss_sum)

    def inner(self, batches: Sequence[Batch]) -> None:
        (batch,) = batches  # more cannot be captured: graph.reasons_against
        self._inner(batch)

    def outer(self, held_out: Batch, training: Batch) -> None:
        self._outer(held_out)

    def loss_sum(self) -> float:
        return self._total.item()


def _inner_step(
    model: RankingModel,
    optimizers: Optimizers,
    weighting: LossWeighting,
    batches: Sequence[Batch],
    rows: int | Tensor,
    total: Tensor,
) -> None:
    """One step of the network, whose loss times ``rows`` is added to ``total``, a float64 scalar."""
    # Captured, this runs once and leaves gradients in the graph's memory, which every replay writes anew.
    optimizers.zero_grad()
    counts = None if len(batches) == 1 else [weighting.count(batch) for batch in batches]
    losses = []
    for place, batch in enumerate(batches):
        loss = weighting.loss(model, batch, counts, place)
        loss.backward()
        losses.append(loss.detach())
    optimizers.step()
    # The sum stays where it is: reading it every step would stall a GPU.
    for loss in losses:
        total.add_(loss.double() * rows)


def _outer_step(model: RankingModel, optimizers: Optimizers, weighting: LossWeighting, batch: Batch) -> None:
    """One step of the fusion weights down the gradient on ``batch`` at the present weights."""
    optimizers.outer_step(lambda: optimizers.fusion_gradient(lambda: weighting.loss(model, batch)))
