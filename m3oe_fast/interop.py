"""Reads checkpoints of the published research code (class MDMTRec) into `M3oE`.

Its Linear weights are [out, in] and lie in one module per expert, gate and tower; ours are stacked and [in, out].
A gate or tower i serves domain d and task t with i = t * D + d.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from m3oe_fast.config import M3oEConfig
from m3oe_fast.errors import CheckpointError
from m3oe_fast.models import M3oE

_EMBEDDING = "embedding.embed_dict."


def from_official(
    state_dict: Mapping[str, Tensor],
    num_domains: int,
    num_tasks: int,
    backend: str = "auto",
    precision: str = "fp32",
) -> M3oE:
    """An `M3oE` that computes what the published model with this `state_dict` computes.

    Ids come in the order of the embedding keys; the dense columns follow the embeddings in x. Whatever rows of
    `shared_weight` the tables leave over are dense columns.

    Raises:
        CheckpointError: a key is missing, unknown or of a wrong shape; the message names it.
        ConfigError: num_domains or num_tasks is impossible.
    """
    source = _Source(state_dict)
    config = _config_of(source, num_domains, num_tasks)
    tables = [source.take(key, *source.matrix(key)) for key in source.tables]
    weights = {"embedding": torch.cat(tables) if tables else torch.empty(0, config.embed_dim)}
    weights |= _representation(source, config)
    weights |= _experts(source, config)
    weights |= _pairs(source, config)
    for ours, theirs in {"alpha": "exp", "beta": "bal"}.items():
        for side in ("domain", "task"):
            weights[f"{ours}_{side}"] = source.take(f"_weight_{theirs}_{side[0]}.deep_weights", 1).reshape(())
    source.finish()
    model = M3oE(config, backend=backend, precision=precision)
    model.load_weights(weights, source="published checkpoint")
    return model


class _Source:
    """A state_dict that knows which keys were read.

    Attributes:
        tables: the keys of the embedding tables, in order.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._tensors = state_dict
        self._unread = set(state_dict)
        self.tables = [k for k in state_dict if k.startswith(_EMBEDDING) and k.endswith(".weight")]

    def count(self, pattern: str) -> int:
        """Keys that match a regular expression as a whole."""
        return sum(1 for key in self._tensors if re.fullmatch(pattern, key))

    def matrix(self, key: str) -> tuple[int, int]:
        """The shape of a matrix, from which sizes of the model are read."""
        shape = tuple(self._tensor(key).shape)
        if len(shape) != 2:
            raise CheckpointError(f"the published checkpoint holds {key!r} of shape {list(shape)}, which is no matrix")
        return shape

    def take(self, key: str, *shape: int) -> Tensor:
        """The tensor, which must have this shape."""
        tensor = self._tensor(key)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"the published checkpoint holds {key!r} of shape {list(tensor.shape)}, its other weights ask for "
                f"{list(shape)}; check num_domains and num_tasks"
            )
        self._unread.discard(key)
        return tensor.detach()

    def _tensor(self, key: str) -> Tensor:
        if key not in self._tensors:
            raise CheckpointError(f"the published checkpoint lacks {key!r}; check num_domains and num_tasks")
        tensor = self._tensors[key]
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"the published checkpoint holds {key!r} as {type(tensor).__name__}, which is no tensor"
            )
        return tensor

    def finish(self) -> None:
        if self._unread:
            raise CheckpointError(
                f"the published checkpoint holds {min(self._unread)!r}, which this model has no place for; "
                "check num_domains and num_tasks"
            )


