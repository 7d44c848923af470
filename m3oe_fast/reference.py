"""The oracle: M3oE in eager PyTorch, computed the way the paper prints it. Slow on purpose, in any dtype.

Every domain's star matrix, gates and towers run on every row and the row's own result is picked at the end;
nothing is folded, batched or routed. `folded.py` holds the same network after the algebra the kernels use.

Shapes (symbols of `config.py`): x [B, I], domain [B] in [0, D), logits [B, T], label [B, T] with NaN = not
observed. Parameters come by name, stacked over what they repeat over, as `M3oE.state_dict()` has them:

    star_weight [D, I, S]  star_bias [D, S]  star_shared_weight [I, S]  star_shared_bias [S]
    star_out_weight [S, H] star_out_bias star_gain star_offset [H]
    skip_weight [I, H]     skip_bias skip_gain skip_offset [H]
    gate_weight [D, T, H, K]  gate_bias [D, T, K]
    expert_weight.l [E, in, out]  expert_bias.l expert_gain.l expert_offset.l [E, out]
    tower_weight [D, T, X, Y]  tower_bias tower_gain tower_offset head_weight [D, T, Y]  head_bias [D, T]
    alpha_domain beta_domain alpha_task beta_task: logits, (), [D] / [T] or [D, T]; those that there are

With experts or modules left out (the paper's ablations) K, D or T of E is 0; concatenated modules make
tower_weight [D, T, 2 X or 3 X, Y].

`matmul` is a hook on every product of activations and weights: precisions that eager torch lacks are
emulated by a hook that rounds or splits the operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from m3oe_fast.config import M3oEConfig

EPS = 1e-5
MatMul = Callable[[Tensor, Tensor], Tensor]


def layer_norm(z: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """LayerNorm over the last axis of z [..., N]; gain and offset broadcast against it."""
    if gain.ndim == 1:  # applied in the pass that normalises, as torch.nn.LayerNorm does
        return F.layer_norm(z, gain.shape, gain, offset, EPS)
    return F.layer_norm(z, z.shape[-1:], eps=EPS) * gain + offset


def representation(
    p: Mapping[str, Tensor], config: M3oEConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """r [B, H]: star layer of the row's own domain plus the skip layer (paper, section 2.2; eq. 1 and 2)."""
    skip = matmul(x, p["skip_weight"]) + p["skip_bias"]
    skip = torch.relu(layer_norm(skip, p["skip_gain"], p["skip_offset"]))
    result = skip
    for d in range(config.num_domains):
        weight = p["star_weight"][d] * p["star_shared_weight"]
        star = matmul(x, weight) + p["star_bias"][d] + p["star_shared_bias"]
        term = matmul(star, p["star_out_weight"]) + p["star_out_bias"]
        if config.star_activation == "norm_relu":
            term = torch.relu(layer_norm(term, p["star_gain"], p["star_offset"]))
        result = torch.where((domain == d)[:, None], skip + term, result)
    return result


def expert(p: Mapping[str, Tensor], config: M3oEConfig, r: Tensor, e: int, matmul: MatMul = torch.matmul) -> Tensor:
    """z_e [B, X]: one expert, of any depth."""
    z = r
    for layer in range(len(config.expert_dims)):
        z = matmul(z, p[f"expert_weight.{layer}"][e]) + p[f"expert_bias.{layer}"][e]
        z = torch.relu(layer_norm(z, p[f"expert_gain.{layer}"][e], p[f"expert_offset.{layer}"][e]))
    return z


def balance(z: list[Tensor], own: int, beta: Tensor) -> Tensor:
    """beta z_own + (1 - beta) / (N - 1) sum of the others (paper, eq. 5 and 6); N = 1: beta z_own."""
    mixed = beta * z[own]
    for other in range(len(z)):
        if other != own:
            mixed = mixed + (1 - beta) / (len(z) - 1) * z[other]
    return mixed


def fusion_weight(p: Mapping[str, Tensor], name: str, d: int, t: int) -> Tensor:
    """sigmoid of the fusion logit of a pair: one for all pairs, or one per domain or task, or its own."""
    logit = p[name]
    if logit.ndim == 1:
        logit = logit[d if name.endswith("domain") else t]
    elif logit.ndim == 2:
        logit = logit[d, t]
    return torch.sigmoid(logit)


