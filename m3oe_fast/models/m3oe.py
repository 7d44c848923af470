"""M3oE: multi-domain multi-task mixture of experts (SIGIR 2024, arXiv 2404.18465), and its ablations.

`m3oe_fast/reference.py` holds the readable network and the shape of every parameter, `m3oe_fast/folded.py` the algebra
that turns them into the arguments of the network op.
"""

from __future__ import annotations

import torch
from torch import nn

from m3oe_fast import folded, reference
from m3oe_fast.config import M3oEConfig
from m3oe_fast.model import RankingModel, multiply_adds_of, reset_norm, uniform_linear


class M3oE(RankingModel):
    """Multi-domain multi-task mixture of experts (M3oE, SIGIR 2024, arXiv 2404.18465). Arguments: `RankingModel`."""

    config_type = M3oEConfig
    reference = staticmethod(reference.forward)
    config: M3oEConfig

    def make_parameters(self, c: M3oEConfig) -> None:
        """See `reference.py` for every shape."""
        d, t = c.num_domains, c.num_tasks
        self.add_parameter("star_weight", d, c.input_dim, c.star_dim)
        self.add_parameter("star_bias", d, c.star_dim)
        self.add_parameter("star_shared_weight", c.input_dim, c.star_dim)
        self.add_parameter("star_shared_bias", c.star_dim)
        self.add_parameter("star_out_weight", c.star_dim, c.hidden_dim)
        for name in ("star_out_bias", "star_gain", "star_offset"):
            self.add_parameter(name, c.hidden_dim)
        self.add_parameter("skip_weight", c.input_dim, c.hidden_dim)
        self.add_normed("skip", c.hidden_dim)
        self.add_layers("expert", c.num_experts, [c.hidden_dim, *c.expert_dims])
        self.add_parameter("gate_weight", d, t, c.hidden_dim, c.gated_experts)
        self.add_parameter("gate_bias", d, t, c.gated_experts)
        width = c.expert_dim * (c.num_modules if c.modules == "concatenated" else 1)
        self.add_parameter("tower_weight", d, t, width, c.tower_dim)
        self.add_normed("tower", d, t, c.tower_dim)
        self.add_parameter("head_weight", d, t, c.tower_dim)
        self.add_parameter("head_bias", d, t)
        for name in c.fusion_names:
            index = d if name.endswith("domain") else t
            self.add_parameter(name, *{"scalar": (), "per_index": (index,), "per_pair": (d, t)}[c.fusion])

    def reset_network(self) -> None:
        """Published initialisation: star matrices Xavier-uniform with zero bias, every other layer as torch.nn.Linear
        and torch.nn.LayerNorm, fusion logits `fusion_init`."""
        c = self.config
        for weight in (self.star_shared_weight, *self.star_weight):
            nn.init.xavier_uniform_(weight)
        if c.init == "star":
            nn.init.ones_(self.star_weight)
        nn.init.zeros_(self.star_bias)
        nn.init.zeros_(self.star_shared_bias)
        linears = {"star_out": c.star_dim, "skip": c.input_dim, "gate": c.hidden_dim}
        for name, fan_in in linears.items():
            uniform_linear(fan_in, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))
        uniform_linear(self.tower_weight.shape[2], self.tower_weight, self.tower_bias)
        uniform_linear(c.tower_dim, self.head_weight, self.head_bias)
        self.reset_layers("expert")
        reset_norm(
            self.star_gain,
            self.skip_gain,
            self.tower_gain,
            offsets=(self.star_offset, self.skip_offset, self.tower_offset),
        )
        for logit in self.fusion_parameters():
            nn.init.constant_(logit, c.fusion_init)

    def fusion_parameters(self) -> list[nn.Parameter]:
        """The fusion logits: what the outer level of the bi-level optimisation trains."""
        return [getattr(self, name) for name in self.config.fusion_names]

    def fusion_values(self) -> dict[str, float | list[float] | list[list[float]]]:
        """The fusion weights after the sigmoid, by name: a number, one per domain or task, or [D][T]."""
        return {name: torch.sigmoid(getattr(self, name)).tolist() for name in self.config.fusion_names}

    def weights(self, star_fold: folded.StarFold) -> folded.NetworkWeights:
        """The arguments of the network op: star layer and fusion weights folded."""
        return folded.fold(dict(self.named_parameters()), self.config, star_fold)

    @property
    def gate_detach(self) -> bool:
        """Gates read the representation without sending it gradients."""
        return self.config.gate_detach

    @property
    def star_linear(self) -> bool:
        """The first term of the representation as printed in the paper."""
        return self.config.star_activation == "linear"

    def multiply_adds(self) -> int:
        """As in `RankingModel`; the star layer counts folded, one [I, H] product."""
        c = self.config
        x = c.expert_dim
        expert = multiply_adds_of([c.hidden_dim, *c.expert_dims])
        mixed = c.num_tasks * c.num_experts * x
        towers = c.num_tasks * (self.tower_weight.shape[2] * c.tower_dim + c.tower_dim)
        gates = c.num_tasks * c.hidden_dim * c.gated_experts
        return 2 * c.input_dim * c.hidden_dim + c.num_experts * expert + gates + mixed + towers