def _config_of(source: _Source, num_domains: int, num_tasks: int) -> M3oEConfig:
    shapes = [source.matrix(key) for key in source.tables]
    widths = sorted({width for _, width in shapes})
    if len(widths) > 1:
        raise CheckpointError(f"embeddings of different widths {widths} are not supported")
    embed_dim = widths[0] if widths else 1
    inputs, star_dim = source.matrix("shared_weight")
    num_dense = inputs - len(shapes) * embed_dim
    if num_dense < 0:
        raise CheckpointError(
            f"the published checkpoint has {len(shapes)} tables of width {embed_dim}, more than the {inputs} rows of "
            "'shared_weight'"
        )
    depth = source.count(r"domain_expert\.0\.domain_specific\.\d+\.weight") // 2
    layers = [f"domain_expert.0.domain_specific.{3 * layer}.weight" for layer in range(max(depth, 1))]
    return M3oEConfig(
        vocab_sizes=[rows for rows, _ in shapes],
        num_dense=num_dense,
        num_domains=num_domains,
        num_tasks=num_tasks,
        shared_experts=source.count(r"expert\.\d+\.domain_specific\.0\.weight"),
        embed_dim=embed_dim,
        star_dim=star_dim,
        hidden_dim=source.matrix("star_mlp.domain_specific.0.weight")[0],
        expert_dims=[source.matrix(key)[0] for key in layers],
        tower_dim=source.matrix("tower.0.0.weight")[0],
    )


def _normed(source: _Source, linear: str, norm: str, fan_in: int, out: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight [in, out], bias, gain and offset [out] of a Linear and the LayerNorm behind it."""
    return (
        source.take(f"{linear}.weight", out, fan_in).T,
        source.take(f"{linear}.bias", out),
        source.take(f"{norm}.weight", out),
        source.take(f"{norm}.bias", out),
    )


def _representation(source: _Source, c: M3oEConfig) -> dict[str, Tensor]:
    inputs, star, hidden = c.input_dim, c.star_dim, c.hidden_dim
    names = {
        "skip_conn": (inputs, ("skip_weight", "skip_bias", "skip_gain", "skip_offset")),
        "star_mlp": (star, ("star_out_weight", "star_out_bias", "star_gain", "star_offset")),
    }
    weights = {}
    for theirs, (fan_in, ours) in names.items():
        first, second = (f"{theirs}.domain_specific.{place}" for place in (0, 1))
        weights |= dict(zip(ours, _normed(source, first, second, fan_in, hidden), strict=True))
    weights["star_shared_weight"] = source.take("shared_weight", inputs, star)
    weights["star_shared_bias"] = source.take("shared_bias", star)
    for part, shape in (("weight", (inputs, star)), ("bias", (star,))):
        slots = [source.take(f"slot_{part}.{d}", *shape) for d in range(c.num_domains)]
        weights[f"star_{part}"] = torch.stack(slots)
    return weights


def _experts(source: _Source, c: M3oEConfig) -> dict[str, Tensor]:
    counts = {"expert": c.shared_experts, "domain_expert": c.num_domains, "task_expert": c.num_tasks}
    names = [f"{kind}.{i}.domain_specific" for kind, count in counts.items() for i in range(count)]
    weights = {}
    for layer, (fan_in, out) in enumerate(itertools.pairwise((c.hidden_dim, *c.expert_dims))):
        linear, norm = 3 * layer, 3 * layer + 1
        stacked = zip(*(_normed(source, f"{n}.{linear}", f"{n}.{norm}", fan_in, out) for n in names), strict=True)
        for part, tensors in zip(("weight", "bias", "gain", "offset"), stacked, strict=True):
            weights[f"expert_{part}.{layer}"] = torch.stack(tensors)
    return weights


def _pairs(source: _Source, c: M3oEConfig) -> dict[str, Tensor]:
    """Gates, towers and heads as [D, T, ...]."""

    def stack(key: str, *shape: int) -> Tensor:
        def read(d: int, t: int) -> Tensor:
            return source.take(key.format(t * c.num_domains + d), *shape)

        rows = [torch.stack([read(d, t) for t in range(c.num_tasks)]) for d in range(c.num_domains)]
        return torch.stack(rows)

    shared, tower = c.shared_experts, c.tower_dim
    return {
        "gate_weight": stack("gate.{}.0.weight", shared, c.hidden_dim).mT,
        "gate_bias": stack("gate.{}.0.bias", shared),
        "tower_weight": stack("tower.{}.0.weight", tower, c.expert_dim).mT,
        "tower_bias": stack("tower.{}.0.bias", tower),
        "tower_gain": stack("tower.{}.1.weight", tower),
        "tower_offset": stack("tower.{}.1.bias", tower),
        "head_weight": stack("tower.{}.3.weight", 1, tower)[..., 0, :],
        "head_bias": stack("tower.{}.3.bias", 1)[..., 0],
    }
