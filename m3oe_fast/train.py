"""``python -m m3oe_fast.train``: train a model on a log, print the result, write a run folder.

Options come from the line, from a YAML file (``--config``) or both; the line wins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from m3oe_fast import backends, cli
from m3oe_fast.cli import config_file
from m3oe_fast.cli.compute import ComputeOptions, place
from m3oe_fast.data import load_options
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.options import DataOptions, option
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import ConfigError
from m3oe_fast.model import RankingModel
from m3oe_fast.models import MODELS
from m3oe_fast.models.options import ModelOptions
from m3oe_fast.training import Result, Trainer, TrainOptions, forms, graph
from m3oe_fast.training.console import ConsoleDisplay, make_console, print_result, print_scores, say
from m3oe_fast.training.evaluation import device_of
from m3oe_fast.training.resume import continues
from m3oe_fast.training.run_folder import RunFolder, reserve_default, root_of


@dataclass(frozen=True)
class RunOptions(ComputeOptions):
    """How to compute, and where the run is kept."""

    out: str | None = option(None, "The run folder (default: runs/<data>-<time>). One that holds a run needs --resume.")
    resume: str | None = option(
        None,
        "Go on with a run: last or best of the run folder --out, or the path of a run folder or "
        "checkpoint. last starts afresh where there is nothing yet.",
    )

    def __post_init__(self) -> None:
        for name in ("out", "resume"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigError(f"{name} must name a folder, got {value!r}")


COMMAND = cli.Command(
    "train",
    """\
