"""``python -m m3oe_fast.table``: train every model in every form over several seeds, and write the comparison."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from m3oe_fast import cli, train
from m3oe_fast.cli.compute import ComputeOptions
from m3oe_fast.comparison import figure, markdown, results
from m3oe_fast.comparison.folder import TableFolder
from m3oe_fast.comparison.options import (
    SharedTrainOptions,
    SizeOptions,
    TableOptions,
    changed,
    sizes_of,
    words,
)
from m3oe_fast.comparison.plan import Plan, Row, Run, parse_lrs, parse_models, parse_seeds
from m3oe_fast.comparison.progress import ComparisonDisplay
from m3oe_fast.comparison.workers import Workers
from m3oe_fast.data import load_options
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.options import DataOptions
from m3oe_fast.errors import ConfigError
from m3oe_fast.reporting import style
from m3oe_fast.training.console import make_console, say
from m3oe_fast.training.run_folder import write_text

COMMAND = cli.Command(
    "table",
    """\
Trains every model of the M3oE paper's Table 2 in every form over several seeds, each run a process
of its own, and writes table.md, table.csv, summary.csv and table.png. All runs share data, split
and training options. The same line again goes on where it was: finished runs are never repeated,
and more models or seeds may be asked for. Exit status 1 means that a run failed; the table says
which and why.""",
    examples=[
        "--data movielens-100k --data_path recbole-1.2.1-py3-none-any.whl --out tables/a",
        "--models mmoe,ple:mtl,m3oe --seeds 2022..2024 --out tables/b",
        "--lrs 1e-3,3e-3,1e-2 --epochs 30 --out tables/c --jobs 4",
    ],
    groups={
        "table": TableOptions,
        "data": DataOptions,
        "sizes, for the models that have them": SizeOptions,
        "training": SharedTrainOptions,
        "computation": ComputeOptions,
    },
    interrupted="interrupted by Ctrl-C (the same line again goes on)",
)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    request = Request(*COMMAND.parse(argv))
    if {"lr", "lrs"} <= COMMAND.given(argv).keys():
        raise ConfigError("lr and lrs are both named: one rate for all, or several to choose from; drop one")
    style.check_installed("the table", ("matplotlib", "scipy"))
    folder = TableFolder(request.table.out, names_rates=len(request.plan.lrs) > 1)
    folder.check()
    options = {row: train.parse(request.words(Run(row, 0, request.plan.lrs[0]))) for row in request.plan.rows}
    for row in request.plan.rows:
        device = train.computing_device(options[row])
    dataset = load_options(request.data)  # once, before the runs that share it
    settings = request.settings(dataset)
    folder.check_protocol(settings)
    _check_runs(request.plan, folder, options, dataset)
    folder.write_settings(settings)
    return _Table(request, folder, dataset, request.jobs(device), make_console()).make()


@dataclass(frozen=True)
class Request:
    """Everything that was asked for."""

    table: TableOptions
    data: DataOptions
    sizes: Any
    train: Any
    compute: ComputeOptions

    @property
    def plan(self) -> Plan:
        """Its runs."""
        table = self.table
        lrs = (self.train.lr,) if table.lrs is None else parse_lrs(table.lrs)
        return Plan(parse_models(table.models), parse_seeds(table.seeds), lrs)

    def words(self, run: Run) -> list[str]:
        """The options of a run, behind ``m3oe_fast.train``."""
        shared = [
            changed(self.data),
            sizes_of(run.row, changed(self.sizes)),
            changed(self.train),
            changed(self.compute),
        ]
        values = {name: value for group in shared for name, value in group.items()}
        return words(values | {"model": run.row.model, "form": run.row.form, "lr": run.lr, "seed": run.seed})

    def jobs(self, device: torch.device) -> int:
        """Runs at a time."""
        if self.table.jobs is not None:
            return self.table.jobs
        return 1 if device.type == "cuda" else max(1, (os.cpu_count() or 1) // self.table.threads)

    def settings(self, dataset: Dataset) -> dict[str, Any]:
        """The protocol: every option that all runs share, and which rows they go over."""
        groups = map(dataclasses.asdict, (self.data, self.sizes, self.train, self.compute))
        flat = {name: value for group in groups for name, value in group.items()}
        if self.table.lrs is not None:
            flat["lr"] = self.plan.lrs
        # A prepared folder was split when it was written, whatever the line says.
        flat |= {"split": dataset.split, "split_seed": dataset.split_seed, "threads": self.table.threads}
        return flat | {"digest of the rows": dataset.identity}

    def protocol(self, dataset: Dataset) -> dict[str, str]:
        """The same in words, for a person."""
        training, plan = self.train, self.plan
        rates = ", ".join(f"{lr:g}" for lr in plan.lrs)
        if len(plan.lrs) > 1:
            rates += f": the best validation AUC of seed {plan.seeds[0]} decides, for each row"
        others = changed(training) | changed(self.sizes)
        for name in ("epochs", "patience", "batch_size", "lr", "optimizer"):
            others.pop(name, None)
        seeded = f", split seed {dataset.split_seed}" if dataset.split in ("random", "user") else ""
        facts = {
            "data": dataset.name,
            "split": f"{dataset.split}{seeded}",
            "seeds": self.table.seeds,
            "epochs": f"at most {training.epochs}, patience {training.patience}",
            "batch size": f"{training.batch_size:,}",
            "optimizer": training.optimizer,
            "learning rate": rates,
            "runs of each row": str(plan.budget),
            "computation": f"backend {self.compute.backend}, {self.compute.precision}, device {self.compute.device}, "
            f"{self.table.threads} thread{'s' * (self.table.threads > 1)} a run",
            "other options": ", ".join(f"{name} {value}" for name, value in others.items()) or "the defaults",
        }
        return facts


def _check_runs(plan: Plan, folder: TableFolder, options: Mapping[Row, train.Options], dataset: Dataset) -> None:
    """Refuse a folder with runs of another protocol before anything is trained."""
    for run in plan.possible():
        resolved = options[run.row].resolved("", dataset)
        folder.check_run(run, resolved | {"seed": run.seed, "lr": run.lr})


class _Table:
    """The runs of one table, and its files.

    Args:
        request: what was asked for.
        folder: where it lies.
        dataset: what all runs go over.
        jobs: runs at a time.
        console: where to write.
    """

    def __init__(self, request: Request, folder: TableFolder, dataset: Dataset, jobs: int, console: Console) -> None:
        self._request, self._folder, self._dataset = request, folder, dataset
        self._jobs, self._console = jobs, console

    def make(self) -> int:
        """Train what is missing and write the files; returns the exit status."""
        plan, dataset = self._request.plan, self._dataset
        for line in (*dataset.summary(), *self._describe()):
            say(self._console, line)
        with ComparisonDisplay(self._console, plan.size, self._jobs) as display:
            workers = Workers(
                plan,
                self._folder,
                self._request.words,
                self._result,
                self._jobs,
                self._request.table.threads,
                display,
            )
            done = workers.run()
        if not done:
            say(self._console, f"interrupted with {display.ended_runs} of {plan.size} runs done; the same line goes on")
            return 130
        found = results.gather(plan, workers.outcomes, dataset.schema.domains, dataset.schema.tasks)
        self._write(found)
        for run, reason in found.missing:
            say(self._console, f"failed: {run.label}: {reason} ({self._folder.log(run)})")
        say(self._console, f"table     {self._folder.markdown}, {self._folder.figure}")
        return 1 if found.missing else 0

    def _describe(self) -> Sequence[str]:
        facts = self._request.protocol(self._dataset)
        del facts["data"], facts["split"]
        runs = self._request.plan.size
        return (
            *(f"{label:<18}{value}" for label, value in facts.items()),
            f"{'runs':<18}{runs:,}, {self._jobs} at a time, in {self._folder.root}",
        )

    def _result(self, run: Run) -> dict[str, Any] | None:
        training = self._request.train
        rows = {part: count["rows"] for part, count in self._dataset.counts.items()}
        return self._folder.result(run, training.epochs, training.patience, rows)

    def _write(self, found: results.Results) -> None:
        folder, dataset = self._folder, self._dataset
        write_text(folder.scores, results.tidy(found).to_csv(index=False, lineterminator="\n"))
        write_text(folder.summary, results.wide(found).to_csv(index=False, lineterminator="\n"))
        figure.write(found, dataset.name, folder.figure)
        protocol = self._request.protocol(dataset)
        write_text(folder.markdown, markdown.text(found, dataset, protocol, folder.figure.name))


if __name__ == "__main__":
    cli.run(main)
