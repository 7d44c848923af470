"""M2M: multi-scenario multi-task meta learning (WSDM 2022, arXiv 2201.06814). Eager PyTorch: the op lacks its parts.

Weights that belong to a domain are not parameters here; a linear layer makes them from what is known of the domain:

    s_d     = leaky_relu(LN(domain_embedding_d W + b))                               the knowledge of the domain
    z_e     = expert_e(x)                                                            e < E, as in the other models
    a_dte   = v . leaky_relu([z_e | task_embedding_t] A_d + a_d)                     meta attention; A_d, a_d from s_d
    h_0     = sum_e softmax_e(a_dt)_e z_e
    h_l     = leaky_relu(h_{l-1} M_dtl + m_dtl + h_{l-1})                            meta tower; M_dtl, m_dtl from s_d
    logit   = head_t . h_L + head bias

They are made once per domain and step, not once per row as the paper prints it, and a row meets those of its own domain
only (`tiles.py`). Left out: the transformer over an advertiser's past behaviour, as a row here has none, and Poisson
regression, as the tasks here are binary. The paper makes s from attributes of scenario and advertiser; what is known of
a domain here is which one it is. The activation of s is leaky like that of the meta units: with so few domains, a unit
of a relu would easily be off in all of them, for good, and with it a slice of every generator.

Parameters (U knowledge width, A attention width, L tower layers, X expert width, E = K experts):

    domain_embedding [D, U]  task_embedding [T, U]  knowledge_weight [U, U]  knowledge_bias _gain _offset [U]
    expert_weight.l [E, in, out]  expert_bias.l _gain.l _offset.l [E, out]
    attention_weight [U, X + U, A]  attention_weight_base [X + U, A]  attention_bias [U, A]  attention_bias_base [A]
    attention_score [A]
    meta_weight [U, L, T, X, X]  meta_weight_base [L, T, X, X]  meta_bias [U, L, T, X]  meta_bias_base [L, T, X]
    head_weight [T, X]  head_bias [T]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3oe_fast.config import ModelConfig
from m3oe_fast.model import RankingModel, reset_norm, uniform_linear
from m3oe_fast.models.hidden import layer_of_stack
from m3oe_fast.models.tiles import Tiles
from m3oe_fast.reference import MatMul, layer_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class M2MConfig(ModelConfig):
    """Sizes of M2M. There is no tower_dim: a meta tower adds to its input, so it has the experts' width.

    Attributes:
        shared_experts: K, experts; the attention of every (domain, task) pair weighs all of them.
        expert_dims: output width of each layer of an expert; the last one is X.
        knowledge_dim: U, width of the embeddings of a domain and of a task, and of the knowledge that weights are
            made from.
        attention_dim: A, hidden width of the attention.
        tower_layers: L, layers of a meta tower.
    """

    name: ClassVar[str] = "m2m"
    minima: ClassVar[Mapping[str, int]] = dict.fromkeys(
        ("shared_experts", "knowledge_dim", "attention_dim", "tower_layers"), 1
    )
    width_lists: ClassVar[tuple[str, ...]] = ("expert_dims",)

    shared_experts: int = 4
    expert_dims: Sequence[int] = (256, 64)
    knowledge_dim: int = 16
    attention_dim: int = 64
    tower_layers: int = 2

    @property
    def fused(self) -> bool:
        """As in `ModelConfig`: residual towers and attention scores from a hidden layer are not the op's."""
        return False

    @property
    def num_experts(self) -> int:
        """E = K."""
        return self.shared_experts

    @property
    def expert_dim(self) -> int:
        """X: the width that leaves the last expert layer."""
        return self.expert_dims[-1]


@dataclasses.dataclass(frozen=True)
class MetaWeights:
    """What is made from the knowledge of the domains.

    Attributes:
        attention_weight: [D, X, A], the rows of A_d that meet an expert.
        attention_bias: [D, T, A], what the task embedding and the bias add to each pair's hidden layer.
        tower_weight: [D, L, T, X, X].
        tower_bias: [D, L, T, X].
    """

    attention_weight: Tensor
    attention_bias: Tensor
    tower_weight: Tensor
    tower_bias: Tensor


def meta_weights(p: Mapping[str, Tensor], config: M2MConfig) -> MetaWeights:
    """The generated weights of every domain: products of parameters, so `matmul` of `forward` does not see them."""
    knowledge = layer_norm(
        p["domain_embedding"] @ p["knowledge_weight"] + p["knowledge_bias"], p["knowledge_gain"], p["knowledge_offset"]
    )
    knowledge = F.leaky_relu(knowledge)  # [D, U]
    attention_weight, attention_bias, meta_weight, meta_bias = (
        torch.tensordot(knowledge, p[name], 1) + p[f"{name}_base"]
        for name in ("attention_weight", "attention_bias", "meta_weight", "meta_bias")
    )
    of_expert, of_task = attention_weight.split([config.expert_dim, config.knowledge_dim], dim=1)
    return MetaWeights(of_expert, p["task_embedding"] @ of_task + attention_bias[:, None], meta_weight, meta_bias)


