"""A contender in CUDA graphs: one of its forward pass, one of its whole step.

A graph reads from a fixed place, so every replay is preceded by one copy of a batch, which is timed with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.contender import named_gradients
from bench.gpu import device
from bench.gpu.contenders import DeviceContender
from bench.gpu.feed import Packed
from bench.workload import Batch
from m3oe_fast import kernels

WARM_UP_CALLS = 3


class Graphed(DeviceContender):
    """Replays what another contender does.

    Args:
        forward_of, step_of: that contender, or two like it: m3oe_fast forgets its packed weights when it trains, and
            the forward graph still reads them.
        example: a batch of the shapes to come.
    """

    launch = "graph"

    def __init__(self, forward_of: DeviceContender, step_of: DeviceContender, example: Packed) -> None:
        super().__init__()
        self.name = f"{forward_of.name}, CUDA graph"
        self.own, self.precision = forward_of.own, forward_of.precision
        self.takes_ordered = forward_of.takes_ordered
        self.notes = forward_of.notes
        self.model = step_of.model
        self.forward_of, self.step_of = forward_of, step_of
        self._static = example.clone()
        self._forward: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self._step: tuple[torch.cuda.CUDAGraph, dict[str, Tensor]] | None = None
        self.step_bytes: int | None = None

    def feed(self, packed: Packed) -> None:
        """Put a batch where the graphs read."""
        self._static.buffer.copy_(packed.buffer, non_blocking=True)

    def replay_forward(self) -> Tensor:
        """Logits of what was fed; the next replay overwrites them."""
        if self._forward is None:
            self._forward = self._capture_forward()
        graph, logits = self._forward
        graph.replay()
        return logits

    def replay_step(self) -> None:
        """A training step on what was fed."""
        if self._step is None:
            self._step = self._capture_step()
        self._step[0].replay()

    def forward(self, batch: Batch) -> Tensor:
        self._put(batch)
        return self.replay_forward().clone()

    def loss(self, batch: Batch) -> Tensor:
        """A graph holds whole steps only."""
        raise NotImplementedError

    def train(self, batch: Batch) -> None:
        self.step(batch)

    def step(self, batch: Batch) -> None:
        self._put(batch)
        self.replay_step()

    def gradients(self) -> dict[str, Tensor]:
        assert self._step is not None, "no step was captured"
        return self._step[1]

    def _put(self, batch: Batch) -> None:
        for mine, given in zip(self._static.batch, batch, strict=True):
            mine.copy_(given)

    @torch.no_grad()
    def _capture_forward(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        inner, batch = self.forward_of, self._static.batch
        stream = _warmed_up(lambda: inner.forward(batch))
        graph, before = torch.cuda.CUDAGraph(), kernels.launches()
        with torch.cuda.graph(graph, stream=stream):
            logits = inner.forward(batch)
        self.notes |= _launched("forward", before) if self.own else {}
        return graph, logits

    def _capture_step(self) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        inner, batch = self.step_of, self._static.batch
        stream = _warmed_up(lambda: inner.step(batch))
        graph, before = torch.cuda.CUDAGraph(), kernels.launches()
        with device.PeakMemory(batch.dense.device) as memory, torch.cuda.graph(graph, stream=stream):
            inner.step(batch)
        self.step_bytes = memory.extra
        self.notes |= _launched("step", before) if self.own else {}
        # These very tensors are written by every replay, whatever becomes of the parameters' `grad`.
        return graph, named_gradients(inner.model)


def _launched(what: str, before: int) -> dict[str, int]:
    return {f"triton_launches_{what}": kernels.launches() - before}


def _warmed_up(call: Callable[[], object]) -> torch.cuda.Stream:
    """The stream to capture on, where the call has run before: compiled, initialised, its caches filled."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return stream
