"""Who moves which weights: the optimizers of a run, what their steps leave alone, and their state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from m3oe_fast.model import RankingModel
from m3oe_fast.optim import LazyAdam, RowAdagrad, clip_grad_norm
from m3oe_fast.training.options import TrainOptions


class Optimizers:
    """The optimizers of a run; none of the model's weights has two.

    Args:
        model: where its weights lie, the state will.
        options: which optimizers, and their rates.
        extra: further parameters of the inner level, such as those of the loss weighting; they are not decayed.
        tensor_lr: ``param_groups[...]["lr"]`` of ``network`` and ``fusion`` is a float32 scalar on the model's device,
            written in place when it changes, as torch's schedulers do. A captured step then reads the new rate.

    Attributes:
        network: Adam or AdamW of every parameter that no other optimizer holds.
        embedding: LazyAdam or RowAdagrad of the embedding tables; None where ``network`` holds them.
        fusion: Adam of the fusion weights; None where they stay as they are.
    """

    def __init__(
        self, model: RankingModel, options: TrainOptions, *, extra: Sequence[nn.Parameter] = (), tensor_lr: bool = False
    ) -> None:
        self._model = model
        self._options = options
        self._extra = list(extra)

        def rate(value: float) -> float | Tensor:
            # The fused CUDA kernels read no other dtype.
            return torch.tensor(value, dtype=torch.float32, device=model.embedding.device) if tensor_lr else value

        self.embedding = _of_tables(model.table_parameters(), options)
        kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
        groups = _groups(model, options, with_tables=self.embedding is None, extra=self._extra)
        groups = [group | {"lr": rate(options.lr)} for group in groups]
        self.network: Optimizer = kind(groups, lr=options.lr, weight_decay=options.weight_decay, fused=True)
        self.fusion: Optimizer | None = None
        if options.bilevel != "off":
            self.fusion = torch.optim.Adam(model.fusion_parameters(), lr=rate(options.fusion_lr), fused=True)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Give the model the gradients that inner steps need, and leave it as it was, without any gradient.

        The fusion weights have none unless they train with the network (joint): outer steps switch it on. The embedding
        tables' are sparse for an optimizer of their own.
        """
        model, sparse_before = self._model, self._model.sparse_grad
        model.sparse_grad = self.embedding is not None
        frozen = [] if self._is_joint else model.fusion_parameters()
        every = list(model.parameters())
        before = [parameter.requires_grad for parameter in every]
        try:
            with _frozen(frozen):
                yield
        finally:
            _require(every, before)  # Ctrl-C may have come while a step switched gradients off or on
            model.sparse_grad = sparse_before
            model.zero_grad(set_to_none=True)

    @property
    def _is_joint(self) -> bool:
        return self._options.bilevel == "joint"

    def set_rate_factor(self, factor: float) -> None:
        """Let the inner level, network and tables, go on at ``factor`` times its learning rates."""
        tables = [] if self.embedding is None else self.embedding.param_groups
        for groups, base in ((self.network.param_groups, self._options.lr), (tables, self._options.table_lr)):
            for group in groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(base * factor)
                else:
                    group["lr"] = base * factor

    def zero_grad(self) -> None:
        """Drop the gradients of the inner level."""
        for optimizer in self._inner():
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Move the inner level (all but the fusion weights, unless they are joint) by its gradients."""
        if self._options.clip_norm is not None:
            inner = [*self._model.network_parameters(), *self._extra]
            clip_grad_norm(inner, self._options.clip_norm)
        for optimizer in self._inner():
            optimizer.step()

    def outer_step(self, gradient: Callable[[], Sequence[Tensor | None]]) -> None:
        """Move the fusion weights, and nothing else, down what ``gradient()`` says; a None leaves its weight alone."""
        for parameter, value in zip(self._model.fusion_parameters(), gradient(), strict=True):
            parameter.grad = value
        self.fusion.step()
        self.fusion.zero_grad(set_to_none=True)

    def fusion_gradient(self, loss: Callable[[], Tensor]) -> Sequence[Tensor | None]:
        """The gradient of ``loss()`` by the fusion weights alone."""
        fusion = self._model.fusion_parameters()
        before = [parameter.requires_grad for parameter in fusion]
        _require(fusion, [True] * len(fusion))
        try:
            with _frozen(self._model.network_parameters()):
                return torch.autograd.grad(loss(), fusion, allow_unused=True)
        finally:
            _require(fusion, before)

    def virtual_rate(self) -> float:
        """xi of the modes that look through the network's steps, at its present learning rate."""
        if self._options.unroll_rate is not None:
            return self._options.unroll_rate
        group = self.network.param_groups[0]
        share = 1 - group["betas"][0] if self._options.bilevel == "unrolled" else 1.0
        return float(group["lr"]) * share

    def preconditioner(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """What Adam multiplies the gradients of ``weights`` with at its present state, 1 / (sqrt(v) + eps) with v free
        of bias; None before the first step."""
        state = self.network.state
        if any(weight not in state for weight in weights):
            return None
        group = self.network.param_groups[0]
        beta, eps = group["betas"][1], group["eps"]
        scales = []
        for weight in weights:
            unbiased = state[weight]["exp_avg_sq"] / (1 - beta ** state[weight]["step"])
            scales.append(unbiased.sqrt_().add_(eps).reciprocal_())
        return scales

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
        joint = [self.fusion] if self._is_joint else []
        return [self.network, *([] if self.embedding is None else [self.embedding]), *joint]

    def _adams(self) -> list[Optimizer]:
        return [self.network] if self.fusion is None else [self.network, self.fusion]

    def _by_name(self) -> dict[str, Optimizer | None]:
        return {
            "network_optimizer": self.network,
            "embedding_optimizer": self.embedding,
            "fusion_optimizer": self.fusion,
        }


def _groups(
    model: RankingModel, options: TrainOptions, *, with_tables: bool, extra: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    """The parameter groups of the network's optimizer, those without weight decay last."""
    elsewhere = {id(p) for p in model.fusion_parameters()}
    elsewhere |= set() if with_tables else {id(p) for p in model.table_parameters()}
    named = [(name, p) for name, p in model.named_parameters() if id(p) not in elsewhere]
    spared = [p for name, p in named if options.decay == "matrices" and not _is_matrix(name)]
    decayed = [p for name, p in named if options.decay == "all" or _is_matrix(name)]
    groups = [{"params": decayed}]
    if spared or extra:
        groups.append({"params": [*spared, *extra], "weight_decay": 0.0})
    return groups


def _is_matrix(name: str) -> bool:
    """Whether a parameter multiplies an activation: no bias, no gain or offset of a LayerNorm."""
    return name.partition(".")[0].rpartition("_")[2] not in ("bias", "gain", "offset")


def _of_tables(tables: Sequence[nn.Parameter], options: TrainOptions) -> LazyAdam | RowAdagrad | None:
    if options.embedding_optimizer == "same":
        return None
    kind = LazyAdam if options.embedding_optimizer == "lazy_adam" else RowAdagrad
    return kind(tables, lr=options.table_lr, weight_decay=options.weight_decay)


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
