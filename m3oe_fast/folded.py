"""The same network after the algebra that needs no kernel: folded star layer, own-domain routing, one coefficient
per (row, task, expert). Eager PyTorch, any dtype.

The compiled op takes these weights (`NetworkWeights`), tests compare it with `network`, and benchmarks use
`network` as the strongest opponent that plain PyTorch can offer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from m3oe_fast.config import M3oEConfig
from m3oe_fast.reference import layer_norm


class ExpertLayer(NamedTuple):
    """One layer of all experts: weight [E, in, out]; bias, gain, offset [E, out]."""

    weight: Tensor
    bias: Tensor
    gain: Tensor
    offset: Tensor


class NetworkWeights(NamedTuple):
    """What the network op takes, in the order of its schema. The gate ranges over the first G <= E experts.

    `star_weight` is the folded M_d. Without a representation layer, its eight tensors are empty (I = H then).
    """

    star_weight: Tensor  # [D, I, H]
    star_bias: Tensor  # [D, H]
    star_gain: Tensor  # [H]
    star_offset: Tensor  # [H]
    skip_weight: Tensor  # [I, H]
    skip_bias: Tensor  # [H]
    skip_gain: Tensor  # [H]
    skip_offset: Tensor  # [H]
    gate_weight: Tensor  # [D, T, H, G]
    gate_bias: Tensor  # [D, T, G]
    table: Tensor  # [D, T, E]
    tower_weight: Tensor  # [D, T, X, Y]
    tower_bias: Tensor  # [D, T, Y]
    tower_gain: Tensor  # [D, T, Y]
    tower_offset: Tensor  # [D, T, Y]
    head_weight: Tensor  # [D, T, Y]
    head_bias: Tensor  # [D, T]
    experts: tuple[ExpertLayer, ...]

    def flat(self) -> list[Tensor]:
        """The tensors in schema order, expert layers last."""
        return [*self[:-1], *(tensor for layer in self.experts for tensor in layer)]

    @classmethod
    def unflat(cls, flat: Sequence[Tensor]) -> NetworkWeights:
        """The inverse of `flat`."""
        head, tail = flat[:17], flat[17:]
        return cls(*head, tuple(ExpertLayer(*tail[i : i + 4]) for i in range(0, len(tail), 4)))


def _fusion_weight(p: Mapping[str, Tensor], name: str, domains: int, tasks: int) -> Tensor:
    """[D, T, 1]: the sigmoid of the fusion logits, for every pair."""
    logit = p[name]
    if logit.ndim == 1 and name.endswith("domain"):
        logit = logit[:, None]
    return torch.sigmoid(logit).expand(domains, tasks)[:, :, None]


def _side(alpha: Tensor, beta: Tensor, own: Tensor) -> Tensor:
    """[D, T, N]: of each pair, alpha beta at its own expert of N and alpha (1 - beta) / (N - 1) at the others.

    alpha and beta are [D, T, 1], `own` broadcasts to [D, T, N] and is 1 at the own expert, else 0.
    """
    return alpha * (own * beta + (1 - own) * ((1 - beta) / max(own.shape[-1] - 1, 1)))


def coefficient_table(p: Mapping[str, Tensor], config: M3oEConfig) -> Tensor:
    """[D, T, E]: the part of an expert's coefficient that no gate gives (paper, eq. 5 to 7)."""
    d, t = config.num_domains, config.num_tasks
    if config.modules == "gated":
        return p["gate_bias"].new_zeros(d, t, config.num_experts)
    sides = [p["gate_bias"].new_zeros(d, t, config.shared_experts)]
    for of, count, there in (("domain", d, config.domain_experts), ("task", t, config.task_experts)):
        if there:
            alpha, beta = (_fusion_weight(p, f"{level}_{of}", d, t) for level in ("alpha", "beta"))
            own = torch.eye(count, dtype=beta.dtype, device=beta.device)
            sides.append(_side(alpha, beta, own[:, None] if of == "domain" else own))
    return torch.cat(sides, dim=2)


StarFold = Callable[[Tensor, Tensor, Tensor], Tensor]


