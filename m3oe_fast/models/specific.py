"""Models with experts of each (domain, task) pair's own beside shared ones, on one level or several: PLE and AdaTT.

A group is a pair p = d T + t or, last, the shared one; P = D T. On every level a group's experts read what the level
below made for their group, a_p [B, X]; on the first all read x [B, I]:

    z_e  = expert_e(a_group(e))                       e: K shared experts, then n of each pair
    a_p' = sum_e softmax(a_p G_p + c_p)_e z_e + sum_{own e} v_pe z_e

PLE gates the shared and the own experts and has no v; AdaTT gates all experts and adds the own ones at v. The logits
come from the pairs' towers over the last level.

With one level the model is a configuration of the network op. With more, an expert of another pair reads something else
than the row's own, and a row may need the experts of all pairs: eager PyTorch.

Parameters beside those of `experts.py`, which are the first level's pair gates, experts and towers:

    level{l}_expert_weight.i [E, in, out] ...   level{l}_gate_weight [P, X, G'], level{l}_gate_bias [P, G']   l = 1, ..
    level{l}_shared_gate_weight [I or X, E], level{l}_shared_gate_bias [E]    of all levels but the last, where K > 0
    native_weight [levels, D, T, n]                                                           v, AdaTT only
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from m3oe_fast.model import multiply_adds_of, uniform_linear
from m3oe_fast.models.experts import ExpertModel, ExpertsConfig, expert, own_domain, pairs, tower
from m3oe_fast.reference import MatMul


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpecificConfig(ExpertsConfig):
    """Sizes of a model with experts of the pairs' own.

    Attributes:
        specific_experts: n >= 1 experts of each (domain, task) pair.
        levels: extraction levels >= 1. More than one runs in eager PyTorch.
    """

    minima: ClassVar[Mapping[str, int]] = {"tower_dim": 1, "specific_experts": 1, "levels": 1}

    specific_experts: int = 1
    levels: int = 1

    @property
    def fused(self) -> bool:
        """As in `ModelConfig`: one level."""
        return self.levels == 1

    @property
    def num_shared(self) -> int:
        """K."""
        return 0

    @property
    def num_experts(self) -> int:
        """E = K + D T n, of each level."""
        return self.num_shared + self.num_pairs * self.specific_experts

    def own_experts(self, d: int, t: int) -> list[int]:
        """The n experts of a pair's own."""
        first = self.num_shared + (d * self.num_tasks + t) * self.specific_experts
        return list(range(first, first + self.specific_experts))

    def gated_by(self, d: int, t: int) -> list[int]:
        """The experts that the softmax of a pair ranges over, ascending."""
        raise NotImplementedError


