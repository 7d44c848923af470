"""The options of ``python -m m3oe_fast.table``: its own, and those of training that all runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from m3oe_fast.comparison.plan import Row, parse_lrs, parse_models, parse_seeds
from m3oe_fast.data.options import option
from m3oe_fast.errors import ConfigError
from m3oe_fast.models import MODELS
from m3oe_fast.models.options import NOT_SIZES, ModelOptions
from m3oe_fast.training import TrainOptions


@dataclass(frozen=True)
class TableOptions:
    """What the table holds, and how its runs are done."""

    out: str = option("", "The table's folder. The same line again goes on with what is not finished there.")
    models: str = option(
        "all",
        "The rows: all (the paper's Table 2, and PEPNet), or a list of MODEL (in each form that all has it in) and "
        f"MODEL:FORM, for example mmoe,ple:mtl,m3oe. Models: {', '.join(MODELS)}; forms: single, mtl, mdl, mdmt.",
    )
    seeds: str = option("2022..2026", "The training seeds: FIRST..LAST, or a list such as 1,2,3.")
    lrs: str | None = option(
        None,
        "Learning rates to choose from, for example 1e-3,3e-3,1e-2: every row trains the first seed with each, takes "
        "the one with the best validation AUC, and trains the other seeds with it (default: --lr for all).",
    )
    threads: int = option(1, "Processor threads of each run.")
    jobs: int | None = option(None, "Runs at a time (default: processor cores divided by --threads; on a GPU one).")

    def __post_init__(self) -> None:
        if not self.out.strip():
            raise ConfigError("name the table's folder with --out, for example --out tables/a")
        parse_models(self.models)
        parse_seeds(self.seeds)
        if self.lrs is not None:
            parse_lrs(self.lrs)
        for name in ("threads", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")


def _without(group: type, names: tuple[str, ...], title: str, doc: str) -> type:
    """A group with the options of another but for some, which a table sets itself for every run."""
    types = get_type_hints(group)
    fields = [
        (field.name, types[field.name], option(field.default, field.metadata["help"]))
        for field in dataclasses.fields(group)
        if field.name not in names
    ]
    return dataclasses.make_dataclass(title, fields, frozen=True, namespace={"__doc__": doc, "__module__": __name__})


SizeOptions = _without(ModelOptions, NOT_SIZES, "SizeOptions", "Sizes and switches, for the models that have them.")
SharedTrainOptions = _without(TrainOptions, ("seed",), "SharedTrainOptions", "How to train, the same for every run.")


def changed(group: Any) -> dict[str, Any]:
    """The options of a group that are not at their defaults, and their values."""
    values = {field.name: (getattr(group, field.name), field.default) for field in dataclasses.fields(group)}
    return {name: value for name, (value, default) in values.items() if value != default}


def sizes_of(row: Row, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``sizes`` that a row's model has."""
    own = ModelOptions(model=row.model, form=row.form).resolved()
    return {name: value for name, value in sizes.items() if name in own}


def words(values: Mapping[str, Any]) -> list[str]:
    """Options as words of a line."""
    return [f"--{name}={_word(value)}" for name, value in values.items()]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
