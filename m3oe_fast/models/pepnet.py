"""PEPNet: embeddings and hidden units scaled by gates (KDD 2023, arXiv 2302.01115). Eager PyTorch: not the op's.

A gate reads what is known beforehand, and scales what it is put on by factors in (0, 2), by 1 at a neutral gate:

    gate(v)   = 2 sigmoid(relu(LN(v W + b)) W' + b')                                 Gate NU
    o         = gate([stop_gradient(x) | domain_embedding_d]) * x                    EPNet
    h_t0      = o
    h_tl      = gate_tl([x | stop_gradient(o) | domain_embedding_d]) * relu(LN(h_t,l-1 W_tl + b_tl))        PPNet
    logit_t   = head_t . h_tL + head bias

A tower belongs to a task and serves all domains. The gates of a layer share their hidden layer over the tasks.

Choices, where the paper has features that a row here does not tell apart. The domain side is the learned embedding of
the domain, without statistics of user and item in it. The prior of PPNet, in the paper ids of user, item and author, is
the whole of x with the domain embedding: nothing here says which fields are the user's or the item's. The hidden layer
of a gate has a LayerNorm, like every hidden layer of these models and unlike the paper's.

Parameters (U domain width, G gate width, L layers):

    domain_embedding [D, U]
    embedding_gate_weight [I + U, G]  embedding_gate_bias _gain _offset [G]
    embedding_gate_out_weight [G, I]  embedding_gate_out_bias [I]
    unit_gate_weight [L, 2 I + U, G]  unit_gate_bias _gain _offset [L, G]
    unit_gate_out_weight.l [T, G, out]  unit_gate_out_bias.l [T, out]
    tower_weight.l [T, in, out]  tower_bias.l _gain.l _offset.l [T, out]
    head_weight [T, X]  head_bias [T]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from m3oe_fast.config import ModelConfig
from m3oe_fast.model import RankingModel, reset_norm, uniform_linear
from m3oe_fast.models.hidden import hidden, layer_of_stack
from m3oe_fast.reference import MatMul

GAMMA = 2.0
"""The largest factor of a gate; the published value."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PEPNetConfig(ModelConfig):
    """Sizes of PEPNet. There is no tower_dim: a tower has the layers that other models give an expert.

    Attributes:
        expert_dims: output width of each layer of a tower; the last one is X.
        knowledge_dim: U, width of the embedding of a domain.
        gate_dim: G, hidden width of every gate.
    """

    name: ClassVar[str] = "pepnet"
    minima: ClassVar[Mapping[str, int]] = {"knowledge_dim": 1, "gate_dim": 1}
    width_lists: ClassVar[tuple[str, ...]] = ("expert_dims",)

    expert_dims: Sequence[int] = (256, 64)
    knowledge_dim: int = 16
    gate_dim: int = 64

    @property
    def fused(self) -> bool:
        """As in `ModelConfig`: the op has no gates on single units."""
        return False

    @property
    def expert_dim(self) -> int:
        """X: the width that leaves the last layer of a tower."""
        return self.expert_dims[-1]


def gate_hidden(
    known: Tensor,
    of_domain: Tensor,
    domain: Tensor,
    weight: Tensor,
    bias: Tensor,
    gain: Tensor,
    offset: Tensor,
    matmul: MatMul,
) -> Tensor:
    """Hidden layer [B, G] of a gate that reads [known | of_domain[domain]], known [B, V] and of_domain [D, U].

    A domain has one embedding, so its product with the weight [V + U, G] is made per domain and joins a row as a bias.
    """
    of_row, of_embedding = weight.split([known.shape[1], of_domain.shape[1]])
    bias = (of_domain @ of_embedding + bias).index_select(0, domain)
    return hidden(known, of_row, bias, gain, offset, matmul)


def factors(h: Tensor, weight: Tensor, bias: Tensor, matmul: MatMul) -> Tensor:
    """What a gate multiplies with, [B, out] in (0, GAMMA), from its hidden layer [B, G]."""
    return GAMMA * torch.sigmoid(matmul(h, weight) + bias)