def star_fold(star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> Tensor:
    """M_d = (W_d * W_sh) W_c: [D, I, S], [I, S] and [S, H] to [D, I, H]."""
    return (star_weight * shared_weight) @ out_weight


def fold(p: Mapping[str, Tensor], config: M3oEConfig, star_fold: StarFold = star_fold) -> NetworkWeights:
    """Fold the star layer and the fusion weights. Exact, differentiable, O(parameters).

    Costs D I S (H + 1) multiply-adds, the forward work of about 200 rows at the published sizes. `star_fold` is who
    multiplies: eager torch, or `m3oe_fast.ops.star_fold`.
    """
    out = p["star_out_weight"]
    bias = (p["star_bias"] + p["star_shared_bias"]) @ out + p["star_out_bias"]
    return NetworkWeights(
        star_fold(p["star_weight"], p["star_shared_weight"], out),
        bias,
        p["star_gain"],
        p["star_offset"],
        *(p[f"skip_{part}"] for part in ("weight", "bias", "gain", "offset")),
        p["gate_weight"],
        p["gate_bias"],
        coefficient_table(p, config),
        *(p[f"tower_{part}"] for part in ("weight", "bias", "gain", "offset")),
        p["head_weight"],
        p["head_bias"],
        tuple(
            ExpertLayer(*(p[f"expert_{part}.{layer}"] for part in ("weight", "bias", "gain", "offset")))
            for layer in range(len(config.expert_dims))
        ),
    )


def _experts(r: Tensor, layers: Sequence[ExpertLayer]) -> Tensor:
    """[B, E, X]; the first layer of all experts is one GEMM, as they share their input."""
    first, *deeper = layers
    experts, width, out = first.weight.shape
    z = r @ first.weight.permute(1, 0, 2).reshape(width, experts * out)
    z = torch.relu(layer_norm(z.view(-1, experts, out) + first.bias, first.gain, first.offset))
    for layer in deeper:
        z = torch.bmm(z.transpose(0, 1), layer.weight).transpose(0, 1)
        z = torch.relu(layer_norm(z + layer.bias, layer.gain, layer.offset))
    return z


def _gates(r: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, G] for rows of one domain; weight [T, H, G], bias and mask [T, G]."""
    tasks, width, gated = weight.shape
    scores = (r @ weight.permute(1, 0, 2).reshape(width, tasks * gated)).view(-1, tasks, gated) + bias
    if mask is None:
        return torch.softmax(scores, dim=-1)
    # A pair whose mask is empty gates nothing: its softmax would be 0 / 0.
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.softmax(scores, dim=-1) * mask


def network(
    x: Tensor,
    counts: Sequence[int],
    weights: NetworkWeights,
    *,
    star_linear: bool = False,
    gate_detach: bool = True,
    gate_mask: Tensor | None = None,
) -> Tensor:
    """Logits [B, T] of rows x [B, I] that are sorted by domain, counts[d] of domain d.

    Args:
        gate_mask: optional bool [D, T, G]; the experts each softmax ranges over.
    """
    w = weights
    gated = w.gate_weight.shape[3]
    r = x
    if w.star_weight.numel():
        parts = x.split(list(counts))
        term = torch.cat([part @ w.star_weight[d] + w.star_bias[d] for d, part in enumerate(parts)])
        if not star_linear:
            term = torch.relu(layer_norm(term, w.star_gain, w.star_offset))
        r = term + torch.relu(layer_norm(x @ w.skip_weight + w.skip_bias, w.skip_gain, w.skip_offset))
    z = _experts(r, w.experts)
    gate_input = r.detach() if gate_detach else r

    logits = []
    for d, (r_d, z_d) in enumerate(zip(gate_input.split(list(counts)), z.split(list(counts)), strict=True)):
        coefficient = w.table[d].expand(r_d.shape[0], *w.table[d].shape)
        if gated:
            mask = None if gate_mask is None else gate_mask[d]
            gate = _gates(r_d, w.gate_weight[d], w.gate_bias[d], mask)
            coefficient = torch.cat([gate + coefficient[..., :gated], coefficient[..., gated:]], dim=-1)
        u = torch.bmm(coefficient, z_d)
        h = torch.bmm(u.transpose(0, 1), w.tower_weight[d]).transpose(0, 1) + w.tower_bias[d]
        h = torch.relu(layer_norm(h, w.tower_gain[d], w.tower_offset[d]))
        logits.append((h * w.head_weight[d]).sum(-1) + w.head_bias[d])
    return torch.cat(logits)


def routed(x: Tensor, domain: Tensor, weights: NetworkWeights, **switches: bool | Tensor | None) -> Tensor:
    """`network` for rows in any order: sorts by domain first and puts the logits back. Domain ids are trusted."""
    order = torch.argsort(domain, stable=True)
    counts = torch.bincount(domain.long(), minlength=weights.table.shape[0]).tolist()
    logits = network(x[order], counts, weights, **switches)
    return torch.zeros_like(logits).index_copy(0, order, logits)