def forward(
    p: Mapping[str, Tensor], config: SpecificConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of the row's own domain; everything of every pair runs on every row."""
    of_pairs = [pair for of_tasks in pairs(config) for pair in of_tasks]
    inputs = dict.fromkeys([*of_pairs, None], x)  # None: the shared group
    for level in range(config.levels):
        names = _Names(level)
        z = _experts(p, config, inputs, names.expert, matmul)
        outputs = {}
        for pair in of_pairs:
            place = pair if level == 0 else pair[0] * config.num_tasks + pair[1]
            weight, bias = p[names.gate + "_weight"][place], p[names.gate + "_bias"][place]
            outputs[pair] = _mixed(inputs[pair], weight, bias, [z[e] for e in config.gated_by(*pair)], matmul)
            if "native_weight" in p:
                native = p["native_weight"][(level, *pair)]
                own = enumerate(config.own_experts(*pair))
                outputs[pair] = outputs[pair] + sum(native[i] * z[e] for i, e in own)
        if config.num_shared and level + 1 < config.levels:
            weight, bias = p[names.shared_gate + "_weight"], p[names.shared_gate + "_bias"]
            outputs[None] = _mixed(inputs[None], weight, bias, z, matmul)
        inputs = outputs
    return own_domain(
        [[tower(p, inputs[d, t], d, t, matmul) for d, t in of_tasks] for of_tasks in pairs(config)], domain
    )


def _experts(
    p: Mapping[str, Tensor],
    config: SpecificConfig,
    inputs: Mapping[tuple[int, int] | None, Tensor],
    name: str,
    matmul: MatMul,
) -> list[Tensor]:
    """z_e [B, X] of every expert of a level."""
    depth = len(config.expert_dims)
    groups: dict[int, tuple[int, int] | None] = dict.fromkeys(range(config.num_shared))
    for of_tasks in pairs(config):
        for pair in of_tasks:
            groups |= dict.fromkeys(config.own_experts(*pair), pair)
    return [expert(p, depth, inputs[group], e, matmul, name) for e, group in groups.items()]


def _mixed(a: Tensor, weight: Tensor, bias: Tensor, experts: Sequence[Tensor], matmul: MatMul) -> Tensor:
    """sum_e softmax(a weight + bias)_e experts_e."""
    share = torch.softmax(matmul(a, weight) + bias, dim=-1)
    return sum(share[:, e : e + 1] * z for e, z in enumerate(experts))


class _Names:
    """What the parameters of a level are called."""

    def __init__(self, level: int) -> None:
        prefix = "" if level == 0 else f"level{level}_"
        self.expert, self.gate = f"{prefix}expert", f"{prefix}gate"
        self.shared_gate = f"level{level}_shared_gate"


class SpecificModel(ExpertModel):
    """A model with experts of the pairs' own. Arguments: `RankingModel`."""

    config: SpecificConfig
    reference = staticmethod(forward)

    def make_parameters(self, c: SpecificConfig) -> None:
        """See the module."""
        super().make_parameters(c)
        gated = self.gated.shape[2]
        for level in range(1, c.levels):
            names = _Names(level)
            self.add_layers(names.expert, c.num_experts, [c.expert_dim, *c.expert_dims])
            self.add_parameter(f"{names.gate}_weight", c.num_pairs, c.expert_dim, gated)
            self.add_parameter(f"{names.gate}_bias", c.num_pairs, gated)
        for level in range(c.levels - 1 if c.num_shared else 0):
            width = c.expert_dim if level else c.input_dim
            self.add_parameter(f"{_Names(level).shared_gate}_weight", width, c.num_experts)
            self.add_parameter(f"{_Names(level).shared_gate}_bias", c.num_experts)

    def reset_network(self) -> None:
        """Every layer as torch.nn.Linear and torch.nn.LayerNorm."""
        super().reset_network()
        c = self.config
        for level in range(1, c.levels):
            gate = _Names(level).gate
            self.reset_layers(_Names(level).expert)
            uniform_linear(c.expert_dim, getattr(self, f"{gate}_weight"), getattr(self, f"{gate}_bias"))
        for level in range(c.levels - 1 if c.num_shared else 0):
            gate = _Names(level).shared_gate
            weight = getattr(self, f"{gate}_weight")
            uniform_linear(weight.shape[0], weight, getattr(self, f"{gate}_bias"))

    @staticmethod
    def gated_experts(c: SpecificConfig) -> list[list[list[int]]]:
        """[D][T][G']."""
        return [[c.gated_by(d, t) for d, t in of_tasks] for of_tasks in pairs(c)]

    @staticmethod
    def fixed_coefficients(c: SpecificConfig) -> list[list[list[float]]]:
        """None."""
        return [[[0.0] * c.num_experts for _ in of_tasks] for of_tasks in pairs(c)]

    def multiply_adds(self) -> int:
        """As in `RankingModel`. With several levels everything of every pair, but the towers."""
        c = self.config
        if c.levels == 1:
            return super().multiply_adds()
        total = c.num_tasks * (c.expert_dim * c.tower_dim + c.tower_dim)
        gated = self.gated.shape[2]
        for level in range(c.levels):
            width = c.expert_dim if level else c.input_dim
            total += c.num_experts * multiply_adds_of([width, *c.expert_dims])
            total += c.num_pairs * gated * (width + c.expert_dim)
            if c.num_shared and level + 1 < c.levels:
                total += c.num_experts * (width + c.expert_dim)
        return total