def forward(
    p: Mapping[str, Tensor], config: PEPNetConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of x [B, I] and domain [B]."""
    parts = ("weight", "bias", "gain", "offset")
    domain, of_domain = domain.long(), p["domain_embedding"]

    gate = gate_hidden(x.detach(), of_domain, domain, *(p[f"embedding_gate_{part}"] for part in parts), matmul)
    o = factors(gate, p["embedding_gate_out_weight"], p["embedding_gate_out_bias"], matmul) * x

    prior = torch.cat([x, o.detach()], dim=1)
    units = [o] * config.num_tasks
    for layer in range(len(config.expert_dims)):
        gate = gate_hidden(prior, of_domain, domain, *(p[f"unit_gate_{part}"][layer] for part in parts), matmul)
        weight, bias = p[f"unit_gate_out_weight.{layer}"], p[f"unit_gate_out_bias.{layer}"]
        units = [
            factors(gate, weight[t], bias[t], matmul) * layer_of_stack(p, "tower", layer, t, h, matmul)
            for t, h in enumerate(units)
        ]
    logits = [matmul(h, p["head_weight"][t, :, None]) for t, h in enumerate(units)]
    return torch.cat(logits, dim=1) + p["head_bias"]


class PEPNet(RankingModel):
    """Parameter and embedding personalised network (PEPNet, KDD 2023, arXiv 2302.01115). Arguments: `RankingModel`."""

    config_type = PEPNetConfig
    reference = staticmethod(forward)
    config: PEPNetConfig

    def make_parameters(self, c: PEPNetConfig) -> None:
        """See the module."""
        t, u, g, i, depth = c.num_tasks, c.knowledge_dim, c.gate_dim, c.input_dim, len(c.expert_dims)
        self.add_parameter("domain_embedding", c.num_domains, u)
        self.add_parameter("embedding_gate_weight", i + u, g)
        self.add_normed("embedding_gate", g)
        self.add_parameter("embedding_gate_out_weight", g, i)
        self.add_parameter("embedding_gate_out_bias", i)
        self.add_parameter("unit_gate_weight", depth, 2 * i + u, g)
        self.add_normed("unit_gate", depth, g)
        weights = [nn.Parameter(torch.empty(t, g, width)) for width in c.expert_dims]
        self.unit_gate_out_weight = nn.ParameterList(weights)
        self.unit_gate_out_bias = nn.ParameterList([nn.Parameter(torch.empty(t, width)) for width in c.expert_dims])
        self.add_layers("tower", t, [i, *c.expert_dims])
        self.add_parameter("head_weight", t, c.expert_dim)
        self.add_parameter("head_bias", t)

    def reset_network(self) -> None:
        """Embeddings of domains N(0, 1), every layer as torch.nn.Linear and torch.nn.LayerNorm: gates start near 1."""
        c = self.config
        nn.init.normal_(self.domain_embedding)
        uniform_linear(c.input_dim + c.knowledge_dim, self.embedding_gate_weight, self.embedding_gate_bias)
        uniform_linear(2 * c.input_dim + c.knowledge_dim, self.unit_gate_weight, self.unit_gate_bias)
        reset_norm(
            self.embedding_gate_gain,
            self.unit_gate_gain,
            offsets=(self.embedding_gate_offset, self.unit_gate_offset),
        )
        uniform_linear(c.gate_dim, self.embedding_gate_out_weight, self.embedding_gate_out_bias)
        uniform_linear(c.gate_dim, *self.unit_gate_out_weight, *self.unit_gate_out_bias)
        self.reset_layers("tower")
        uniform_linear(c.expert_dim, self.head_weight, self.head_bias)

    def multiply_adds(self) -> int:
        """As in `RankingModel`; the factors of the gates, one multiplication each, are not counted."""
        c = self.config
        i, g = c.input_dim, c.gate_dim
        unit_gates = sum(2 * i * g + c.num_tasks * g * width for width in c.expert_dims)
        tower = sum(a * b for a, b in itertools.pairwise([i, *c.expert_dims, 1]))
        return 2 * i * g + unit_gates + c.num_tasks * tower
