"""The contenders that run as written: published-style, batched and folded, and m3oe_fast itself."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.contender import Contender, named_gradients
from bench.published import PublishedM3oE
from bench.sorting import by_domain, sorted_loss, unsort
from bench.workload import Batch, Workload
from m3oe_fast import M3oE, folded, reference


class PublishedContender(Contender):
    """Eager PyTorch in the style of the published code; its step also with the default Adam, which
    its users run.
    """

    name = "eager, published style"
    optimizers = ("fused", "default")

    def __init__(self, workload: Workload) -> None:
        self.model = PublishedM3oE(workload.model)

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch.ids, batch.dense, batch.domain)

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        return self.model.network(x, domain)

    def loss(self, batch: Batch) -> Tensor:
        return self.model.loss(*batch)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gradients(self) -> dict[str, Tensor]:
        return self.model.gradients()


class FoldedContender(Contender):
    """Eager PyTorch after all the algebra: one embedding table, folded star layer, own domain only,
    few large products.
    """

    name = "eager, batched + folded"

    def __init__(self, workload: Workload) -> None:
        self.model: M3oE = copy.deepcopy(workload.model)
        self.config = workload.config
        with torch.no_grad():
            self.folded = folded.fold(dict(self.model.named_parameters()), self.config)

    def forward(self, batch: Batch) -> Tensor:
        order, counts = by_domain(batch.domain, self.config.num_domains)
        x = self.model.embed(batch.ids[order], batch.dense[order])
        return unsort(folded.network(x, counts, self.folded), order)

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        order, counts = by_domain(domain, self.config.num_domains)
        return unsort(folded.network(x[order], counts, self.folded), order)

    def loss(self, batch: Batch) -> Tensor:
        order, counts = by_domain(batch.domain, self.config.num_domains)
        x = self.model.embed(batch.ids[order], batch.dense[order])
        weights = folded.fold(dict(self.model.named_parameters()), self.config)
        return sorted_loss(folded.network(x, counts, weights), batch.label[order], counts)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gradients(self) -> dict[str, Tensor]:
        return named_gradients(self.model)


class OwnContender(Contender):
    """m3oe_fast through its public surface: argument checks, sorting and folding are part of what
    is timed. Predictions are made in `eval()` mode, where the model keeps its folded weights.

    Only `network` goes below it, to the op on x with weights folded and packed beforehand, as the
    other contenders do.
    """

    own = True

    def __init__(self, workload: Workload, precision: str = "fp32") -> None:
        self.config = workload.config
        self.precision = precision
        self.model = M3oE(self.config, backend=workload.model.backend, precision=precision)
        self.model.load_state_dict(workload.model.state_dict())
        self.name = f"m3oe_fast, {self.model.backend_name}{self._suffix()}"
        self._op = self._network_op()

    def forward(self, batch: Batch) -> Tensor:
        self._switch(training=False)
        return self.model(batch.ids, batch.dense, batch.domain)

    def predict(self, batch: Batch) -> Tensor:
        self._switch(training=False)
        return self.model.predict(batch.ids, batch.dense, batch.domain)

    def network(self, x: Tensor, domain: Tensor) -> Tensor:
        return self._op(x, domain)

    def loss(self, batch: Batch) -> Tensor:
        self._switch(training=True)
        return self.model.loss(*batch)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def gradients(self) -> dict[str, Tensor]:
        return named_gradients(self.model)

    def _switch(self, training: bool) -> None:
        if self.model.training != training:  # going through the modules takes as long as a small batch
            self.model.train(training)

    @torch.no_grad()
    def _network_op(self) -> Callable[[Tensor, Tensor], Tensor]:
        parameters = dict(self.model.named_parameters())
        if self.model.backend_name == "reference":
            return lambda x, domain: reference.forward(parameters, self.config, x, domain)
        from m3oe_fast.ops import infer, pack

        switches = {"star_linear": self.config.star_activation == "linear", "precision": self.precision}
        weights = folded.fold(parameters, self.config)
        packed = pack(weights, self.config.input_dim, **switches)
        return lambda x, domain: infer(x, domain, weights.flat(), packed, **switches)

    def _suffix(self) -> str:
        if self.precision == "fp32":
            return ""
        computes = self.model.compute_precision
        return f", {self.precision}" + ("" if computes == self.precision else f" (computes in {computes})")
