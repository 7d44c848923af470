"""The forms single, mtl and mdl: several models, each on its part of the log, trained one after the other.

    OUT/members/<name>/    one ordinary run for each member
    OUT/checkpoints/best   the members' best weights as one model (`m3oe_fast.models.family`)
    OUT/metrics.json       of that model on all rows; "members" tells of each run

A member without a labelled row in a part of the log is left out, and the pairs it would have scored are undefined.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.restrict import labelled_rows, restrict
from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import PARTS
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.metrics import Scores
from m3oe_fast.model import RankingModel
from m3oe_fast.models.family import Family, Member
from m3oe_fast.training.console import Display
from m3oe_fast.training.evaluation import evaluate
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.run_folder import BEST, RunFolder
from m3oe_fast.training.summary import family_metrics_of
from m3oe_fast.training.trainer import Ended, Result, Trainer

MEMBERS = "members"


@dataclass(frozen=True)
class Part:
    """What a member is of.

    Attributes:
        name: of its folder in OUT/members; its numbers tell apart names that differ in signs only.
        domains, tasks: numbered as in the whole log.
    """

    name: str
    domains: tuple[int, ...]
    tasks: tuple[int, ...]


@dataclass(frozen=True)
class FamilyResult:
    """How the training of a family ended.

    Attributes:
        ended: "interrupted" (Ctrl-C; the family is not measured then), else "epochs".
        family: with the best weights of each member; None if interrupted.
        val, test: its scores on all rows; None if interrupted.
        metrics: the content of metrics.json.
        missing: why a member is left out, by its name.
    """

    ended: Ended
    family: Family | None = None
    val: Scores | None = None
    test: Scores | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)


def parts_of(form: str, schema: Schema) -> list[Part]:
    """The members of a form.

    Raises:
        ConfigError: an unknown form.
    """
    domains, tasks = range(len(schema.domains)), range(len(schema.tasks))
    if form == "mtl":
        return [Part(folder_name(str(d), schema.domains[d]), (d,), tuple(tasks)) for d in domains]
    if form == "mdl":
        return [Part(folder_name(str(t), schema.tasks[t]), tuple(domains), (t,)) for t in tasks]
    if form == "single":
        return [
            Part(folder_name(f"{d}-{t}", f"{schema.domains[d]}/{schema.tasks[t]}"), (d,), (t,))
            for d in domains
            for t in tasks
        ]
    raise ConfigError(f"form must be single, mtl or mdl to have members, got {form!r}")


def folder_name(numbers: str, name: str) -> str:
    """A folder's name that any file system takes."""
    return f"{numbers}-{re.sub(r'[^A-Za-z0-9._-]+', '-', name).strip('-.')[:60]}"


def fit(
    form: str,
    dataset: Dataset,
    make: Callable[[Schema], RankingModel],
    options: TrainOptions,
    out: Path,
    display: Callable[[], Display],
    tell: Callable[[str], None],
) -> FamilyResult:
    """Train the members that are not finished yet, and measure them as one model.

    Every member has the same options and seed. A member that was interrupted goes on; one that is finished is measured
    again and its files are left alone.

    Args:
        form: "single", "mtl" or "mdl".
        dataset: the whole log.
        make: a new model for a member's schema, where it is to compute.
        options: how to train each.
        out: the family's folder.
        display: makes what hears of a member's progress.
        tell: hears one line per member.

    Raises:
        ConfigError, CheckpointError, UserError: as ``Trainer.fit``; no member can be trained; pair weights.
    """
    if options.pair_weights is not None:
        raise ConfigError(f"pair_weights weigh the pairs of one model against each other; form {form} has several")
    schema = dataset.schema
    members: list[Member] = []
    results: dict[str, Result] = {}
    missing: dict[str, str] = {}
    parts = parts_of(form, schema)
    for number, part in enumerate(parts, 1):
        rows = labelled_rows(dataset, part.domains, part.tasks)
        empty = [name for name in PARTS if not len(rows[name])]
        view = restrict(dataset, part.domains, part.tasks, rows)
        tell(f"member {number}/{len(parts)}  {part.name}  {len(rows['train']):,} training rows")
        if empty:
            missing[part.name] = f"no labelled row in {empty[0]}"
            tell(f"left out: {missing[part.name]}")
            continue
        torch.manual_seed(options.seed)
        model = make(view.schema)
        folder = RunFolder(out / MEMBERS / part.name)
        trainer = Trainer(model, view, options, out=folder.root, display=display())
        try:
            result = trainer.fit(resume="last" if folder.holds_run() else None)
        except DataError as error:
            missing[part.name] = str(error)
            tell(f"left out: {error}")
            continue
        if result.ended == "interrupted":
            return FamilyResult("interrupted")
        members.append(Member(part.domains, part.tasks, model))
        results[part.name] = result
    if not members:
        raise DataError(f"form {form}: no member of {dataset.name} can be trained; {_first(missing)}")
    return _measured(Family(form, members, len(schema.domains), len(schema.tasks)), dataset, results, missing, out)


def _measured(
    family: Family, dataset: Dataset, results: Mapping[str, Result], missing: Mapping[str, str], out: Path
) -> FamilyResult:
    family.encoder = dataset.encoder
    val, test = (evaluate(family, part, dataset) for part in (dataset.val, dataset.test))
    metrics = family_metrics_of(family, dataset, {name: result.metrics for name, result in results.items()}, val, test)
    metrics["missing_members"] = dict(missing)
    run = RunFolder(out)
    family.save(run.checkpoint(BEST))
    run.write_metrics(metrics)
    return FamilyResult("epochs", family, val, test, metrics, missing)


def _first(missing: Mapping[str, str]) -> str:
    name, reason = next(iter(missing.items()))
    return f"{name}: {reason}"
