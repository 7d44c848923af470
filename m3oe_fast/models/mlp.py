"""MLP: one stack of layers, the tower on top. The baseline without any sharing: a model per domain and task.

In form `single` (D = 1, T = 1) it is the paper's MLP. With more domains or tasks it would be Shared-Bottom.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from m3oe_fast.errors import ConfigError
from m3oe_fast.models.experts import ExpertModel, ExpertsConfig, expert, tower
from m3oe_fast.reference import MatMul


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLPConfig(ExpertsConfig):
    """Sizes of one MLP; `expert_dims` are its layers, `tower_dim` the last hidden one.

    Raises:
        ConfigError: as `ModelConfig`; more than one domain or task.
    """

    name: ClassVar[str] = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_pairs != 1:
            raise ConfigError(
                f"mlp is a model of one domain and one task, not of num_domains {self.num_domains} and num_tasks "
                f"{self.num_tasks}: use form single, or model shared_bottom"
            )

    @property
    def num_experts(self) -> int:
        """E = 1: the layers."""
        return 1


def forward(
    p: Mapping[str, Tensor], config: MLPConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, 1]."""
    return tower(p, expert(p, len(config.expert_dims), x, 0, matmul), 0, 0, matmul)[:, None]


class MLP(ExpertModel):
    """One stack of layers for one domain and one task. Arguments: `RankingModel`."""

    config_type = MLPConfig
    reference = staticmethod(forward)

    @staticmethod
    def gated_experts(c: MLPConfig) -> list[list[list[int]]]:
        """None."""
        return [[[]]]

    @staticmethod
    def fixed_coefficients(c: MLPConfig) -> list[list[list[float]]]:
        """The layers, at 1."""
        return [[[1.0]]]
