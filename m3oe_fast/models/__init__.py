"""The kinds of models, by the name that the command line and checkpoints use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from m3oe_fast import checkpoint
from m3oe_fast.config import ModelConfig
from m3oe_fast.errors import CheckpointError
from m3oe_fast.model import RankingModel
from m3oe_fast.models import family
from m3oe_fast.models.adatt import AdaTT, AdaTTSp
from m3oe_fast.models.family import Family
from m3oe_fast.models.m2m import M2M
from m3oe_fast.models.m3oe import M3oE
from m3oe_fast.models.mlp import MLP
from m3oe_fast.models.mmoe import MMoE
from m3oe_fast.models.pepnet import PEPNet
from m3oe_fast.models.ple import PLE
from m3oe_fast.models.shared_bottom import SharedBottom
from m3oe_fast.models.star import STAR

MODELS: dict[str, type[RankingModel]] = {
    kind.config_type.name: kind for kind in (MLP, SharedBottom, MMoE, PLE, AdaTT, AdaTTSp, STAR, M2M, PEPNet, M3oE)
}

AnyModel = RankingModel | Family
"""What a checkpoint may hold, and what scores rows."""


def load(
    path: str | os.PathLike[str], backend: str = "auto", precision: str = "fp32", sparse_grad: bool = False
) -> AnyModel:
    """Read a model of any kind, or the members of a form as one, from a run folder (its best checkpoint), a checkpoint
    folder or a model.pt, in `eval()` mode.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this package.
    """
    content = checkpoint.read(path)
    return from_checkpoint(content, path, backend=backend, precision=precision, sparse_grad=sparse_grad)


def from_checkpoint(
    content: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    backend: str = "auto",
    precision: str = "fp32",
    sparse_grad: bool = False,
) -> AnyModel:
    """The model in what ``checkpoint.read(path)`` gave, in `eval()` mode.

    Raises:
        CheckpointError: as `load`.
    """
    kind = _kind_of(content, path)
    options = {"backend": backend, "precision": precision, "sparse_grad": sparse_grad}
    if family.is_family(content):
        return family.from_checkpoint(kind, content, path, **options)
    return kind.from_checkpoint(content, path, **options)


def config_of(content: Mapping[str, Any], path: str | os.PathLike[str]) -> ModelConfig:
    """The configuration in what ``checkpoint.read(path)`` gave, of a family that of its first member.

    Raises:
        CheckpointError: as `load`.
    """
    kind = _kind_of(content, path)
    return kind.config_in(family.first_member(content, path) if family.is_family(content) else content, path)


def _kind_of(content: Mapping[str, Any], path: str | os.PathLike[str]) -> type[RankingModel]:
    name = checkpoint.model_name(content)
    if not isinstance(name, str) or name not in MODELS:
        raise CheckpointError(
            f"{path} holds a model {name!r}, this version knows {', '.join(MODELS)}; update m3oe_fast"
        )
    return MODELS[name]
