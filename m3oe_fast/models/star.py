"""STAR: star topology adaptive recommender (Sheng et al., CIKM 2021).

Every layer's weights are those of the row's domain times shared ones, elementwise, and its bias is the sum of the two:

    layer   z' = relu(LN_d(z (W_d * W_sh) + b_d + b_sh))
    head    logit_dt = z . (w_dt * w_t) + b_dt + b_t

The products depend on parameters only and are made once a step. To the kernels, STAR is then one expert per domain at
coefficient 1 for its own rows, which compute that one alone. The tasks share the layers and have a star tower each.

Left out of the paper's model: partitioned normalisation, a BatchNorm per domain of the input, in whose place every
layer has a LayerNorm with gain and offset per domain, as all models here have; and the auxiliary network, whose input,
the domain, is an embedded field of the data here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from m3oe_fast.folded import ExpertLayer, NetworkWeights, StarFold
from m3oe_fast.model import uniform_linear
from m3oe_fast.models.experts import ExpertModel, ExpertsConfig, own_domain, pairs
from m3oe_fast.reference import MatMul, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class STARConfig(ExpertsConfig):
    """Sizes of one STAR model; `expert_dims` are the layers below the towers."""

    name: ClassVar[str] = "star"

    @property
    def num_experts(self) -> int:
        """E = D: one stack of layers per domain."""
        return self.num_domains


def forward(
    p: Mapping[str, Tensor], config: STARConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of the row's own domain; the layers of every domain run on every row."""
    logits = []
    for of_tasks in pairs(config):
        d = of_tasks[0][0]
        z = x
        for layer in range(len(config.expert_dims)):
            shared_weight, shared_bias = p[f"shared_weight.{layer}"][0], p[f"shared_bias.{layer}"][0]
            z = matmul(z, p[f"expert_weight.{layer}"][d] * shared_weight) + p[f"expert_bias.{layer}"][d] + shared_bias
            z = torch.relu(layer_norm(z, p[f"expert_gain.{layer}"][d], p[f"expert_offset.{layer}"][d]))
        logits.append([_tower(p, z, d, t, matmul) for _, t in of_tasks])
    return own_domain(logits, domain)


def _tower(p: Mapping[str, Tensor], z: Tensor, d: int, t: int, matmul: MatMul) -> Tensor:
    h = matmul(z, p["tower_weight"][d, t] * p["shared_tower_weight"][t])
    h = h + p["tower_bias"][d, t] + p["shared_tower_bias"][t]
    h = torch.relu(layer_norm(h, p["tower_gain"][d, t], p["tower_offset"][d, t]))
    logit = matmul(h, (p["head_weight"][d, t] * p["shared_head_weight"][t])[:, None])[:, 0]
    return logit + p["head_bias"][d, t] + p["shared_head_bias"][t]


class STAR(ExpertModel):
    """Star topology over layers, towers and heads. Arguments: `RankingModel`.

    Parameters beside those of `experts.py`, which are the domains': shared_weight.l [1, in, out], shared_bias.l
    [1, out], shared_tower_weight [T, X, Y], shared_tower_bias and shared_head_weight [T, Y], shared_head_bias [T].
    """

    config_type = STARConfig
    reference = staticmethod(forward)
    config: STARConfig

    def make_parameters(self, c: STARConfig) -> None:
        """See the class."""
        super().make_parameters(c)
        weights = [nn.Parameter(torch.empty(1, *w.shape[1:])) for w in self.expert_weight]
        self.shared_weight = nn.ParameterList(weights)
        self.shared_bias = nn.ParameterList([nn.Parameter(torch.empty(1, w.shape[2])) for w in weights])
        self.add_parameter("shared_tower_weight", c.num_tasks, c.expert_dim, c.tower_dim)
        self.add_parameter("shared_tower_bias", c.num_tasks, c.tower_dim)
        self.add_parameter("shared_head_weight", c.num_tasks, c.tower_dim)
        self.add_parameter("shared_head_bias", c.num_tasks)

    def reset_network(self) -> None:
        """The shared layers as torch.nn.Linear; the domains' weights start at one and their biases at zero, so that
        every domain starts from the shared network (STAR, section 3.2)."""
        super().reset_network()
        c = self.config
        for weight, bias in zip(self.shared_weight, self.shared_bias, strict=True):
            uniform_linear(weight.shape[1], weight, bias)
        uniform_linear(c.expert_dim, self.shared_tower_weight, self.shared_tower_bias)
        uniform_linear(c.tower_dim, self.shared_head_weight, self.shared_head_bias)
        for weight in (*self.expert_weight, self.tower_weight, self.head_weight):
            nn.init.ones_(weight)
        for bias in (*self.expert_bias, self.tower_bias, self.head_bias):
            nn.init.zeros_(bias)

    def weights(self, star_fold: StarFold) -> NetworkWeights:
        """The arguments of the network op, from the products of domains and shared."""
        own = zip(self.expert_weight, self.expert_bias, self.expert_gain, self.expert_offset, strict=True)
        shared = zip(self.shared_weight, self.shared_bias, strict=True)
        layers = [
            ExpertLayer(weight * shared_weight, bias + shared_bias, gain, offset)
            for (weight, bias, gain, offset), (shared_weight, shared_bias) in zip(own, shared, strict=True)
        ]
        return self.with_experts(layers)._replace(
            tower_weight=self.tower_weight * self.shared_tower_weight,
            tower_bias=self.tower_bias + self.shared_tower_bias,
            head_weight=self.head_weight * self.shared_head_weight,
            head_bias=self.head_bias + self.shared_head_bias,
        )

    @staticmethod
    def gated_experts(c: STARConfig) -> list[list[list[int]]]:
        """None."""
        return [[[] for _ in of_tasks] for of_tasks in pairs(c)]

    @staticmethod
    def fixed_coefficients(c: STARConfig) -> list[list[list[float]]]:
        """The layers of the own domain, at 1."""
        return [[[float(e == d) for e in range(c.num_domains)] for d, _ in of_tasks] for of_tasks in pairs(c)]
