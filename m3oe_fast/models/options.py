"""The options that choose a model, its form and its sizes, for every command that makes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from m3oe_fast.config import Fusion, Init, M3oEConfig, ModelConfig, Modules, StarActivation
from m3oe_fast.data.options import option
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import ConfigError
from m3oe_fast.models import MODELS
from m3oe_fast.models.m2m import M2MConfig
from m3oe_fast.models.pepnet import PEPNetConfig
from m3oe_fast.models.specific import SpecificConfig

Form = Literal["mdmt", "mdl", "mtl", "single"]

FORMS: dict[str, tuple[Form, ...]] = dict.fromkeys(MODELS, ("mdmt", "mdl", "mtl", "single")) | {"mlp": ("single",)}
"""The forms a model can take, its default first. An MLP of several domains or tasks would be a Shared-Bottom model."""

NOT_SIZES = ("model", "form")
_OF_DATA = {field.name for field in dataclasses.fields(ModelConfig)} - {"embed_dim"}


@dataclass(frozen=True)
class ModelOptions:
    """Which model in which form, and its sizes and switches; the defaults are the published ones."""

    model: str = option("m3oe", f"The model: {', '.join(MODELS)}.")
    form: Form | None = option(
        None,
        "mdmt: one model of all domains and tasks; mdl: one per task, of all domains; mtl: one per domain, of all "
        "tasks; single: one per domain and task (default: mdmt; single for mlp).",
    )
    shared_experts: int = option(
        M3oEConfig.shared_experts, "K, experts shared by all domains and tasks (m3oe, mmoe, ple, adatt, m2m)."
    )
    specific_experts: int = option(
        SpecificConfig.specific_experts, "Experts of each (domain, task) pair's own (ple, adatt, adatt_sp)."
    )
    levels: int = option(
        SpecificConfig.levels,
        "Extraction levels (ple, adatt, adatt_sp); more than one runs in eager PyTorch.",
    )
    knowledge_dim: int = option(
        M2MConfig.knowledge_dim, "Width of the embedding of a domain, and of a task (m2m, pepnet)."
    )
    attention_dim: int = option(M2MConfig.attention_dim, "m2m: hidden width of the attention over experts.")
    tower_layers: int = option(M2MConfig.tower_layers, "m2m: residual layers of a tower.")
    gate_dim: int = option(PEPNetConfig.gate_dim, "pepnet: hidden width of every gate.")
    embed_dim: int = option(M3oEConfig.embed_dim, "Width of the embedding of one id field.")
    star_dim: int = option(M3oEConfig.star_dim, "m3oe: S, width of the star layer.")
    hidden_dim: int = option(M3oEConfig.hidden_dim, "m3oe: H, width of the representation.")
    expert_dims: int | list[int] | str | None = option(
        None,
        "Output width of each layer of an expert, for example 64, or 128,64 for two layers (default: 64 for m3oe, "
        "256,64 for the others, whose experts read the input).",
    )
    tower_dim: int = option(M3oEConfig.tower_dim, "Y, hidden width of a tower (not m2m, pepnet).")
    star_activation: StarActivation = option(
        M3oEConfig.star_activation,
        "m3oe: norm_relu as in the published code, or linear as printed in the paper.",
    )
    gate_detach: bool = option(
        M3oEConfig.gate_detach,
        "m3oe: gates read the representation without sending it gradients (published code).",
    )
    domain_experts: bool = option(M3oEConfig.domain_experts, "m3oe: have an expert per domain (ablation: false).")
    task_experts: bool = option(M3oEConfig.task_experts, "m3oe: have an expert per task (ablation: false).")
    modules: Modules = option(
        M3oEConfig.modules,
        "m3oe: how shared, domain and task experts come together: balanced (the paper's two levels), gated (one "
        "softmax gate over all) or concatenated (side by side; eager PyTorch).",
    )
    fusion: Fusion = option(
        M3oEConfig.fusion,
        "m3oe: fusion weights: four scalars (paper), one per domain and per task (per_index), or all four per pair of "
        "them (per_pair).",
    )
    fusion_init: float = option(
        M3oEConfig.fusion_init, "m3oe: first value of the fusion logits; 1 is a weight of 0.731."
    )
    init: Init = option(M3oEConfig.init, "m3oe: first values: published, or star (domain matrices start at one).")

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ConfigError(f"model {self.model!r} does not exist; there is {', '.join(MODELS)}")
        forms = FORMS[self.model]
        if self.form is None:
            object.__setattr__(self, "form", forms[0])
        if self.form not in forms:
            raise ConfigError(f"form {self.form!r} does not exist for model {self.model}; there is {', '.join(forms)}")
        kind = MODELS[self.model].config_type
        dims = kind.expert_dims if self.expert_dims is None else _widths(self.expert_dims)
        object.__setattr__(self, "expert_dims", tuple(dims))
        own = self._fields()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in (*NOT_SIZES, *own) and value != field.default:
                raise ConfigError(f"{field.name} is no option of model {self.model}; it has {', '.join(own)}")

    def _fields(self) -> list[str]:
        """The options that this kind of model has."""
        fields = [field.name for field in dataclasses.fields(MODELS[self.model].config_type)]
        return [name for name in fields if name not in _OF_DATA and hasattr(self, name)]

    def resolved(self) -> dict[str, Any]:
        """The options of this kind of model, and their values."""
        return {name: getattr(self, name) for name in (*NOT_SIZES, *self._fields())}

    def config(self, schema: Schema) -> ModelConfig:
        """The configuration of one model for a log, or for the view of it that a member of the form sees.

        Raises:
            ConfigError: a size is impossible.
        """
        return MODELS[self.model].config_type(
            vocab_sizes=schema.vocab_sizes,
            num_dense=len(schema.dense),
            num_domains=len(schema.domains),
            num_tasks=len(schema.tasks),
            bag_vocab_sizes=schema.bag_vocab_sizes,
            bag_pooling=schema.bag_pooling,
            **{name: getattr(self, name) for name in self._fields()},
        )


def _widths(value: int | Sequence[int] | str) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,)
    if not isinstance(value, str):
        return tuple(value)
    try:
        return tuple(int(width) for width in value.split(","))
    except ValueError:
        raise ConfigError(f"expert_dims must be widths such as 64 or 128,64, got {value!r}") from None
