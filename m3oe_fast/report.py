"""``python -m m3oe_fast.report``: figures and tables of a run, as Markdown in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from m3oe_fast import cli
from m3oe_fast.cli.compute import ComputeOptions
from m3oe_fast.cli.matching import check_fit
from m3oe_fast.cli.run_config import parse_with_data_of
from m3oe_fast.data import load_options
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.options import DataOptions, option
from m3oe_fast.errors import CheckpointError, ConfigError, UserError
from m3oe_fast.models import AnyModel
from m3oe_fast.reporting import record, style
from m3oe_fast.reporting.build import ROWS, Loaded, write_report
from m3oe_fast.training import seesaw
from m3oe_fast.training.console import make_console, say
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.run_folder import BEST, LAST, RunFolder

MOST_ROWS = 20_000  # t-SNE of more takes minutes, and its points cover each other


@dataclass(frozen=True)
class ReportOptions:
    """What to report on."""

    run: str = option("", "The run folder.")
    checkpoint: Literal[(BEST, LAST)] = option(
        BEST, "Whose weights gates, calibration and embeddings are of; the scores are those of the best epoch."
    )
    rows: int = option(ROWS, "Test rows drawn for gates and t-SNE, evenly from the domains.")
    seesaw: bool = option(
        False,
        "First train a model of one domain and one task for every pair, with the run's options, into RUN/baselines, to "
        "show who gains and who loses by being trained together. Interrupted, it goes on where it was.",
    )

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise ConfigError("name the run folder, for example: python -m m3oe_fast.report runs/a")
        if not 1 <= self.rows <= MOST_ROWS:
            raise ConfigError(f"rows must be from 1 to {MOST_ROWS:,}, got {self.rows}")


COMMAND = cli.Command(
    "report",
    """\
Writes RUN/report.md with figures in RUN/report: loss and AUC by epoch, fusion weights, use of the
shared experts, calibration, t-SNE of the experts' embeddings, and the seesaw if it was measured.
The log is that of the run unless the line names another place for it.""",
    examples=["runs/a", "runs/a --seesaw", "runs/a --checkpoint last --data_path /elsewhere/ml-1m.zip"],
    groups={"report": ReportOptions, "data": DataOptions},
    bare="run",
)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    options, _ = COMMAND.parse(argv)
    style.check_installed()
    root = Path(os.path.expanduser(options.run))
    run = record.read(root)
    data, overridden = _data_options(argv, run.config)
    console = make_console()
    loaded, missing = _load(options, run.config, data, overridden)
    if loaded is not None:
        schema = loaded.dataset.schema
        run = record.read(root, schema.domains, schema.tasks)
    if options.seesaw:
        if loaded is None:
            raise ConfigError(f"--seesaw needs the run's model and data: {missing}")
        model, training = loaded.model.config, _training(run.config)
        seesaw.compare(root, loaded.dataset, model, training, _place(run.config), lambda line: say(console, line))
        run = record.read(root, run.domains, run.tasks)
    path = write_report(run, loaded, missing)
    for note in (*run.notes, *([missing] if missing else [])):
        say(console, f"note: {note}")
    say(console, f"written {path} and the figures in {path.parent / 'report'}")
    return 0


def _data_options(argv: list[str], config: Mapping[str, Any]) -> tuple[DataOptions | None, bool]:
    """Where the rows are, None if nothing says so; and whether the line says something about it."""
    given = COMMAND.given(argv)
    named = any(field.name in given for field in fields(DataOptions))
    if "data" not in given and "data" not in config:
        return None, named
    return parse_with_data_of(config, COMMAND, argv)[1], named


def _load(
    options: ReportOptions, config: Mapping[str, Any], data: DataOptions | None, overridden: bool
) -> tuple[Loaded | None, str]:
    """Model and rows, or None and why. Where the line itself says where the rows are, what is wrong is an error."""
    folder = RunFolder(os.path.expanduser(options.run))
    if not folder.holds(options.checkpoint):
        return None, f"the run has no checkpoint {options.checkpoint} yet"
    try:
        model = ComputeOptions().load(str(folder.checkpoint(options.checkpoint)))
        if data is None:
            raise ConfigError("config.yaml, which names the log, is missing; name the log with --data")
        dataset = load_options(data)
        _check_rows(model, dataset, options, config)
    except UserError as error:
        if overridden:
            raise
        return None, str(error)
    return Loaded(model, dataset, f"the run's checkpoint {options.checkpoint}", options.rows), ""


def _check_rows(model: AnyModel, dataset: Dataset, options: ReportOptions, config: Mapping[str, Any]) -> None:
    """The test rows must be those of the run: others may be among its training rows, or mean something else."""
    for name in ("split", "split_seed"):
        if config.get(name, own := getattr(dataset, name)) != own:
            raise CheckpointError(f"the run divided its rows with {name} {config[name]}, not {own}; drop --{name}")
    check_fit(model, options.run, dataset)


def _training(config: Mapping[str, Any]) -> TrainOptions:
    """The run's own options of training, but for its loggers, which need not be installed here."""
    names = {field.name for field in fields(TrainOptions)} - {"logger"}
    return TrainOptions(**{name: config[name] for name in names & config.keys()})


def _place(config: Mapping[str, Any]) -> seesaw.Place:
    """Where the run computed, or what takes its place here."""
    own = {field.name: config[field.name] for field in fields(ComputeOptions) if field.name in config}
    compute = ComputeOptions(**own)
    device, backend = compute.choose()
    return seesaw.Place(device, backend, compute.precision)


if __name__ == "__main__":
    cli.run(main)
