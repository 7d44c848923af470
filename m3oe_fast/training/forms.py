"""The forms single, mtl and mdl: several models, each on its part of the log, trained one after the other.

    OUT/members/<name>/    one ordinary run for each member
    OUT/checkpoints/best   the members' best weights as one model (`m3oe_fast.models.family`)
    OUT/metrics.json       of that model on all rows; "members" tells of each run

A member with too few labelled rows in a part of the log is left out, and the pairs it would have scored are undefined.
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
from m3oe_fast.training.weighting import options_of_member, parse_pair_weights

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
        kept: whether the folder told of this very result already; nothing was written then.
    """

    ended: Ended
    family: Family | None = None
    val: Scores | None = None
    test: Scores | None = None
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: bool = False


class LeftOut(DataError):
    """A part of the log has too few labelled rows of a member."""


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

    Every member has the same options and seed, but of pair weights only its own (`options_of_member`). A member that
    was interrupted goes on; one that is finished is measured again and its files are left alone. Memory holds the row
    numbers of one member at a time, and the weights of all.

    Args:
        form: "single", "mtl" or "mdl".
        dataset: the whole log.
        make: a new model for a member's schema, where it is to compute.
        options: how to train each.
        out: the family's folder.
        display: makes what hears of a member's progress.
        tell: hears one line per member.

    Raises:
        ConfigError, CheckpointError, UserError: as ``Trainer.fit``; pair weights of what is not in the log.
        DataError: no member can be trained.
    """
    schema = dataset.schema
    if options.pair_weights is not None:  # a member would ignore a misspelt name as one of another member's
        parse_pair_weights(options.pair_weights, schema.domains, schema.tasks)
    members: list[Member] = []
    results: dict[str, Result] = {}
    missing: dict[str, str] = {}
    parts = parts_of(form, schema)
    try:
        for number, part in enumerate(parts, 1):
            title = f"member {number}/{len(parts)}  {part.name}"
            try:
                model, result = train_member(
                    part,
                    dataset,
                    make,
                    options,
                    out / MEMBERS / part.name,
                    display(),
                    lambda rows, title=title: tell(f"{title}  {rows:,} training rows"),
                )
            except LeftOut as error:
                missing[part.name] = str(error)
                tell(f"left out: {error}")
                continue
            members.append(Member(part.domains, part.tasks, model))
            results[part.name] = result
        if not members:
            raise DataError(f"form {form}: no member of {dataset.name} can be trained; {_first(missing)}")
        family = Family(form, members, len(schema.domains), len(schema.tasks))
        return _measured(family, dataset, results, missing, out)
    except KeyboardInterrupt:
        return FamilyResult("interrupted")


def train_member(
    part: Part,
    dataset: Dataset,
    make: Callable[[Schema], RankingModel],
    options: TrainOptions,
    folder: Path,
    display: Display,
    begin: Callable[[int], None] = lambda rows: None,
) -> tuple[RankingModel, Result]:
    """Train a member, or go on with it, as a run of its own.

    Args:
        part: which.
        dataset: the whole log.
        make, options: as for `fit`.
        folder: its run folder.
        display: hears of the progress.
        begin: hears how many training rows there are, before anything is trained.

    Returns:
        The model with its best weights, and how its run ended.

    Raises:
        LeftOut: the rows do not suffice.
        ConfigError, CheckpointError, UserError: as ``Trainer.fit``.
        KeyboardInterrupt: Ctrl-C; the next call goes on.
    """
    view = restrict(dataset, part.domains, part.tasks, labelled_rows(dataset, part.domains, part.tasks))
    begin(len(view.train))
    for name in PARTS:
        if not len(getattr(view, name)):
            raise LeftOut(f"no labelled row in {name}")
    torch.manual_seed(options.seed)
    model = make(view.schema)
    own = options_of_member(options, view.schema.domains, view.schema.tasks)
    try:
        trainer = Trainer(model, view, own, out=folder, display=display)
    except DataError as error:
        raise LeftOut(str(error)) from error
    result = trainer.fit(resume="last" if RunFolder(folder).holds_run() else None)
    if result.ended == "interrupted" or trainer.interrupted:
        raise KeyboardInterrupt
    return model, result


def _measured(
    family: Family, dataset: Dataset, results: Mapping[str, Result], missing: Mapping[str, str], out: Path
) -> FamilyResult:
    family.encoder = dataset.encoder
    val, test = (evaluate(family, part, dataset) for part in (dataset.val, dataset.test))
    metrics = family_metrics_of(family, dataset, {name: result.metrics for name, result in results.items()}, val, test)
    metrics["missing_members"] = dict(missing)
    run = RunFolder(out)
    kept = _is_written(run, metrics)
    if not kept:
        family.save(run.checkpoint(BEST))
        run.write_metrics(metrics)
    return FamilyResult("epochs", family, val, test, metrics, missing, kept)


def _is_written(run: RunFolder, metrics: Mapping[str, Any]) -> bool:
    """Whether the folder holds this family, and metrics.json tells of the same training of the same members."""
    old = run.read_metrics()
    if old is None or not run.holds(BEST):
        return False
    trained = [(of.get("train") or {}).get("seconds") for of in (old, metrics)]
    return trained[0] == trained[1] and all(
        list(old.get(name) or ()) == list(metrics[name]) for name in ("members", "missing_members")
    )


def _first(missing: Mapping[str, str]) -> str:
    name, reason = next(iter(missing.items()))
    return f"{name}: {reason}"
