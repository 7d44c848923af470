"""Which runs a table consists of.

A row of the table is a model in a form. With one learning rate it takes a run per seed. With several, the first seed is
trained with each, the validation rows choose, and the other seeds are trained with the chosen one: the same budget for
every row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from m3oe_fast.errors import ConfigError
from m3oe_fast.models import MODELS
from m3oe_fast.models.options import FORMS

_TITLES = {
    "mlp": "MLP",
    "shared_bottom": "Shared-Bottom",
    "ple": "PLE",
    "mmoe": "MMoE",
    "adatt": "AdaTT",
    "adatt_sp": "AdaTT-sp",
    "star": "STAR",
    "m2m": "M2M",
    "pepnet": "PEPNet",
    "m3oe": "M3oE",
}
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        model: as for ``m3oe_fast.train --model``.
        form: as for ``--form``.
    """

    model: str
    form: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.model}-{self.form}"

    @property
    def title(self) -> str:
        """The model's name as its paper writes it."""
        return _TITLES.get(self.model, self.model)

    @property
    def extra(self) -> bool:
        """Whether the paper's table lacks it."""
        return self not in PAPER


PAPER = tuple(
    Row(model, form)
    for form, models in (
        ("single", ("mlp",)),
        ("mtl", ("shared_bottom", "ple", "mmoe", "adatt", "adatt_sp")),
        ("mdl", ("shared_bottom", "mmoe", "ple", "star")),
        ("mdmt", ("shared_bottom", "mmoe", "ple", "m2m", "m3oe")),
    )
    for model in models
)
"""The rows of Table 2 of the M3oE paper (arXiv 2404.18465), in its order."""
ALL = (*PAPER, Row("pepnet", "mdmt"))
"""What ``--models all`` is."""
OURS = Row("m3oe", "mdmt")
"""The row that the others are compared with."""


@dataclass(frozen=True)
class Run:
    """One training run of a table."""

    row: Row
    seed: int
    lr: float

    @property
    def label(self) -> str:
        """For a person."""
        return f"{self.row.model} {self.row.form}  seed {self.seed}  lr {self.lr:g}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        metrics: the content of its metrics.json; None if it failed.
        reason: why it failed, one line; "" if it did not.
    """

    metrics: Mapping[str, Any] | None
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """The runs of a table.

    Attributes:
        rows: in the table's order.
        seeds: the first one is trained with every learning rate.
        lrs: learning rates to choose from, at least one.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...]

    @property
    def size(self) -> int:
        """Runs of the whole table."""
        return len(self.rows) * self.budget

    @property
    def budget(self) -> int:
        """Runs of each row."""
        return len(self.lrs) + len(self.seeds) - 1

    def possible(self) -> list[Run]:
        """Every run that could become part of the table, whatever learning rates are chosen."""
        return [Run(row, seed, lr) for seed in self.seeds for row in self.rows for lr in self.lrs]

    def wanted(self, outcomes: Mapping[Run, Outcome]) -> list[Run]:
        """The runs that are known to be part of the table once some have ended, in the order of training them."""
        runs = [Run(row, self.seeds[0], lr) for row in self.rows for lr in self.lrs]
        chosen = {row: self.chosen_lr(row, outcomes) for row in self.rows}
        return runs + [
            Run(row, seed, lr) for seed in self.seeds[1:] for row in self.rows if (lr := chosen[row]) is not None
        ]

    def chosen_lr(self, row: Row, outcomes: Mapping[Run, Outcome]) -> float | None:
        """The learning rate of a row: that with the best mean validation AUC, the first of several.

        Returns:
            None as long as a run that has a say has not ended, or if all of them failed.
        """
        if len(self.lrs) == 1:
            return self.lrs[0]
        tried = {lr: outcomes.get(Run(row, self.seeds[0], lr)) for lr in self.lrs}
        if None in tried.values():
            return None
        scores = {lr: _val_auc(outcome.metrics) for lr, outcome in tried.items() if outcome.metrics is not None}
        return max(scores, key=scores.__getitem__, default=None)

    def runs_of(self, row: Row, outcomes: Mapping[Run, Outcome]) -> list[Run]:
        """The runs, one per seed, whose scores stand in a row."""
        lr = self.chosen_lr(row, outcomes)
        return [] if lr is None else [Run(row, seed, lr) for seed in self.seeds]


def _val_auc(metrics: Mapping[str, Any]) -> float:
    """The mean validation AUC; an undefined one loses against every other."""
    auc = metrics["val"]["auc"]["mean"]
    return -math.inf if auc is None else auc


def parse_models(text: str) -> tuple[Row, ...]:
    """The rows in ``all``, or in a list such as ``mmoe,ple:mtl,m3oe``.

    A model without a form has every row that ``all`` has of it. The order is the table's.

    Raises:
        ConfigError: there is no such model or form.
    """
    if text.strip() == "all":
        return ALL
    named: list[Row] = []
    for entry in _entries("models", text, "all, or for example mmoe,ple:mtl,m3oe"):
        model, colon, form = entry.partition(":")
        if model not in MODELS:
            raise ConfigError(f"models: {model!r} does not exist; there is all, {', '.join(MODELS)}")
        if colon and form not in FORMS[model]:
            forms = ", ".join(FORMS[model])
            raise ConfigError(f"models: form {form!r} does not exist for {model}; there is {forms}")
        named += [Row(model, form)] if colon else [row for row in ALL if row.model == model]
    rows = dict.fromkeys(named)
    return (*(row for row in ALL if row in rows), *(row for row in rows if row not in ALL))


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds in ``2022..2026`` (both ends included) or ``1,2,3``.

    Raises:
        ConfigError: it is neither, goes backwards, or names a seed twice.
    """
    example = "2022..2026, or for example 1,2,3"
    seeds: list[int] = []
    for entry in _entries("seeds", text, example):
        ends = re.fullmatch(r"(\d{1,18})(?:\.\.(\d{1,18}))?", entry, flags=re.ASCII)
        if ends is None:
            raise ConfigError(f"seeds must be {example}, got {entry!r}")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if last < first:
            raise ConfigError(f"seeds {entry!r} go backwards; write {last}..{first}")
        if last - first >= MOST_SEEDS:
            raise ConfigError(f"seeds {entry!r} are {last - first + 1:,}; name at most {MOST_SEEDS:,}")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if seeds.count(seed) > 1)
        raise ConfigError(f"seeds: {twice} is there twice; a seed counts once")
    return tuple(seeds)


def parse_lrs(text: str) -> tuple[float, ...]:
    """The learning rates in ``1e-3,3e-3,1e-2``.

    Raises:
        ConfigError: one is no number above 0, or is there twice.
    """
    example = "numbers above 0 such as 1e-3,3e-3,1e-2"
    rates: list[float] = []
    for entry in _entries("lrs", text, example):
        try:
            rate = float(entry)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise ConfigError(f"lrs must be {example}, got {entry!r}")
        rates.append(rate)
    if len({f"{rate:g}" for rate in rates}) < len(rates):  # the name of a run's folder
        raise ConfigError(f"lrs {text!r} name one rate twice (six digits count); drop one")
    return tuple(rates)


def _entries(name: str, text: str, example: str) -> Sequence[str]:
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entries):
        raise ConfigError(f"{name} must be {example}, got {text!r}")
    return entries
