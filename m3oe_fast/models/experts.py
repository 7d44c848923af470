"""The models whose experts read the input directly: parameters, first values and the arguments of the network op.

    z_e   = expert_e(x)                                                      e < E, layers of Linear, LayerNorm, ReLU
    u_t   = sum_e (softmax over the pair's gated experts + table[d, t, e]) z_e
    logit = head_dt . relu(LN(u_t W_dt + b_dt)) + head bias

A kind of model says which experts a pair gates, [D, T, G'] places, and which it takes at fixed weights, [D, T, E]. So a
model is data for the kernels: gate mask and coefficient table. The op has no representation layer here: r = x, I = H.

Parameters, stacked as in M3oE: expert_weight.l [E, in, out], expert_bias.l, expert_gain.l, expert_offset.l [E, out];
gate_weight [D, T, I, G'], gate_bias [D, T, G']; tower_weight [D, T, X, Y], tower_bias, tower_gain, tower_offset,
head_weight [D, T, Y], head_bias [D, T].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from m3oe_fast.config import ModelConfig
from m3oe_fast.folded import ExpertLayer, NetworkWeights, StarFold
from m3oe_fast.model import RankingModel, multiply_adds_of, reset_norm, uniform_linear
from m3oe_fast.reference import MatMul, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig(ModelConfig):
    """Sizes of experts and towers.

    Attributes:
        expert_dims: output width of each layer of an expert; the last one is X.
        tower_dim: Y, hidden width of a tower.
    """

    minima: ClassVar[Mapping[str, int]] = {"tower_dim": 1}
    width_lists: ClassVar[tuple[str, ...]] = ("expert_dims",)

    expert_dims: Sequence[int] = (256, 64)
    tower_dim: int = 64

    @property
    def num_pairs(self) -> int:
        """D T, the (domain, task) pairs; pair p = d T + t."""
        return self.num_domains * self.num_tasks

    @property
    def num_experts(self) -> int:
        """E, of all pairs together."""
        raise NotImplementedError

    @property
    def expert_dim(self) -> int:
        """X: the width that leaves the last expert layer."""
        return self.expert_dims[-1]


class ExpertModel(RankingModel):
    """A model of experts over the input, gates, fixed coefficients and towers. Arguments: `RankingModel`."""

    config: ExpertsConfig
    gated: Tensor
    table: Tensor
    _mask: Tensor | None

    def make_parameters(self, c: ExpertsConfig) -> None:
        """See the module."""
        d, t = c.num_domains, c.num_tasks
        gated = torch.tensor(self.gated_experts(c), dtype=torch.int64).reshape(d, t, -1)
        table = torch.tensor(self.fixed_coefficients(c), dtype=self.embedding.dtype).reshape(d, t, c.num_experts)
        some = 0 < gated.shape[2] < c.num_experts
        mask = torch.zeros(d, t, c.num_experts, dtype=torch.bool).scatter(2, gated, True) if some else None
        self.register_buffer("gated", gated, persistent=False)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("_mask", mask, persistent=False)
        self.add_layers("expert", c.num_experts, [c.input_dim, *c.expert_dims])
        self.add_parameter("gate_weight", d, t, c.input_dim, gated.shape[2])
        self.add_parameter("gate_bias", d, t, gated.shape[2])
        self.add_parameter("tower_weight", d, t, c.expert_dim, c.tower_dim)
        self.add_normed("tower", d, t, c.tower_dim)
        self.add_parameter("head_weight", d, t, c.tower_dim)
        self.add_parameter("head_bias", d, t)

    @staticmethod
    def gated_experts(c: Any) -> Sequence[Sequence[Sequence[int]]]:
        """[D][T][G']: the experts that the softmax of a pair ranges over, ascending."""
        raise NotImplementedError

    @staticmethod
    def fixed_coefficients(c: Any) -> Sequence[Sequence[Sequence[float]]]:
        """[D][T][E]: the coefficients that no gate gives."""
        raise NotImplementedError

    @property
    def gate_mask(self) -> Tensor | None:
        """bool [D, T, E]: the experts that each pair gates; None: all of them, or no gates at all."""
        return self._mask

    def reset_network(self) -> None:
        """Every layer as torch.nn.Linear and torch.nn.LayerNorm."""
        c = self.config
        uniform_linear(c.input_dim, self.gate_weight, self.gate_bias)
        self.reset_layers("expert")
        uniform_linear(c.expert_dim, self.tower_weight, self.tower_bias)
        reset_norm(self.tower_gain, offsets=(self.tower_offset,))
        uniform_linear(c.tower_dim, self.head_weight, self.head_bias)

    def weights(self, star_fold: StarFold) -> NetworkWeights:
        """The arguments of the network op. Gates are spread over all E experts, zeros where a pair has none; the mask
        keeps the softmax from seeing them."""
        layers = zip(self.expert_weight, self.expert_bias, self.expert_gain, self.expert_offset, strict=True)
        return self.with_experts([ExpertLayer(*layer) for layer in layers])

    def with_experts(self, layers: Sequence[ExpertLayer]) -> NetworkWeights:
        """`weights` with these experts."""
        return NetworkWeights(
            *(self.head_bias.new_empty(0) for _ in range(8)),  # not one for all: torch.compile takes no tensor twice
            self._spread(self.gate_weight, self.gated[:, :, None].expand_as(self.gate_weight)),
            self._spread(self.gate_bias, self.gated),
            self.table,
            self.tower_weight,
            self.tower_bias,
            self.tower_gain,
            self.tower_offset,
            self.head_weight,
            self.head_bias,
            tuple(layers),
        )

    def _spread(self, gates: Tensor, places: Tensor) -> Tensor:
        """[..., G'] to [..., E]."""
        if self._mask is None:
            return gates
        return gates.new_zeros(*gates.shape[:-1], self.config.num_experts).scatter(-1, places, gates)

    def multiply_adds(self) -> int:
        """As in `RankingModel`, for the domain that uses most experts; experts that none of its pairs takes are not
        computed."""
        c = self.config
        expert = multiply_adds_of([c.input_dim, *c.expert_dims])
        taken = self.table != 0
        if self.gated.shape[2]:
            taken = taken.scatter(2, self.gated, True)
        used = int(taken.any(1).sum(1).max())
        mixed = int(taken.sum((1, 2)).max()) * c.expert_dim
        gates = c.num_tasks * c.input_dim * self.gated.shape[2]
        towers = c.num_tasks * (c.expert_dim * c.tower_dim + c.tower_dim)
        return used * expert + gates + mixed + towers


def expert(
    p: Mapping[str, Tensor], depth: int, x: Tensor, e: int, matmul: MatMul = torch.matmul, name: str = "expert"
) -> Tensor:
    """[B, X] of expert e: `depth` layers relu(LN(z W + b)) over x [B, I]."""
    z = x
    for layer in range(depth):
        z = matmul(z, p[f"{name}_weight.{layer}"][e]) + p[f"{name}_bias.{layer}"][e]
        z = torch.relu(layer_norm(z, p[f"{name}_gain.{layer}"][e], p[f"{name}_offset.{layer}"][e]))
    return z


def gate(
    p: Mapping[str, Tensor], x: Tensor, experts: Sequence[Tensor], d: int, t: int, matmul: MatMul = torch.matmul
) -> Tensor:
    """sum_e softmax(x G_dt + c_dt)_e experts_e: the pair's gate [B, G'] over as many experts [B, X]."""
    weight = torch.softmax(matmul(x, p["gate_weight"][d, t]) + p["gate_bias"][d, t], dim=-1)
    return sum(weight[:, g : g + 1] * z for g, z in enumerate(experts))


def tower(p: Mapping[str, Tensor], u: Tensor, d: int, t: int, matmul: MatMul = torch.matmul) -> Tensor:
    """Logit [B] of the pair from u [B, X]."""
    h = matmul(u, p["tower_weight"][d, t]) + p["tower_bias"][d, t]
    h = torch.relu(layer_norm(h, p["tower_gain"][d, t], p["tower_offset"][d, t]))
    return matmul(h, p["head_weight"][d, t][:, None])[:, 0] + p["head_bias"][d, t]


def own_domain(logits: Sequence[Sequence[Tensor]], domain: Tensor) -> Tensor:
    """[B, T]: of logits [D][T] of [B], those of the row's own domain."""
    by_domain = torch.stack([torch.stack(list(of_tasks), dim=1) for of_tasks in logits])  # [D, B, T]
    return by_domain[domain.long(), torch.arange(len(domain), device=domain.device)]


def pairs(config: ModelConfig) -> list[list[tuple[int, int]]]:
    """[D][T] of (domain, task)."""
    return [[(d, t) for t in range(config.num_tasks)] for d in range(config.num_domains)]
