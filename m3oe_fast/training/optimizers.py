"""Who moves which weights: the optimizers of a run, what their steps leave alone, and their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from m3oe_fast.model import M3oE
from m3oe_fast.optim import LazyAdam, RowAdagrad
from m3oe_fast.training.options import TrainOptions


class Optimizers:
    """The optimizers of a run; none of the model's weights has two.

    Args:
        model: where its weights lie, the state will.
        options: which optimizers, and their rates.
        tensor_lr: ``param_groups[...]["lr"]`` of ``network`` and ``fusion`` is a float32 scalar on the model's device,
            written in place when it changes, as torch's schedulers do. A captured step then reads the new rate.

    Attributes:
        network: Adam or AdamW of every parameter that no other optimizer holds.
        embedding: LazyAdam or RowAdagrad of the embedding table; None where ``network`` holds it.
        fusion: Adam of the fusion weights; None without outer steps.
    """

    def __init__(self, model: M3oE, options: TrainOptions, *, tensor_lr: bool = False) -> None:
        self._model = model

        def rate(value: float) -> float | Tensor:
            # The fused CUDA kernels read no other dtype.
            return torch.tensor(value, dtype=torch.float32, device=model.embedding.device) if tensor_lr else value

        self.embedding = _of_table(model.embedding, options)
        kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
        self.network: Optimizer = kind(
            [p for p in model.network_parameters() if self.embedding is None or p is not model.embedding],
            lr=rate(options.lr),
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.fusion: Optimizer | None = None
        if options.bilevel != "off":
            self.fusion = torch.optim.Adam(model.fusion_parameters(), lr=rate(options.fusion_lr), fused=True)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Give the model the gradients that inner steps need, and leave it as it was, without any gradient.

        The fusion weights have none: outer steps switch it on. The embedding table's is sparse for an optimizer of its
        own.
        """
        model, sparse_before = self._model, self._model.sparse_grad
        model.sparse_grad = self.embedding is not None
        try:
            with _frozen(model.fusion_parameters()):
                yield
        finally:
            model.sparse_grad = sparse_before
            model.zero_grad(set_to_none=True)

    def zero_grad(self) -> None:
        """Drop the gradients of the inner level."""
        for optimizer in self._inner():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Move the inner level, that is all but the fusion weights, by its gradients."""
        for optimizer in self._inner():
            optimizer.step()

    def outer_step(self, loss: Callable[[], Tensor]) -> None:
        """Move the fusion weights, and nothing else, down the gradient of ``loss()``."""
        fusion = self._model.fusion_parameters()
        _require(fusion, [True] * len(fusion))
        with _frozen(self._model.network_parameters()):
            gradients = torch.autograd.grad(loss(), fusion, allow_unused=True)
        _require(fusion, [False] * len(fusion))
        for parameter, gradient in zip(fusion, gradients, strict=True):
            parameter.grad = gradient
        self.fusion.step()
        self.fusion.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """The state of every optimizer by name, None for one that the run does without.

        Rates are numbers, whatever the run has, so a run with CUDA graphs and one without can go on from each other.
        """
        return {
            name: None if optimizer is None else _with_plain_rates(optimizer.state_dict())
            for name, optimizer in self._by_name().items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; other entries of ``state`` are ignored.

        The state gets new tensors, so no captured step may be replayed afterwards. Rates stay the tensors they are.
        """
        for name, optimizer in self._by_name().items():
            if optimizer is not None:
                rates = [group["lr"] for group in optimizer.param_groups]
                optimizer.load_state_dict(state[name])
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    if isinstance(rate, Tensor):
                        group["lr"] = rate.fill_(group["lr"])

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """Let a CUDA graph capture the steps. Only that asks for the flag: without it, torch warns in other steps of an
        optimizer that has it."""
        groups = [group for optimizer in self._adams() for group in optimizer.param_groups]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    def _inner(self) -> list[Optimizer]:
        return [self.network] if self.embedding is None else [self.network, self.embedding]

    def _adams(self) -> list[Optimizer]:
        return [self.network] if self.fusion is None else [self.network, self.fusion]

    def _by_name(self) -> dict[str, Optimizer | None]:
        return {
            "network_optimizer": self.network,
            "embedding_optimizer": self.embedding,
            "fusion_optimizer": self.fusion,
        }


def _of_table(table: nn.Parameter, options: TrainOptions) -> LazyAdam | RowAdagrad | None:
    if options.embedding_optimizer == "same":
        return None
    kind = LazyAdam if options.embedding_optimizer == "lazy_adam" else RowAdagrad
    return kind([table], lr=options.table_lr, weight_decay=options.weight_decay)


def _with_plain_rates(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"param_groups": [group | {"lr": _plain(group["lr"])} for group in state["param_groups"]]}


def _plain(rate: float | Tensor) -> float:
    """The shortest number that is ``rate`` in float32: 0.001, not 0.0010000000474974513."""
    return float(str(np.float32(rate.item()))) if isinstance(rate, Tensor) else rate


@contextmanager
def _frozen(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Switch the gradient of ``parameters`` off, and back to what it was."""
    before = [parameter.requires_grad for parameter in parameters]
    _require(parameters, [False] * len(before))
    try:
        yield
    finally:
        _require(parameters, before)


def _require(parameters: Iterable[nn.Parameter], flags: Iterable[bool]) -> None:
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
