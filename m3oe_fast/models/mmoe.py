"""MMoE: experts shared by all, a softmax gate and a tower per (domain, task) (Ma et al., KDD 2018).

    u_dt = sum_k softmax(x G_dt + c_dt)_k expert_k(x)

The paper's gates are per task; here a task of the multi-domain form is a (domain, task) pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from m3oe_fast.models.experts import ExpertModel, ExpertsConfig, expert, gate, own_domain, pairs, tower
from m3oe_fast.reference import MatMul


@dataclasses.dataclass(frozen=True, kw_only=True)
class MMoEConfig(ExpertsConfig):
    """Sizes of one MMoE model.

    Attributes:
        shared_experts: K >= 1.
    """

    name: ClassVar[str] = "mmoe"
    minima: ClassVar[Mapping[str, int]] = {"tower_dim": 1, "shared_experts": 1}

    shared_experts: int = 4

    @property
    def num_experts(self) -> int:
        """E = K."""
        return self.shared_experts


def forward(
    p: Mapping[str, Tensor], config: MMoEConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of the row's own domain; every gate and tower runs on every row."""
    experts = [expert(p, len(config.expert_dims), x, e, matmul) for e in range(config.shared_experts)]
    return own_domain(
        [
            [tower(p, gate(p, x, experts, d, t, matmul), d, t, matmul) for d, t in of_tasks]
            for of_tasks in pairs(config)
        ],
        domain,
    )


class MMoE(ExpertModel):
    """Multi-gate mixture of experts. Arguments: `RankingModel`."""

    config_type = MMoEConfig
    reference = staticmethod(forward)

    @staticmethod
    def gated_experts(c: MMoEConfig) -> list[list[list[int]]]:
        """All."""
        return [[list(range(c.num_experts)) for _ in of_tasks] for of_tasks in pairs(c)]

    @staticmethod
    def fixed_coefficients(c: MMoEConfig) -> list[list[list[float]]]:
        """None."""
        return [[[0.0] * c.num_experts for _ in of_tasks] for of_tasks in pairs(c)]
