"""Reads checkpoints of the published research code (class MDMTRec) into `M3oE`.

Its Linear weights are [out, in] and lie in one module per expert, gate and tower; ours are stacked and [in, out].
A gate or tower i serves domain d and task t with i = t * D + d.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from m3oe_fast.config import M3oEConfig
from m3oe_fast.errors import CheckpointError
from m3oe_fast.model import M3oE

_EMBEDDING = "embedding.embed_dict."


def from_official(
    state_dict: Mapping[str, Tensor],
    num_domains: int,
    num_tasks: int,
    backend: str = "auto",
    precision: str = "fp32",
) -> M3oE:
    """An `M3oE` that computes what the published model with this `state_dict` computes.

    Ids come in the order of the embedding keys; the dense columns follow the embeddings in x.

    Raises:
        CheckpointError: a key is missing, unknown or of a wrong shape; the message names it.
    """
    source = _Source(state_dict)
    tables = {k: source.take(k) for k in state_dict if k.startswith(_EMBEDDING) and k.endswith(".weight")}
    widths = sorted({table.shape[1] for table in tables.values()})
    if len(widths) > 1:
        raise CheckpointError(f"embeddings of different widths {widths} are not supported")
    shared = sum(1 for k in state_dict if k.startswith("expert.") and k.endswith(".domain_specific.0.weight"))
    depth = sum(1 for k in state_dict if k.startswith("domain_expert.0.") and k.endswith("weight")) // 2
    star_dim = source.peek("shared_weight").shape[1]
    expert_dims = [source.peek(f"domain_expert.0.domain_specific.{3 * n}.weight").shape[0] for n in range(depth)]
    embed_dim = widths[0] if widths else 1
    config = M3oEConfig(
        vocab_sizes=[table.shape[0] for table in tables.values()],
        num_dense=source.peek("shared_weight").shape[0] - len(tables) * embed_dim,
        num_domains=num_domains,
        num_tasks=num_tasks,
        shared_experts=shared,
        embed_dim=embed_dim,
        star_dim=star_dim,
        hidden_dim=source.peek("star_mlp.domain_specific.0.weight").shape[0],
        expert_dims=expert_dims,
        tower_dim=source.peek("tower.0.0.weight").shape[0],
    )
    weights = {"embedding": torch.cat(list(tables.values())) if tables else torch.empty(0, embed_dim)}
    weights |= _representation(source, num_domains)
    names = [f"expert.{k}" for k in range(shared)]
    names += [f"domain_expert.{d}" for d in range(num_domains)] + [f"task_expert.{t}" for t in range(num_tasks)]
    weights |= _experts(source, names, depth)
    weights |= _pairs(source, num_domains, num_tasks)
    for ours, theirs in {"alpha": "exp", "beta": "bal"}.items():
        for side in ("domain", "task"):
            weights[f"{ours}_{side}"] = source.take(f"_weight_{theirs}_{side[0]}.deep_weights").reshape(())
    source.finish()
    model = M3oE(config, backend=backend, precision=precision)
    model.load_weights(weights, source="published checkpoint")
    return model


class _Source:
    """A state_dict that knows which keys were read."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._tensors = state_dict
        self._unread = set(state_dict)

    def peek(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"the published checkpoint lacks {key!r}; check num_domains and num_tasks")
        return self._tensors[key].detach()

    def take(self, key: str) -> Tensor:
        tensor = self.peek(key)
        self._unread.discard(key)
        return tensor

    def finish(self) -> None:
        if self._unread:
            raise CheckpointError(
                f"the published checkpoint holds {min(self._unread)!r}, which this model has no place for; "
                "check num_domains and num_tasks"
            )


def _linear_norm(source: _Source, linear: str, norm: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [in, out], bias, gain and offset [out] of a Linear and the LayerNorm behind it."""
    return (
        source.take(f"{linear}.weight").T,
        source.take(f"{linear}.bias"),
        source.take(f"{norm}.weight"),
        source.take(f"{norm}.bias"),
    )


def _representation(source: _Source, num_domains: int) -> dict[str, Tensor]:
    parts = ("weight", "bias", "gain", "offset")
    skip = _linear_norm(source, "skip_conn.domain_specific.0", "skip_conn.domain_specific.1")
    star_out = _linear_norm(source, "star_mlp.domain_specific.0", "star_mlp.domain_specific.1")
    weights = {f"skip_{part}": tensor for part, tensor in zip(parts, skip, strict=True)}
    weights |= dict(zip(("star_out_weight", "star_out_bias", "star_gain", "star_offset"), star_out, strict=True))
    weights["star_shared_weight"] = source.take("shared_weight")
    weights["star_shared_bias"] = source.take("shared_bias")
    for part in ("weight", "bias"):
        weights[f"star_{part}"] = torch.stack([source.take(f"slot_{part}.{d}") for d in range(num_domains)])
    return weights


def _experts(source: _Source, names: list[str], depth: int) -> dict[str, Tensor]:
    weights = {}
    for layer in range(depth):
        linear, norm = f"domain_specific.{3 * layer}", f"domain_specific.{3 * layer + 1}"
        stacked = zip(*(_linear_norm(source, f"{n}.{linear}", f"{n}.{norm}") for n in names), strict=True)
        for part, tensors in zip(("weight", "bias", "gain", "offset"), stacked, strict=True):
            weights[f"expert_{part}.{layer}"] = torch.stack(tensors)
    return weights


def _pairs(source: _Source, num_domains: int, num_tasks: int) -> dict[str, Tensor]:
    """Gates, towers and heads as [D, T, ...]."""

    def stack(read) -> Tensor:
        rows = [torch.stack([read(t * num_domains + d) for t in range(num_tasks)]) for d in range(num_domains)]
        return torch.stack(rows)

    return {
        "gate_weight": stack(lambda i: source.take(f"gate.{i}.0.weight").T),
        "gate_bias": stack(lambda i: source.take(f"gate.{i}.0.bias")),
        "tower_weight": stack(lambda i: source.take(f"tower.{i}.0.weight").T),
        "tower_bias": stack(lambda i: source.take(f"tower.{i}.0.bias")),
        "tower_gain": stack(lambda i: source.take(f"tower.{i}.1.weight")),
        "tower_offset": stack(lambda i: source.take(f"tower.{i}.1.bias")),
        "head_weight": stack(lambda i: source.take(f"tower.{i}.3.weight")[0]),
        "head_bias": stack(lambda i: source.take(f"tower.{i}.3.bias")[0]),
    }
