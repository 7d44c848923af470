"""Who takes part: m3oe_fast, and what PyTorch offers at the same precision.

bf16 opponents run under `torch.autocast`; their weights for inference are converted beforehand. fp32 and tf32 differ in
`torch.set_float32_matmul_precision`, which is the section's affair. m3oe_fast gets its rows as drawn and pays for the
sort; the batched opponents get them sorted, with the rows per domain for free.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from bench.contender import LEARNING_RATE, WEIGHT_DECAY, Contender, named_gradients
from bench.gpu import batched
from bench.gpu.feed import Supply
from bench.published import PublishedM3oE
from bench.sorting import sorted_loss
from bench.workload import Batch, Workload
from m3oe_fast import M3oE, folded

MODES = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def batched_name(compiled: str | None) -> str:
    """The name of `Batched`, compiled in a mode of `MODES` or not at all."""
    how = {None: "eager", "compiled": "torch.compile"}.get(compiled, f"torch.compile {compiled}")
    return f"{how}, batched + folded"


class DeviceContender(Contender):
    """A contender whose tensors lie where its workload's do, and that never waits for the device.

    Attributes:
        takes_ordered: its batches are sorted by domain, and so are its logits.
        launch: "eager", or "graph" where a CUDA graph replays it.
        notes: what a reader of its numbers should know.
    """

    takes_ordered: bool = False
    launch: str = "eager"
    model: nn.Module

    def __init__(self) -> None:
        self.notes: dict[str, Any] = {}
        self._adam: torch.optim.Adam | None = None

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        """Not measured on a GPU."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gradients(self) -> dict[str, Tensor]:
        return named_gradients(self.model)

    def step(self, batch: Batch) -> None:
        """A whole training step: zero_grad, forward, loss, backward, fused Adam."""
        adam = self.optimizer()
        adam.zero_grad(set_to_none=True)
        self.loss(batch).backward()
        adam.step()

    def optimizer(self) -> torch.optim.Adam:
        """The contender's own Adam, fused and capturable: the same for all, in graphs or not."""
        if self._adam is None:
            # Off a GPU, where only tests run, there is nothing to capture.
            capturable = self.parameters()[0].is_cuda
            self._adam = torch.optim.Adam(
                self.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True, capturable=capturable
            )
        return self._adam


class Own(DeviceContender):
    """m3oe_fast through its public surface. Predictions are made in `eval()` mode, with packed weights kept."""

    own = True

    def __init__(self, work: Workload, precision: str) -> None:
        super().__init__()
        self.name, self.precision = f"m3oe_fast, {precision}", precision
        # Made where it will lie: on a CPU the backend refuses.
        with work.x.device:
            self.model = M3oE(work.config, backend="triton", precision=precision)
        self.model.load_state_dict(work.model.state_dict())

    def forward(self, batch: Batch) -> Tensor:
        self._switch(training=False)
        return self.model(batch.ids, batch.dense, batch.domain)

    def loss(self, batch: Batch) -> Tensor:
        self._switch(training=True)
        return self.model.loss(*batch)

    def _switch(self, training: bool) -> None:
        if self.model.training != training:
            self.model.train(training)


class Published(DeviceContender):
    """The style of the published code; its loss is of probabilities, which autocast does not take on a GPU."""

    def __init__(self, work: Workload, precision: str) -> None:
        super().__init__()
        self.name, self.precision = "eager, published style", precision
        device = work.x.device
        self.model: PublishedM3oE = PublishedM3oE(work.model).to(device)
        self._context = _context(precision, device)

    def forward(self, batch: Batch) -> Tensor:
        with self._context():
            return self.model(batch.ids, batch.dense, batch.domain)

    def loss(self, batch: Batch) -> Tensor:
        return self.model.loss_of(self.forward(batch).float(), batch.domain, batch.label)

    def gradients(self) -> dict[str, Tensor]:
        return self.model.gradients()


class Batched(DeviceContender):
    """`batched.network`, eager or compiled."""

    takes_ordered = True

    def __init__(self, supply: Supply, precision: str, compiled: str | None = None) -> None:
        super().__init__()
        work = supply.ordered
        batched.check(work.config)
        self.name, self.precision = batched_name(compiled), precision
        self.model: M3oE = copy.deepcopy(work.model)
        device = work.x.device
        self._context = _context(precision, device)
        logits: nn.Module = _Logits(self.model, supply.counts, precision, fused_mix=compiled is not None)
        loss: nn.Module = _Loss(self.model, supply.counts, fused_mix=compiled is not None)
        self._logits = logits if compiled is None else _frozen(_compile(logits, compiled, device), self.notes)
        self._loss = loss if compiled is None else _compile(loss, compiled, device)

    def forward(self, batch: Batch) -> Tensor:
        with self._context():
            return self._logits(batch.ids, batch.dense)

    def loss(self, batch: Batch) -> Tensor:
        with self._context():
            return self._loss(batch.ids, batch.dense, batch.label)


class _Logits(nn.Module):
    """Logits [B, T] in domain order, from weights folded and laid out beforehand."""

    def __init__(self, model: M3oE, counts: list[int], precision: str, fused_mix: bool) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.counts, self.fused_mix = counts, fused_mix
        with torch.no_grad():
            prepared = batched.prepare(folded.fold(dict(model.named_parameters()), model.config))
            prepared = batched.rounded(prepared) if precision == "bf16" else prepared
        weights = (nn.Parameter(w.detach().clone(), requires_grad=False) for w in batched.flat(prepared))
        self.weights = nn.ParameterList(weights)

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        x = batched.embed(self.model, ids, dense)
        return batched.network(x, self.counts, batched.unflat(list(self.weights)), self.fused_mix)


class _Loss(nn.Module):
    """The training loss: embedding, fold, network and cross-entropy are one graph."""

    def __init__(self, model: M3oE, counts: list[int], fused_mix: bool) -> None:
        super().__init__()
        self.model, self.counts, self.fused_mix = model, counts, fused_mix

    def forward(self, ids: Tensor, dense: Tensor, label: Tensor) -> Tensor:
        x = batched.embed(self.model, ids, dense)
        weights = batched.prepare(folded.fold(dict(self.model.named_parameters()), self.model.config))
        return sorted_loss(batched.network(x, self.counts, weights, self.fused_mix).float(), label, self.counts)


def _context(precision: str, device: torch.device) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if precision == "bf16":
        return lambda: torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext


def _compile(module: nn.Module, compiled: str, device: torch.device) -> Callable[..., Tensor]:
    if device.type != "cuda":
        # Only tests come here; they want to know that the graph is whole.
        return torch.compile(module, fullgraph=True, dynamic=False, backend="eager")
    return torch.compile(module, fullgraph=True, dynamic=False, mode=MODES[compiled])


def _frozen(function: Callable[..., Tensor], notes: dict[str, Any]) -> Callable[..., Tensor]:
    """Compiles with weights as constants, or without where the compiler cannot; `notes` says which."""

    def call(*arguments: Tensor) -> Tensor:
        if "frozen" in notes:
            return function(*arguments)
        try:
            with torch._inductor.config.patch(freezing=True):
                result = function(*arguments)
        except Exception:
            result = function(*arguments)
            notes["frozen"] = False
        else:
            notes["frozen"] = True
        return result

    return call
