"""Whether a saved model and a dataset mean the same by their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m3oe_fast.data.dataset import Dataset
from m3oe_fast.errors import CheckpointError
from m3oe_fast.models import AnyModel
from m3oe_fast.training.resume import short

SHOWN = 8  # entries of a list that a message can hold


def check_fit(model: AnyModel, name: str, dataset: Dataset) -> None:
    """Ids mean the same to the model called ``name`` and to the data only if both have the same vocabularies.

    Raises:
        CheckpointError: they have not; the message names what differs first.
    """
    if model.encoder is None:
        raise CheckpointError(
            f"{name} holds no vocabularies, so nobody knows what its ids mean; use a checkpoint of a run, and for a "
            "member of a form the folder of the whole run"
        )
    own, other = model.encoder.to_dict(), dataset.encoder.to_dict()
    differs = _first_difference(own["schema"], other["schema"]) or _first_difference(own, other)
    if differs:
        raise CheckpointError(
            f"{name} does not fit {dataset.name}, split {dataset.split} (split seed {dataset.split_seed}): "
            f"{differs}; name the log and split it was trained on, or score raw rows with m3oe_fast.predict"
        )


def _first_difference(own: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for name in dict.fromkeys([*own, *other]):
        mine, theirs = own.get(name), other.get(name)
        if mine == theirs:
            continue
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            return f"{name}: {_first_difference(mine, theirs)}"
        if isinstance(mine, list) and isinstance(theirs, list) and len(mine) > SHOWN < len(theirs):
            return f"{name} has {len(mine):,} entries in the model and {len(theirs):,} in the data, not the same ones"
        return f"{name} is {short(mine)} in the model and {short(theirs)} in the data"
    return None
