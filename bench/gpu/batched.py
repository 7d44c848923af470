"""The opponents' network: all the algebra of `m3oe_fast.folded`, arranged for a GPU.

Rows come sorted by domain, with the rows per domain known on the host, so nothing waits for the device. Star and skip
layer of a domain are one product, with the input padded to a width that tensor cores take; the gates of all pairs are
one, the experts are one. Only star and towers, whose weights are the domain's own, go domain by domain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3oe_fast import M3oE, M3oEConfig
from m3oe_fast.folded import ExpertLayer, NetworkWeights
from m3oe_fast.reference import layer_norm

WIDTH_MULTIPLE = 8
LINEAR = ("joint", "expert", "gate", "tower")


class Prepared(NamedTuple):
    """Weights as `network` multiplies them; I is padded, G gated experts of E."""

    joint: Tensor  # [D, I, 2 H], star beside skip
    joint_bias: Tensor  # [D, 2 H]
    joint_gain: Tensor  # [2, H]
    joint_offset: Tensor  # [2, H]
    expert: Tensor  # [H, E X]
    expert_bias: Tensor  # [E X]
    expert_gain: Tensor  # [E, X]
    expert_offset: Tensor  # [E, X]
    gate: Tensor  # [H, D T G]
    gate_bias: Tensor  # [D T G]
    table: Tensor  # [D, T, E]
    tower: Tensor  # [D, T, X, Y]
    tower_bias: Tensor  # [D, T, Y]
    tower_gain: Tensor  # [D, T, Y]
    tower_offset: Tensor  # [D, T, Y]
    head: Tensor  # [D, T, Y]
    head_bias: Tensor  # [D, T]
    deeper: tuple[ExpertLayer, ...]


def check(config: M3oEConfig) -> None:
    """Raises ValueError for a configuration that this network does not compute."""
    if config.star_activation != "norm_relu" or not config.gate_detach or config.shared_experts < 1:
        raise ValueError("the batched network has norm_relu, detached gates and shared experts")


def prepare(w: NetworkWeights) -> Prepared:
    """Folded weights in the layout of `network`; differentiable."""
    domains, tasks, hidden, gated = w.gate_weight.shape
    first, *deeper = w.experts
    joint = torch.cat([w.star_weight, w.skip_weight.expand(domains, -1, -1)], dim=2)
    return Prepared(
        F.pad(joint, (0, 0, 0, _padding(joint.shape[1]))),
        torch.cat([w.star_bias, w.skip_bias.expand(domains, -1)], dim=1),
        torch.stack([w.star_gain, w.skip_gain]),
        torch.stack([w.star_offset, w.skip_offset]),
        first.weight.permute(1, 0, 2).reshape(hidden, -1),
        first.bias.reshape(-1),
        first.gain,
        first.offset,
        w.gate_weight.permute(2, 0, 1, 3).reshape(hidden, domains * tasks * gated),
        w.gate_bias.reshape(-1),
        w.table,
        *(w.tower_weight, w.tower_bias, w.tower_gain, w.tower_offset),
        *(w.head_weight, w.head_bias),
        tuple(deeper),
    )


def rounded(p: Prepared) -> Prepared:
    """With the linear layers in bf16 once and for all, where autocast would convert them on every call."""
    names = [f"{layer}{part}" for layer in LINEAR for part in ("", "_bias")]
    deeper = tuple(layer._replace(weight=layer.weight.bfloat16(), bias=layer.bias.bfloat16()) for layer in p.deeper)
    return p._replace(**{name: getattr(p, name).bfloat16() for name in names}, deeper=deeper)


def flat(p: Prepared) -> list[Tensor]:
    """The tensors, those of deeper expert layers last."""
    return [*p[:-1], *(tensor for layer in p.deeper for tensor in layer)]


def unflat(tensors: Sequence[Tensor]) -> Prepared:
    """The inverse of `flat`."""
    head, tail = tensors[:17], tensors[17:]
    return Prepared(*head, tuple(ExpertLayer(*tail[i : i + 4]) for i in range(0, len(tail), 4)))


def embed(model: M3oE, ids: Tensor, dense: Tensor) -> Tensor:
    """x [B, I], padded with zero columns."""
    c = model.config
    rows = F.embedding(ids + model._first_row, model.embedding).flatten(1)
    return torch.cat([rows, dense, dense.new_zeros(len(dense), _padding(c.input_dim))], dim=1)


def network(x: Tensor, counts: Sequence[int], p: Prepared, fused_mix: bool) -> Tensor:
    """Logits [B, T] of rows x [B, I] sorted by domain.

    Args:
        fused_mix: experts are mixed by a sum of products that a compiler fuses with what surrounds it, not by a product
            of tiny matrices per row, which is the lesser evil without a compiler.
    """
    counts = list(counts)
    domains, tasks, experts = p.table.shape
    joint = torch.cat([torch.addmm(p.joint_bias[d], part, p.joint[d]) for d, part in enumerate(x.split(counts))])
    joint = joint.view(len(x), 2, -1)
    r = torch.relu(layer_norm(joint, p.joint_gain, p.joint_offset)).sum(1)

    z = torch.addmm(p.expert_bias, r, p.expert).view(len(x), experts, -1)
    z = torch.relu(layer_norm(z, p.expert_gain, p.expert_offset))
    for layer in p.deeper:
        z = torch.baddbmm(layer.bias[:, None], z.transpose(0, 1), layer.weight).transpose(0, 1)
        z = torch.relu(layer_norm(z, layer.gain, layer.offset))

    scores = torch.addmm(p.gate_bias, r.detach(), p.gate).view(len(x), domains, tasks, -1)
    own = torch.cat([part[:, d] for d, part in enumerate(scores.split(counts))])
    fixed = torch.cat([p.table[d].expand(n, -1, -1) for d, n in enumerate(counts)])
    gated = own.shape[-1]
    coefficient = torch.cat([torch.softmax(own, -1) + fixed[..., :gated], fixed[..., gated:]], dim=-1)
    u = (coefficient[..., None] * z[:, None]).sum(2) if fused_mix else torch.bmm(coefficient, z)
    return torch.cat([_towers(part, p, d) for d, part in enumerate(u.split(counts))])


def _towers(u: Tensor, p: Prepared, d: int) -> Tensor:
    """Logits [n, T] from u [n, T, X] of rows of domain d."""
    h = torch.baddbmm(p.tower_bias[d][:, None], u.transpose(0, 1), p.tower[d])
    h = torch.relu(layer_norm(h, p.tower_gain[d][:, None], p.tower_offset[d][:, None]))
    return (h * p.head[d][:, None]).sum(-1).T + p.head_bias[d]


def _padding(width: int) -> int:
    return -width % WIDTH_MULTIPLE
