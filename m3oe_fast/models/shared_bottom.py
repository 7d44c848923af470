"""Shared-Bottom: one stack of layers for all, a tower per (domain, task) (Caruana, Machine Learning 28, 1997)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from m3oe_fast.models.experts import ExpertModel, ExpertsConfig, expert, own_domain, pairs, tower
from m3oe_fast.reference import MatMul


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBottomConfig(ExpertsConfig):
    """Sizes of one Shared-Bottom model; `expert_dims` are the layers of the bottom."""

    name: ClassVar[str] = "shared_bottom"

    @property
    def num_experts(self) -> int:
        """E = 1: the bottom."""
        return 1


def forward(
    p: Mapping[str, Tensor], config: SharedBottomConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of the row's own domain; every tower runs on every row."""
    bottom = expert(p, len(config.expert_dims), x, 0, matmul)
    return own_domain([[tower(p, bottom, d, t, matmul) for d, t in of_tasks] for of_tasks in pairs(config)], domain)


class SharedBottom(ExpertModel):
    """One bottom for all domains and tasks, a tower for each pair of them. Arguments: `RankingModel`."""

    config_type = SharedBottomConfig
    reference = staticmethod(forward)

    @staticmethod
    def gated_experts(c: SharedBottomConfig) -> list[list[list[int]]]:
        """None."""
        return [[[] for _ in of_tasks] for of_tasks in pairs(c)]

    @staticmethod
    def fixed_coefficients(c: SharedBottomConfig) -> list[list[list[float]]]:
        """The bottom, at 1."""
        return [[[1.0] for _ in of_tasks] for of_tasks in pairs(c)]
