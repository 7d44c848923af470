"""Parameters as the published codes of this field hold them: a tensor for every expert, gate, tower and head.

Our models stack them. Eager PyTorch that reads its experts one by one out of a stack would pay for it in the backward
pass, where every slice makes a gradient of the whole stack, so the opponents of `bench.models` get them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# How many leading axes count things: experts; domains and tasks; tasks of STAR's shared towers; levels, domains, tasks.
_STACKED = {
    r"(level\d+_)?expert_|shared_(weight|bias)\.|star_(weight|bias)$|shared_(tower|head)_|level\d+_gate_": 1,
    r"gate_|tower_|head_": 2,
    r"native_weight$": 3,
}


class Stack:
    """A stacked parameter, apart: `stack[i]`, or `stack[d, t]`, is a leaf of its own.

    Args:
        tensor: the values, copied.
        axes: how many leading axes count the parts.
    """

    def __init__(self, tensor: Tensor, axes: int) -> None:
        self._counts = tensor.shape[:axes]
        parts = tensor.detach().reshape(math.prod(self._counts), *tensor.shape[axes:])
        self.parts = [nn.Parameter(part.clone()) for part in parts]

    def __getitem__(self, at: int | tuple[int, ...]) -> Tensor:
        place = 0
        for index, count in zip((at,) if isinstance(at, int) else at, self._counts, strict=True):
            place = place * count + index
        return self.parts[place]

    def gradient(self) -> Tensor:
        """The gradients of the parts, stacked as the parameter was; zeros where none arrived."""
        grads = [torch.zeros_like(part) if part.grad is None else part.grad for part in self.parts]
        return torch.stack(grads).reshape(*self._counts, *self.parts[0].shape)


class Separate(Mapping[str, "Stack | Tensor"]):
    """The parameters of a model by name, as its `reference` reads them."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[str, Stack | nn.Parameter] = {}
        for name, parameter in model.named_parameters():
            axes = next((n for pattern, n in _STACKED.items() if re.match(pattern, name)), 0)
            if axes and parameter.numel():
                self._held[name] = Stack(parameter, axes)
            else:
                self._held[name] = nn.Parameter(parameter.detach().clone())

    def __getitem__(self, name: str) -> Stack | Tensor:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def leaves(self) -> list[nn.Parameter]:
        """What Adam updates."""
        return [leaf for held in self._held.values() for leaf in (held.parts if isinstance(held, Stack) else [held])]

    def gradients(self) -> dict[str, Tensor]:
        """By the model's names, zeros where none arrived."""
        return {
            name: held.gradient()
            if isinstance(held, Stack)
            else torch.zeros_like(held)
            if held.grad is None
            else held.grad
            for name, held in self._held.items()
        }
