"""The configurations of the models: what all have in common, and M3oE's. Validated when they are made.

Symbols: D domains, T tasks, K shared experts, E experts, I input width, S star width, H representation width,
X expert width, Y tower width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from m3oe_fast.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

StarActivation = Literal["norm_relu", "linear"]
Fusion = Literal["scalar", "per_index", "per_pair"]
Init = Literal["published", "star"]
Modules = Literal["balanced", "gated", "concatenated"]
Pooling = Literal["mean", "sum"]

FUSION_NAMES = ("alpha_domain", "alpha_task", "beta_domain", "beta_task")
"""The four kinds of fusion weights, called as the parameters of the model that hold their logits."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What every model is told: its inputs, its domains and its tasks.

    Attributes:
        vocab_sizes: rows of the embedding table of each id field; every id in [0, vocab) is a real row.
        num_dense: dense columns C; they follow the embeddings and the pooled bags in x.
        num_domains: D >= 1.
        num_tasks: T >= 1.
        embed_dim: width of one id embedding.
        bag_vocab_sizes: rows of the embedding table of each multi-hot field ("bag").
        bag_pooling: "mean" or "sum" of a row's embeddings, for each bag.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    name: ClassVar[str]
    minima: ClassVar[Mapping[str, int]] = {}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    width_lists: ClassVar[tuple[str, ...]] = ()

    vocab_sizes: Sequence[int]
    num_dense: int
    num_domains: int
    num_tasks: int
    _: dataclasses.KW_ONLY
    embed_dim: int = 16
    bag_vocab_sizes: Sequence[int] = ()
    bag_pooling: Sequence[Pooling] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_sizes", "bag_vocab_sizes", *self.width_lists):
            object.__setattr__(self, name, _int_tuple(name, getattr(self, name)))
        object.__setattr__(self, "bag_pooling", _poolings(self.bag_pooling, len(self.bag_vocab_sizes)))
        least = {"num_dense": 0, "num_domains": 1, "num_tasks": 1, "embed_dim": 1, **self.minima}
        for name, minimum in least.items():
            _check_int(name, getattr(self, name), minimum)
        for name in self.width_lists:
            if not getattr(self, name):
                raise ConfigError(f"{name} must name at least one layer width, for example (64,)")
        if self.input_dim < 1:
            raise ConfigError("the model has no input: give vocab_sizes, bag_vocab_sizes, or num_dense of at least 1")
        for name, choices in self.choices.items():
            if getattr(self, name) not in choices:
                allowed = ", ".join(map(repr, choices))
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise ConfigError(f"{field.name} must be true or false, got {getattr(self, field.name)!r}")

    @property
    def input_dim(self) -> int:
        """I: an embedding width for every id field and bag, plus dense columns."""
        return (len(self.vocab_sizes) + len(self.bag_vocab_sizes)) * self.embed_dim + self.num_dense

    @property
    def fused(self) -> bool:
        """Whether the fused kernels can compute this model; eager PyTorch does otherwise."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON types."""
        plain = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class M3oEConfig(ModelConfig):
    """Sizes and switches of one M3oE model.

    Attributes:
        shared_experts: K >= 0. The paper uses 1 for MovieLens and 4 for KuaiRand.
        star_dim: S, width between the star layer and the Linear that follows it.
        hidden_dim: H, width of the representation.
        expert_dims: output width of each expert layer; the last one is X. The paper uses one layer.
        tower_dim: Y, hidden width of a tower.
        star_activation: first term of the representation: "norm_relu" = relu(LN(.)) as in the
            published code, "linear" as printed in the paper (eq. 2).
        gate_detach: gates read a detached representation (published code) or a differentiable one.
        domain_experts, task_experts: whether there is an expert per domain, and one per task (paper, Table 3).
        modules: how the shared, domain and task modules become what a tower reads (paper, Table 3). "balanced" = the
            two fusion levels of the paper; "gated" = one softmax gate over all experts, without fusion weights;
            "concatenated" = side by side, so that a tower is as much wider (eager PyTorch only).
        fusion: "scalar" = four fusion weights (paper), "per_index" = one per domain and per task, "per_pair" = each of
            the four for every (domain, task) pair.
        fusion_init: start value of the fusion *logits*; the weight is its sigmoid (1.0 -> 0.731, published).
        init: "published" = both star matrices Xavier-uniform as in the published code; "star" = domain
            matrices start at one, so that every domain starts from the shared matrix (STAR, CIKM 2021).

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    name: ClassVar[str] = "m3oe"
    minima: ClassVar[Mapping[str, int]] = {"shared_experts": 0, "star_dim": 1, "hidden_dim": 1, "tower_dim": 1}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "star_activation": get_args(StarActivation),
        "modules": get_args(Modules),
        "fusion": get_args(Fusion),
        "init": get_args(Init),
    }
    width_lists: ClassVar[tuple[str, ...]] = ("expert_dims",)

    shared_experts: int = 4
    star_dim: int = 512
    hidden_dim: int = 256
    expert_dims: Sequence[int] = (64,)
    tower_dim: int = 64
    star_activation: StarActivation = "norm_relu"
    gate_detach: bool = True
    domain_experts: bool = True
    task_experts: bool = True
    modules: Modules = "balanced"
    fusion: Fusion = "scalar"
    fusion_init: float = 1.0
    init: Init = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not abs(float(self.fusion_init)) < float("inf"):
            raise ConfigError(f"fusion_init must be a finite number, got {self.fusion_init!r}")
        if not self.num_experts:
            raise ConfigError("no expert is left: shared_experts is 0, domain_experts and task_experts are false")

    @property
    def fused(self) -> bool:
        """As in `ModelConfig`: a tower of the kernels reads one vector, not several side by side."""
        return self.modules != "concatenated"

    @property
    def experts_of_domains(self) -> int:
        """D, or 0 without domain experts."""
        return self.num_domains if self.domain_experts else 0

    @property
    def experts_of_tasks(self) -> int:
        """T, or 0 without task experts."""
        return self.num_tasks if self.task_experts else 0

    @property
    def num_experts(self) -> int:
        """E = K + D + T, in this order: shared, domain, task; less where a kind is left out."""
        return self.shared_experts + self.experts_of_domains + self.experts_of_tasks

    @property
    def gated_experts(self) -> int:
        """G: a gate ranges over the first so many experts, the shared ones or all."""
        return self.num_experts if self.modules == "gated" else self.shared_experts

    @property
    def num_modules(self) -> int:
        """Kinds of experts there are: shared, domain, task."""
        return sum(map(bool, (self.shared_experts, self.domain_experts, self.task_experts)))

    @property
    def expert_dim(self) -> int:
        """X: the width that leaves the last expert layer."""
        return self.expert_dims[-1]

    @property
    def fusion_names(self) -> tuple[str, ...]:
        """Those of `FUSION_NAMES` that the model has: concatenated modules need no alpha, gated ones neither."""
        levels = {"balanced": ("alpha", "beta"), "concatenated": ("beta",), "gated": ()}[self.modules]
        there = {"domain": self.domain_experts, "task": self.task_experts}
        return tuple(n for n in FUSION_NAMES for level, _, of in [n.partition("_")] if level in levels and there[of])


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