def gated(p: Mapping[str, Tensor], r: Tensor, z: list[Tensor], d: int, t: int, matmul: MatMul = torch.matmul) -> Tensor:
    """Softmax gate of a pair over the experts z, from r [B, H] (paper, eq. 4)."""
    gate = torch.softmax(matmul(r, p["gate_weight"][d, t]) + p["gate_bias"][d, t], dim=-1)
    return sum(gate[:, k : k + 1] * z[k] for k in range(len(z)))


def fused_modules(
    p: Mapping[str, Tensor], config: M3oEConfig, r: Tensor, z: list[Tensor], d: int, t: int, matmul: MatMul
) -> Tensor:
    """What the tower of a pair reads: alpha_d D_d + alpha_t T_t + S_t (paper, eq. 7) of the modules there are, or the
    three side by side (the paper's ablation "concatenated")."""
    shared, domains = config.shared_experts, config.experts_of_domains
    modules = []
    for of, own, part in (("domain", d, z[shared : shared + domains]), ("task", t, z[shared + domains :])):
        if part:
            module = balance(part, own, fusion_weight(p, f"beta_{of}", d, t))
            if config.modules == "balanced":
                module = fusion_weight(p, f"alpha_{of}", d, t) * module
            modules.append(module)
    if shared:
        modules.append(gated(p, r, z[:shared], d, t, matmul))
    return torch.cat(modules, dim=1) if config.modules == "concatenated" else sum(modules)


def forward(
    p: Mapping[str, Tensor], config: M3oEConfig, x: Tensor, domain: Tensor, matmul: MatMul = torch.matmul
) -> Tensor:
    """Logits [B, T] of the row's own domain.

    alpha_d goes with the domain part and alpha_t with the task part; the paper's eq. 7 prints them the other
    way round, the published code pairs them by name.
    """
    num_domains, num_tasks = config.num_domains, config.num_tasks
    r = representation(p, config, x, domain, matmul)
    z = [expert(p, config, r, e, matmul) for e in range(config.num_experts)]
    gate_input = r.detach() if config.gate_detach else r

    logits = x.new_zeros(x.shape[0], num_tasks)
    for d in range(num_domains):
        for t in range(num_tasks):
            if config.modules == "gated":
                u = gated(p, gate_input, z, d, t, matmul)
            else:
                u = fused_modules(p, config, gate_input, z, d, t, matmul)
            h = matmul(u, p["tower_weight"][d, t]) + p["tower_bias"][d, t]
            h = torch.relu(layer_norm(h, p["tower_gain"][d, t], p["tower_offset"][d, t]))
            logit = matmul(h, p["head_weight"][d, t][:, None])[:, 0] + p["head_bias"][d, t]
            column = torch.where(domain == d, logit, logits[:, t])
            logits = torch.cat([logits[:, :t], column[:, None], logits[:, t + 1 :]], dim=1)
    return logits


def pair_losses(
    logits: Tensor, domain: Tensor, label: Tensor, num_domains: int, row_weight: Tensor | None = None
) -> Tensor:
    """Mean binary cross-entropy of every (domain, task) pair over its labelled rows (paper, eq. 12).

    Args:
        logits, label: [B, T]; a NaN label is not observed.
        domain: int [B].
        row_weight: optional [B]; weighs a row's loss, not the count it is divided by.

    Returns:
        [D, T]; a pair without a labelled row is 0, never NaN.
    """
    observed = ~torch.isnan(label)
    bce = F.binary_cross_entropy_with_logits(logits, torch.where(observed, label, 0.0), reduction="none")
    if row_weight is not None:
        # Chosen before the product: a weight that is not finite, of a row without a label, would else leave 0 * NaN
        # in the gradient.
        bce = bce * torch.where(observed, row_weight[:, None], 0.0)
    bce = torch.where(observed, bce, 0.0)
    index = domain.long()
    # In float64: index_add is one chain of additions, which in float32 is off by 5e-4 at 100,000 equal losses.
    zeros = torch.zeros(num_domains, logits.shape[1], dtype=torch.float64, device=logits.device)
    count = zeros.index_add(0, index, observed.double())
    return (zeros.index_add(0, index, bce.double()) / count.clamp(min=1)).to(logits.dtype)