Trains a multi-domain multi-task model on a log and prints AUC and logloss per domain and task.
Without any option it trains M3oE on a generated demo log, in a minute or two on a laptop.""",
    examples=[
        "",
        "--epochs 3 --out runs/a",
        "--out runs/a --epochs 6 --resume last",
        "--schedule cosine --warmup 100 --clip_norm 1 --bilevel first_order",
        "--data movielens-1m --data_path ml-1m.zip --lr 3e-3",
        "--config runs/a/config.yaml --out runs/b --seed 1",
    ],
    groups={"data": DataOptions, "model": ModelOptions, "training": TrainOptions, "run": RunOptions},
    interrupted="interrupted by Ctrl-C (--resume last goes on)",
)


@dataclass(frozen=True)
class Options:
    """Everything that was asked for, resolved and valid."""

    data: DataOptions
    model: ModelOptions
    train: TrainOptions
    run: RunOptions

    def resolved(self, out: str, dataset: Dataset) -> dict[str, Any]:
        """The content of config.yaml: what --config needs to do the same again."""
        groups = (
            dataclasses.asdict(self.data),
            self.model.resolved(),
            *map(dataclasses.asdict, (self.train, self.run)),
        )
        flat = {name: value for group in groups for name, value in group.items()}
        del flat["resume"]
        # A prepared folder was split when it was written, whatever the line says.
        return flat | {"split": dataset.split, "split_seed": dataset.split_seed, "out": out}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    options = parse(argv)
    with _run_folder(options) as out:
        return _run(options, out)


def _run(options: Options, out: str) -> int:
    console = make_console()
    folder = RunFolder(out)
    folder.check(resuming=continues(folder, options.run.resume))
    _check_same_form(folder, options.model)
    device = computing_device(options)
    dataset = load_options(options.data)
    if options.model.form != "mdmt":
        return _run_family(options, out, dataset, device, console)
    torch.manual_seed(options.train.seed)
    model = make_model(options, dataset.schema, device)
    trainer = Trainer(
        model,
        dataset,
        options.train,
        out=out,
        resolved=options.resolved(out, dataset),
        display=ConsoleDisplay(console),
    )
    for line in (*dataset.summary(), *_describe(trainer, options), f"run       {out}"):
        say(console, line)
    result = trainer.fit(options.run.resume)
    if result.best_epoch:
        print_result(console, result, dataset.best_auc)
    say(console, _closing(result, out))
    return 130 if result.ended == "interrupted" else 0


def _run_family(options: Options, out: str, dataset: Dataset, device: torch.device, console: Console) -> int:
    """A run of several models; each is a run of its own in a folder of its own."""
    if options.run.resume not in (None, "last"):
        raise ConfigError(f"resume of form {options.model.form} must be last, got {options.run.resume}")
    folder = RunFolder(out)
    resolved = options.resolved(out, dataset)
    if not folder.config.is_file():
        folder.write_config(resolved)
    for line in (*dataset.summary(), f"model     {options.model.model} ({options.model.form})", f"run       {out}"):
        say(console, line)
    result = forms.fit(
        options.model.form,
        dataset,
        lambda schema: make_model(options, schema, device),
        options.train,
        Path(out),
        lambda: ConsoleDisplay(console),
        lambda text: say(console, text),
    )
    if not result.kept:
        folder.write_config(resolved)  # only now, as it is the members that refuse options of another run
    if result.family is None:
        say(console, f"interrupted; to go on: python -m m3oe_fast.train --config {out}/config.yaml --resume last")
        return 130
    say(
        console,
        "test scores of all models together, each with the weights of its best epoch; val AUC: validation rows",
    )
    print_scores(console, "test", result.test, dataset.best_auc, result.val)
    for name, reason in result.missing.items():
        say(console, f"left out: {name}, {reason}")
    model = result.metrics["model"]
    say(
        console,
        f"done: {len(result.family.members)} models, {model['parameters']:,} parameters, "
        f"{model['multiply_adds']:,} multiply-adds per row; the weights in {out} are those of their best epochs",
    )
    return 0


def _check_same_form(folder: RunFolder, model: ModelOptions) -> None:
    """One model, and each member, checks itself; another form, or model of it, would have others in the same folder."""
    if not folder.config.is_file():
        return
    saved = config_file.load_mapping(str(folder.config))
    for name, default in (("form", "mdmt"), ("model", "m3oe")):  # of a run from Python, or before there were several
        if (was := saved.get(name, default)) != (now := getattr(model, name)):
            raise ConfigError(
                f"{folder.root} is a run of another {name}: it was {was} and is now {now}; train in another folder, "
                "with --out"
            )
        if model.form == "mdmt":
            return


def parse(argv: Sequence[str]) -> Options:
    """Read the options of one command line.

    Raises:
        ConfigError: an option, a value or the YAML file is wrong; one line says which.
        SystemExit: --help or --print_config was asked for, and printed.
    """
    return Options(*COMMAND.parse(argv))


@contextmanager
def _run_folder(options: Options) -> Iterator[str]:
    """The run folder; a default one is made at once, so that no other run takes it, and removed if left empty."""
    resume = options.run.resume
    if options.run.out is not None:
        yield options.run.out
    elif resume not in (None, "last", "best") and (root := root_of(resume)):
        yield str(root)
    else:
        root = reserve_default(options.data.data, datetime.now())
        try:
            yield str(root)
        finally:
            for folder in (root, root.parent):
                with suppress(OSError):
                    folder.rmdir()


def computing_device(options: Options) -> torch.device:
    """Where the run computes; what cannot run is refused before a log is read, which can take long.

    Raises:
        UserError: the device, the backend, or a size of the model is impossible.
    """
    device, backend = options.run.choose()
    graph.is_used(options.train, device, backend)
    config = options.model.config(Schema(("any",), vocab_sizes=(1,), dense=(), domains=("all",), tasks=("any",)))
    if not config.fused:
        backends.choose_eager(options.run.backend, device, torch.float32, options.run.precision, config.name)
    return device


def make_model(options: Options, schema: Schema, device: torch.device) -> RankingModel:
    """A new model for a log; seed torch before it if its first weights are to be reproducible."""
    config = options.model.config(schema)
    _, backend = options.run.choose()
    # Made on the CPU, where its first weights are the same for every device.
    model = MODELS[config.name](
        config, backend=backend if config.fused else options.run.backend, precision=options.run.precision
    )
    return model.to(device)


def _describe(trainer: Trainer, options: Options) -> list[str]:
    model, train = trainer.model, options.train
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bags = bool(model.config.bag_vocab_sizes)
    graphed = graph.is_used(train, device_of(model), model.backend_name, bags)
    batch = f"batch {train.batch_size:,}" + (f" x {train.accumulate}" if train.accumulate > 1 else "")
    rate = f"lr {train.lr:g}" + ("" if train.schedule == "constant" else f" ({train.schedule})")
    table = ""
    if train.embedding_optimizer != "same":
        table = f"; embedding: {train.embedding_optimizer}, lr {train.table_lr:g}, only the rows in the batch"
    return [
        f"model     {model.config.name} ({options.model.form}), {parameters:,} parameters, "
        f"{model.multiply_adds():,} multiply-adds per row",
        f"backend   {place(model)}",
        f"training  at most {train.epochs} epochs, {batch}, {train.optimizer}, {rate}, seed {train.seed}"
        + (", steps as CUDA graphs" if graphed else "")
        + f"{table}; fusion weights: {_outer(trainer, train)}",
    ]


def _outer(trainer: Trainer, train: TrainOptions) -> str:
    """How the fusion weights are trained, in words."""
    if not trainer.model.fusion_parameters():
        return "none in this model"
    if train.bilevel == "off":
        return "fixed"
    if train.bilevel == "joint":
        return f"with the network, lr {train.fusion_lr:g}"
    how = (
        "one outer step an epoch" if train.bilevel == "published" else f"an outer step every {train.outer_every} steps"
    )
    mode = "" if train.bilevel in ("published", "alternating") else f"{train.bilevel}, "
    return f"{mode}{how}, at most {trainer.outer_steps:,}, lr {train.fusion_lr:g}"


def _closing(result: Result, out: str) -> str:
    done = len(result.history)
    if result.ended == "interrupted":
        when = f"after epoch {done}" if done else "before the first epoch was finished"
        return f"interrupted {when}; to go on: python -m m3oe_fast.train --config {out}/config.yaml --resume last"
    why = "stopped early" if result.ended == "patience" else "done"
    return f"{why} after epoch {done}; the weights in {out} are those of epoch {result.best_epoch}"


if __name__ == "__main__":
    cli.run(main)