def forward(
    p: Mapping[str, Tensor], config: M2MConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of x [B, I] and domain [B]; N tiles of R rows inside."""
    meta = meta_weights(p, config)
    tiles = Tiles.of(domain, config.num_domains)
    experts = [tiles.spread(expert(p, config, x, e, matmul)) for e in range(config.num_experts)]  # [N, R, X] each

    weight, bias = (w.index_select(0, tiles.domain) for w in (meta.attention_weight, meta.attention_bias))
    hidden_layers = [F.leaky_relu(matmul(z, weight)[:, None] + bias[:, :, None]) for z in experts]  # [N, T, R, A] each
    scores = [matmul(h, p["attention_score"][:, None]) for h in hidden_layers]
    share = torch.softmax(torch.cat(scores, dim=-1), dim=-1)  # [N, T, R, E]
    h = sum(share[..., e : e + 1] * z[:, None] for e, z in enumerate(experts))  # [N, T, R, X]

    weight, bias = (w.index_select(0, tiles.domain) for w in (meta.tower_weight, meta.tower_bias))
    for layer in range(config.tower_layers):
        h = F.leaky_relu(matmul(h, weight[:, layer]) + bias[:, layer, :, None] + h)
    logits = matmul(h, p["head_weight"][:, :, None])[..., 0] + p["head_bias"][:, None]  # [N, T, R]
    return tiles.collect(logits.transpose(1, 2))


def expert(p: Mapping[str, Tensor], config: M2MConfig, x: Tensor, e: int, matmul: MatMul) -> Tensor:
    """z_e [B, X]. One expert after the other: its activations stay in the processor's cache, which makes
    a step a quarter faster than one product over all of them."""
    z = x
    for layer in range(len(config.expert_dims)):
        z = layer_of_stack(p, "expert", layer, e, z, matmul)
    return z


class M2M(RankingModel):
    """Multi-scenario multi-task meta learning (M2M, WSDM 2022, arXiv 2201.06814). Arguments: `RankingModel`."""

    config_type = M2MConfig
    reference = staticmethod(forward)
    config: M2MConfig

    def make_parameters(self, c: M2MConfig) -> None:
        """See the module."""
        t, u, a, x, depth = c.num_tasks, c.knowledge_dim, c.attention_dim, c.expert_dim, c.tower_layers
        self.add_parameter("domain_embedding", c.num_domains, u)
        self.add_parameter("task_embedding", t, u)
        self.add_parameter("knowledge_weight", u, u)
        self.add_normed("knowledge", u)
        self.add_layers("expert", c.num_experts, [c.input_dim, *c.expert_dims])
        self.add_parameter("attention_weight", u, x + u, a)
        self.add_parameter("attention_weight_base", x + u, a)
        self.add_parameter("attention_bias", u, a)
        self.add_parameter("attention_bias_base", a)
        self.add_parameter("attention_score", a)
        self.add_parameter("meta_weight", u, depth, t, x, x)
        self.add_parameter("meta_weight_base", depth, t, x, x)
        self.add_parameter("meta_bias", u, depth, t, x)
        self.add_parameter("meta_bias_base", depth, t, x)
        self.add_parameter("head_weight", t, x)
        self.add_parameter("head_bias", t)

    def reset_network(self) -> None:
        """Embeddings of domains and tasks N(0, 1), layers as torch.nn.Linear and torch.nn.LayerNorm. Of a generated
        layer, the part that all domains share starts as such a Linear, and what the knowledge adds with half its
        variance: made by a Linear of U inputs, it would be too large, and the more so the wider the generated layer."""
        c = self.config
        nn.init.normal_(self.domain_embedding)
        nn.init.normal_(self.task_embedding)
        uniform_linear(c.knowledge_dim, self.knowledge_weight, self.knowledge_bias)
        reset_norm(self.knowledge_gain, offsets=(self.knowledge_offset,))
        self.reset_layers("expert")
        for name, fan_in in {"attention": c.expert_dim + c.knowledge_dim, "meta": c.expert_dim}.items():
            for part in ("weight", "bias"):
                uniform_linear(fan_in, getattr(self, f"{name}_{part}_base"))
                uniform_linear(fan_in * c.knowledge_dim, getattr(self, f"{name}_{part}"))
        uniform_linear(c.attention_dim, self.attention_score)
        uniform_linear(c.expert_dim, self.head_weight, self.head_bias)

    def multiply_adds(self) -> int:
        """As in `RankingModel`; weights are generated per domain, which is not counted."""
        c = self.config
        x, a = c.expert_dim, c.attention_dim
        expert = sum(i * o for i, o in itertools.pairwise([c.input_dim, *c.expert_dims]))
        attention = x * a + c.num_tasks * (a + x)  # hidden layer, then each task's score and share
        return c.num_experts * (expert + attention) + c.num_tasks * (c.tower_layers * x * x + x)
