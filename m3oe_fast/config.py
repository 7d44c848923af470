"""The model's configuration: every size and every switch, validated when it is made.

Symbols: D domains, T tasks, K shared experts, E = K + D + T experts, I input width, S star width,
H representation width, X expert width, Y tower width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from m3oe_fast.errors import ConfigError

StarActivation = Literal["norm_relu", "linear"]
Fusion = Literal["scalar", "per_index", "per_pair"]
Init = Literal["published", "star"]
Pooling = Literal["mean", "sum"]

FUSION_NAMES = ("alpha_domain", "alpha_task", "beta_domain", "beta_task")
"""The four kinds of fusion weights, called as the parameters of the model that hold their logits."""


@dataclasses.dataclass(frozen=True)
class M3oEConfig:
    """Sizes and switches of one M3oE model.

    Attributes:
        vocab_sizes: rows of the embedding table of each id field; every id in [0, vocab) is a real row.
        num_dense: dense columns C; they follow the embeddings and the pooled bags in x.
        num_domains: D >= 1.
        num_tasks: T >= 1.
        shared_experts: K >= 0. The paper uses 1 for MovieLens and 4 for KuaiRand.
        embed_dim: width of one id embedding.
        star_dim: S, width between the star layer and the Linear that follows it.
        hidden_dim: H, width of the representation.
        expert_dims: output width of each expert layer; the last one is X. The paper uses one layer.
        tower_dim: Y, hidden width of a tower.
        star_activation: first term of the representation: "norm_relu" = relu(LN(.)) as in the
            published code, "linear" as printed in the paper (eq. 2).
        gate_detach: gates read a detached representation (published code) or a differentiable one.
        fusion: "scalar" = four fusion weights (paper), "per_index" = one per domain and per task, "per_pair" = each of
            the four for every (domain, task) pair.
        fusion_init: start value of the fusion *logits*; the weight is its sigmoid (1.0 -> 0.731, published).
        init: "published" = both star matrices Xavier-uniform as in the published code; "star" = domain
            matrices start at one, so that every domain starts from the shared matrix (STAR, CIKM 2021).
        bag_vocab_sizes: rows of the embedding table of each multi-hot field ("bag").
        bag_pooling: "mean" or "sum" of a row's embeddings, for each bag.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    vocab_sizes: Sequence[int]
    num_dense: int
    num_domains: int
    num_tasks: int
    shared_experts: int = 4
    embed_dim: int = 16
    star_dim: int = 512
    hidden_dim: int = 256
    expert_dims: Sequence[int] = (64,)
    tower_dim: int = 64
    star_activation: StarActivation = "norm_relu"
    gate_detach: bool = True
    fusion: Fusion = "scalar"
    fusion_init: float = 1.0
    init: Init = "published"
    bag_vocab_sizes: Sequence[int] = ()
    bag_pooling: Sequence[Pooling] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_sizes", _int_tuple("vocab_sizes", self.vocab_sizes))
        object.__setattr__(self, "expert_dims", _int_tuple("expert_dims", self.expert_dims))
        object.__setattr__(self, "bag_vocab_sizes", _int_tuple("bag_vocab_sizes", self.bag_vocab_sizes))
        object.__setattr__(self, "bag_pooling", _poolings(self.bag_pooling, len(self.bag_vocab_sizes)))
        minimum = {
            "num_dense": 0,
            "num_domains": 1,
            "num_tasks": 1,
            "shared_experts": 0,
            "embed_dim": 1,
            "star_dim": 1,
            "hidden_dim": 1,
            "tower_dim": 1,
        }
        for name, least in minimum.items():
            _check_int(name, getattr(self, name), least)
        if not self.expert_dims:
            raise ConfigError("expert_dims must name at least one layer width, for example (64,)")
        if self.input_dim < 1:
            raise ConfigError("the model has no input: give vocab_sizes, bag_vocab_sizes, or num_dense of at least 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(repr, choices))
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.gate_detach, bool):
            raise ConfigError(f"gate_detach must be true or false, got {self.gate_detach!r}")
        if not abs(float(self.fusion_init)) < float("inf"):
            raise ConfigError(f"fusion_init must be a finite number, got {self.fusion_init!r}")

    @property
    def input_dim(self) -> int:
        """I: an embedding width for every id field and bag, plus dense columns."""
        return (len(self.vocab_sizes) + len(self.bag_vocab_sizes)) * self.embed_dim + self.num_dense

    @property
    def num_experts(self) -> int:
        """E = K + D + T, in this order: shared, domain, task."""
        return self.shared_experts + self.num_domains + self.num_tasks

    @property
    def expert_dim(self) -> int:
        """X: the width that leaves the last expert layer."""
        return self.expert_dims[-1]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> M3oEConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: an unknown or missing field.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if unknown := sorted(set(plain) - known):
            raise ConfigError(f"unknown configuration field {unknown[0]!r}")
        if missing := sorted(required - set(plain)):
            raise ConfigError(f"configuration field {missing[0]!r} is missing")
        return cls(**plain)


_CHOICES = {
    "star_activation": get_args(StarActivation),
    "fusion": get_args(Fusion),
    "init": get_args(Init),
}


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")


def _int_tuple(name: str, values: object) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ConfigError(f"{name} must be a list of positive integers, got {values!r}")
    for position, value in enumerate(values):
        _check_int(f"{name}[{position}]", value, 1)
    return tuple(values)


def _poolings(values: object, count: int) -> tuple[Pooling, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != count:
        raise ConfigError(f"bag_pooling must be a list with one name for each of the {count} bags, got {values!r}")
    for place, value in enumerate(values):
        if value not in get_args(Pooling):
            raise ConfigError(f"bag_pooling[{place}] must be one of 'mean', 'sum', got {value!r}")
    return tuple(values)
