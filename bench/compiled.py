"""torch.compile of the batched and folded network, in the form that suits it best.

The rows per domain are constants of the graph, so nothing in it has a dynamic shape; the sort runs
outside the graph and is charged to the contender. Inference graphs are frozen: the folded weights
become constants that the compiler may repack. A batch with other counts would compile again; the
benchmark always gives the same batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch._inductor.config
from torch import Tensor, nn

from bench.contender import Contender, named_gradients
from bench.sorting import by_domain, sorted_loss, unsort
from bench.workload import Batch, Workload
from m3oe_fast import M3oE, folded

MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


class _FromX(nn.Module):
    """Logits [B, T] from x [B, I] and the row numbers in domain order [B]."""

    def __init__(self, model: M3oE, counts: list[int]) -> None:
        super().__init__()
        with torch.no_grad():
            weights = folded.fold(dict(model.named_parameters()), model.config).flat()
        self.weights = nn.ParameterList(nn.Parameter(w.detach().clone(), requires_grad=False) for w in weights)
        self.counts = counts

    def sorted_logits(self, x: Tensor) -> Tensor:
        return folded.network(x, self.counts, folded.NetworkWeights.unflat(list(self.weights)))

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        return unsort(self.sorted_logits(x[order]), order)


class _FromIds(_FromX):
    """Logits [B, T] from ids [B, F] and dense [B, C], or their sigmoid."""

    def __init__(self, model: M3oE, counts: list[int], probabilities: bool = False) -> None:
        super().__init__(model, counts)
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.probabilities = probabilities

    def forward(self, ids: Tensor, dense: Tensor, order: Tensor) -> Tensor:
        logits = self.sorted_logits(self.model.embed(ids[order], dense[order]))
        return unsort(torch.sigmoid(logits) if self.probabilities else logits, order)


class _Loss(nn.Module):
    """The training loss; embedding, fold, network and cross-entropy are one graph."""

    def __init__(self, model: M3oE, counts: list[int]) -> None:
        super().__init__()
        self.model = model
        self.counts = counts

    def forward(self, ids: Tensor, dense: Tensor, label: Tensor, order: Tensor) -> Tensor:
        x = self.model.embed(ids[order], dense[order])
        weights = folded.fold(dict(self.model.named_parameters()), self.model.config)
        return sorted_loss(folded.network(x, self.counts, weights), label[order], self.counts)


class CompiledContender(Contender):
    """torch.compile of batched and folded.

    Args:
        workload: fixes the batch, and with it the graphs' shapes.
        mode: a key of `MODES`.
        backend: "inductor"; "eager" checks that the graphs are whole without compiling them.

    Raises:
        ValueError: a call with another number of rows per domain than the workload's.
    """

    def __init__(self, workload: Workload, mode: str = "default", backend: str = "inductor") -> None:
        self.name = "torch.compile, batched + folded" + ("" if mode == "default" else f", {mode}")
        self.model: M3oE = copy.deepcopy(workload.model)
        self.num_domains = workload.config.num_domains
        self.counts = by_domain(workload.batch.domain, self.num_domains)[1]
        # torch.compile takes a mode for inductor only.
        options = {"mode": MODES[mode]} if backend == "inductor" else {}

        def compiled(module: nn.Module) -> Callable[..., Tensor]:
            return torch.compile(module, fullgraph=True, dynamic=False, backend=backend, **options)

        self._from_ids = _frozen(compiled(_FromIds(self.model, self.counts)))
        self._probabilities = _frozen(compiled(_FromIds(self.model, self.counts, probabilities=True)))
        self._from_x = _frozen(compiled(_FromX(self.model, self.counts)))
        self._loss = compiled(_Loss(self.model, self.counts))

    def forward(self, batch: Batch) -> Tensor:
        return self._from_ids(batch.ids, batch.dense, self._order(batch.domain))

    def predict(self, batch: Batch) -> Tensor:
        return self._probabilities(batch.ids, batch.dense, self._order(batch.domain))

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        return self._from_x(x, self._order(domain))

    def loss(self, batch: Batch) -> Tensor:
        return self._loss(batch.ids, batch.dense, batch.label, self._order(batch.domain))

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gradients(self) -> dict[str, Tensor]:
        return named_gradients(self.model)

    def _order(self, domain: Tensor) -> Tensor:
        order, counts = by_domain(domain, self.num_domains)
        if counts != self.counts:
            raise ValueError(f"the graphs are compiled for {self.counts} rows per domain, got {counts}")
        return order


def _frozen(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles at its first call with freezing on; later calls go straight to the function."""
    compiled = False

    def call(*arguments: Tensor) -> Tensor:
        nonlocal compiled
        if compiled:
            return function(*arguments)
        with torch._inductor.config.patch(freezing=True):
            result = function(*arguments)
        compiled = True
        return result

    return call
