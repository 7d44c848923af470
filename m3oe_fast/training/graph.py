"""CUDA graphs of training steps: when they are used, and how one step is captured and replayed.

A step is some hundred kernels, and starting them one by one can take longer than running them. A graph starts them all
at once, with the addresses they had when it was captured. So whatever a captured step reads and writes must stay where
it is: the batch is copied into buffers of its own, rates are tensors, and weights, optimizer state and gradients are
changed in place as long as the graph lives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from m3oe_fast.config import M3oEConfig
from m3oe_fast.data.batch import Batch
from m3oe_fast.errors import ConfigError
from m3oe_fast.training.bilevel import HIGHER_ORDER
from m3oe_fast.training.evaluation import pinned
from m3oe_fast.training.optimizers import Optimizers
from m3oe_fast.training.options import TrainOptions

WARM_UP = 3
"""Steps that run one by one before the capture: they compile kernels and make optimizer state and tables, which a
capture must find there."""


def reasons_against(options: TrainOptions, device: torch.device, backend: str, bags: bool = False) -> list[str]:
    """Why the steps of a run cannot be captured; empty if they can."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"the model is on {device.type}, CUDA graphs are for GPUs")
    if backend != "triton":
        reasons.append(f"backend {backend} is not made for it, triton is")
    if options.embedding_optimizer != "same":
        reasons.append(
            f"embedding_optimizer is {options.embedding_optimizer}, whose gradient has another size in every step"
        )
    if options.accumulate > 1:
        reasons.append(f"accumulate is {options.accumulate}, and a graph holds a step of one batch")
    if options.bilevel in HIGHER_ORDER:
        reasons.append(f"bilevel is {options.bilevel}, which looks at norms between its gradients")
    if bags:
        reasons.append("the log has multi-hot fields, and their batches have no fixed size")
    return reasons


def is_used(options: TrainOptions, device: torch.device, backend: str, bags: bool = False) -> bool:
    """Whether a model on ``device``, served by ``backend``, trains in CUDA graphs.

    Raises:
        ConfigError: ``cuda_graph`` is on and cannot be; the message lists every reason.
    """
    if options.cuda_graph == "off":
        return False
    reasons = reasons_against(options, device, backend, bags)
    if reasons and options.cuda_graph == "on":
        raise ConfigError(f"cuda_graph on is impossible here: {'; '.join(reasons)}")
    return not reasons


def notice(options: TrainOptions, device: torch.device, backend: str, bags: bool = False) -> str | None:
    """What to tell a user who may expect graphs and gets none; None on a CPU, where nobody does."""
    if options.cuda_graph != "auto" or device.type == "cpu":
        return None
    reasons = reasons_against(options, device, backend, bags)
    return f"steps run without a CUDA graph: {'; '.join(reasons)}" if reasons else None


class Capture(Protocol):
    """How a step is run before it is captured, and how it is captured."""

    def warm_up(self, step: Callable[[], None]) -> None:
        """Run ``step`` once, in the way that a later capture of it asks for."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Capture ``step`` without any effect on a tensor; what is returned runs it each time it is called."""


class CudaCapture:
    """`Capture` by torch.cuda.graph, for steps of ``optimizers`` on ``device``."""

    def __init__(self, optimizers: Optimizers, device: torch.device) -> None:
        self._optimizers = optimizers
        self._device = device
        # Autograd runs a node on the stream that made it, and the default stream cannot be captured: warm-up and
        # capture share another one.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, step: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with self._optimizers.capturable(), torch.cuda.graph(graph, stream=self._stream):
            step()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay


class StaticBatch:
    """A batch of fixed size in memory of its own, filled up with rows that no step notices.

    Args:
        size: rows B, at least 1.
        config: F, C and T.
        device: where it lies.
        weighted: whether its rows have weights.

    Attributes:
        batch: ids [B,F], dense [B,C], domain [B], label [B,T], and row_weight [B]; always the same tensors.
        rows: float64 scalar on the device, how many rows are real.
    """

    def __init__(self, size: int, config: M3oEConfig, device: torch.device, weighted: bool = False) -> None:
        self.batch = Batch(
            torch.zeros((size, len(config.vocab_sizes)), dtype=torch.int32, device=device),
            torch.zeros((size, config.num_dense), dtype=torch.float32, device=device),
            torch.zeros((size,), dtype=torch.int64, device=device),
            torch.full((size, config.num_tasks), torch.nan, dtype=torch.float32, device=device),
            torch.zeros((size,), dtype=torch.float32, device=device) if weighted else None,
        )
        self.rows = torch.zeros((), dtype=torch.float64, device=device)

    def fill(self, batch: Batch) -> None:
        """Copy ``batch``, of at most B rows; the others get id 0, domain 0 and no label, so they weigh nothing.

        Raises:
            ValueError: it has more rows.
        """
        rows, size = len(batch.domain), len(self.batch.domain)
        if rows > size:
            raise ValueError(f"a batch of {rows} rows does not fit a step captured for {size}")
        columns = 4 if self.batch.row_weight is None else 5
        for own, new in zip(self.batch[:columns], pinned(batch, self.rows.device)[:columns], strict=True):
            own[:rows].copy_(new, non_blocking=True)
        if rows < size:
            for own, value in zip(self.batch[:columns], (0, 0, 0, torch.nan, 0)[:columns], strict=True):
                own[rows:].fill_(value)
        self.rows.fill_(rows)


class GraphedStep:
    """One kind of step: the first `WARM_UP` calls run it as it is, the next captures it, and from there it is replayed.

    Every call is one step of the training, also those before the capture.

    Args:
        step: reads its batch from ``static``; it is captured as it stands at the first replay.
        static: where each batch is copied to.
        capture: how.
    """

    def __init__(self, step: Callable[[], None], static: StaticBatch, capture: Capture) -> None:
        self._step = step
        self._static = static
        self._capture = capture
        self._warmed = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, batch: Batch) -> None:
        """Do the step on ``batch``, tensors on the CPU."""
        self._static.fill(batch)
        if self._warmed < WARM_UP:
            self._warmed += 1
            self._capture.warm_up(self._step)
            return
        if self._replay is None:
            self._replay = self._capture.record(self._step)
        self._replay()

    def release(self) -> None:
        """Forget the graph; the next call begins anew with the warm-up, on whatever tensors there are then."""
        self._warmed = 0
        self._replay = None
