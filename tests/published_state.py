"""Random checkpoints as the published research code (class MDMTRec) writes them, and what its model computes from them.

Written from the description of its network, apart from `m3oe_fast`: every key is read by its name, every domain's star
product, gate and tower run on every row, and a mask keeps the row's own. Any dtype, differentiable in every tensor.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Published:
    """Sizes of one published model; the id is what a failing test prints."""

    domains: int = 3
    tasks: int = 2
    shared: int = 4
    dims: tuple[int, ...] = (6,)
    tower: int = 6
    star: int = 10
    hidden: int = 9
    vocab: tuple[int, ...] = (11, 5, 3)
    embed: int = 4
    dense: int = 1
    rows: int = 61

    def __str__(self) -> str:
        sizes = (self.star, self.hidden, *self.dims, self.tower)
        inputs = f"F{len(self.vocab)}x{self.embed}+{self.dense}"
        return f"D{self.domains}T{self.tasks}K{self.shared}-{inputs}-" + "x".join(map(str, sizes))

    @property
    def inputs(self) -> int:
        return len(self.vocab) * self.embed + self.dense


def random_state(c: Published, seed: int = 0, kinks: bool = True) -> State:
    """A float32 state_dict; no LayerNorm's gain is 1 nor its offset 0, no bias is 0.

    Args:
        c: sizes.
        seed: of all values.
        kinks: False: no ReLU comes near its kink, where a rounding decides whether a unit is on; half of the units
            are on, half off.
    """
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    def linear(name: str, fan_in: int, fan_out: int) -> None:
        state[f"{name}.weight"] = normal(fan_out, fan_in, scale=fan_in**-0.5)
        state[f"{name}.bias"] = normal(fan_out, scale=0.3)

    def norm(name: str, width: int) -> None:
        gain, offset = 1 + normal(width, scale=0.2), normal(width, scale=0.3)
        if not kinks:
            gain, offset = 0.2 * gain, torch.where(offset < 0, -2.0, 2.0) + offset
        state[f"{name}.weight"], state[f"{name}.bias"] = gain, offset

    def mlp(name: str, *widths: int) -> None:
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            linear(f"{name}.domain_specific.{3 * i}", fan_in, fan_out)
            norm(f"{name}.domain_specific.{3 * i + 1}", fan_out)

    state["shared_weight"] = normal(c.inputs, c.star, scale=c.inputs**-0.5)
    state["shared_bias"] = normal(c.star, scale=0.3)
    for i, rows in enumerate(c.vocab):
        state[f"embedding.embed_dict.field{i}.weight"] = normal(rows, c.embed)
    for name in ("exp_d", "exp_t", "bal_d", "bal_t"):
        state[f"_weight_{name}.deep_weights"] = normal(1)
    mlp("skip_conn", c.inputs, c.hidden)
    for d in range(c.domains):
        state[f"slot_weight.{d}"] = normal(c.inputs, c.star)
        state[f"slot_bias.{d}"] = normal(c.star, scale=0.3)
    mlp("star_mlp", c.star, c.hidden)
    for kind, count in (("expert", c.shared), ("domain_expert", c.domains), ("task_expert", c.tasks)):
        for i in range(count):
            mlp(f"{kind}.{i}", c.hidden, *c.dims)
    for i in range(c.domains * c.tasks):
        linear(f"gate.{i}.0", c.hidden, c.shared)
        linear(f"tower.{i}.0", c.dims[-1], c.tower)
        norm(f"tower.{i}.1", c.tower)
        linear(f"tower.{i}.3", c.tower, 1)
    return state


def random_rows(c: Published, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids int64 [B, F], dense [B, C], domain int64 [B] with every domain in it, label [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(rows, (c.rows,), generator=generator) for rows in c.vocab]
    ids = torch.stack(columns, dim=1) if columns else torch.empty(c.rows, 0, dtype=torch.int64)
    domain = (torch.arange(c.rows) % c.domains)[torch.randperm(c.rows, generator=generator)]
    label = (torch.rand(c.rows, c.tasks, generator=generator) < 0.4).float()
    return ids, torch.randn(c.rows, c.dense, generator=generator), domain, label


def published_logits(s: Mapping[str, Tensor], c: Published, ids, dense, domain, matmul=torch.matmul) -> Tensor:
    """Logits [B, T], in the dtype of the state; `matmul` is every product of activations and weights."""

    def linear(name: str, v: Tensor) -> Tensor:
        return matmul(v, s[f"{name}.weight"].T) + s[f"{name}.bias"]

    def norm_relu(name: str, v: Tensor) -> Tensor:
        centred = v - v.mean(dim=1, keepdim=True)
        variance = centred.square().mean(dim=1, keepdim=True)
        return F.relu(centred / torch.sqrt(variance + 1e-5) * s[f"{name}.weight"] + s[f"{name}.bias"])

    def mlp(name: str, v: Tensor) -> Tensor:
        for i in itertools.count():
            if f"{name}.domain_specific.{3 * i}.weight" not in s:
                return v
            v = norm_relu(f"{name}.domain_specific.{3 * i + 1}", linear(f"{name}.domain_specific.{3 * i}", v))

    def weight(name: str) -> Tensor:
        return torch.sigmoid(s[f"_weight_{name}.deep_weights"])

    def balanced(parts: list[Tensor], own: int, beta: Tensor) -> Tensor:
        mixed = beta * parts[own]
        for other, part in enumerate(parts):
            if other != own:
                mixed = mixed + (1 - beta) / (len(parts) - 1) * part
        return mixed

    tables = [table for key, table in s.items() if key.startswith("embedding.")]
    x = torch.cat([*(table[ids[:, f]] for f, table in enumerate(tables)), dense.to(s["shared_weight"].dtype)], dim=1)
    masks = [(domain == d)[:, None] for d in range(c.domains)]
    star = x.new_zeros(len(x), c.star)
    for d, mask in enumerate(masks):
        product = matmul(x, s[f"slot_weight.{d}"] * s["shared_weight"]) + s[f"slot_bias.{d}"] + s["shared_bias"]
        star = torch.where(mask, product, star)
    r = mlp("skip_conn", x) + mlp("star_mlp", star)
    of_shared = [mlp(f"expert.{k}", r) for k in range(c.shared)]
    of_domain = [mlp(f"domain_expert.{d}", r) for d in range(c.domains)]
    of_task = [mlp(f"task_expert.{t}", r) for t in range(c.tasks)]
    columns = []
    for t in range(c.tasks):
        column = x.new_zeros(len(x), 1)
        for d, mask in enumerate(masks):
            i = t * c.domains + d
            u = weight("exp_d") * balanced(of_domain, d, weight("bal_d"))
            u = u + weight("exp_t") * balanced(of_task, t, weight("bal_t"))
            if c.shared:
                gate = torch.softmax(linear(f"gate.{i}.0", r.detach()), dim=1)
                u = u + sum(gate[:, [k]] * of_shared[k] for k in range(c.shared))
            logit = linear(f"tower.{i}.3", norm_relu(f"tower.{i}.1", linear(f"tower.{i}.0", u)))
            column = torch.where(mask, logit, column)
        columns.append(column)
    return torch.cat(columns, dim=1)


def published_loss(logits: Tensor, c: Published, domain: Tensor, label: Tensor) -> Tensor:
    """Sum over domains and tasks of the mean cross-entropy of probabilities over the domain's rows."""
    probability = torch.sigmoid(logits)
    total = logits.new_zeros(())
    for d in range(c.domains):
        for t in range(c.tasks):
            rows = domain == d
            total = total + F.binary_cross_entropy(probability[rows, t], label[rows, t].to(logits.dtype))
    return total


def rescaled(s: Mapping[str, Tensor], dense: Tensor, scale: float) -> tuple[State, Tensor]:
    """A state and dense columns that make the same function, with every activation `scale` times as large and every
    weight behind it as much smaller: reduced precision then rounds other numbers."""

    def factor(key: str) -> float:
        if key.startswith("embedding."):
            return scale
        if key == "shared_weight" or (key.startswith("gate.") and key.endswith(".weight")):
            return 1 / scale
        place = key.split(".")
        if place[0] in ("skip_conn", "star_mlp", "expert", "domain_expert", "task_expert"):
            if int(place[-2]) % 3 == 1:  # a LayerNorm, what it gives is larger
                return scale
            reads_star = place[0] == "star_mlp"  # whose input is as large as before
            return 1 / scale if place[-1] == "weight" and not reads_star else 1.0
        if place[0] == "tower":
            return {"0.weight": 1 / scale, "1.weight": scale, "1.bias": scale, "3.weight": 1 / scale}.get(
                ".".join(place[2:]), 1.0
            )
        return 1.0

    return {key: value * factor(key) for key, value in s.items()}, dense * scale
