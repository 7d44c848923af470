"""``python -m m3oe_fast.evaluate``: measure a saved model on a part of the log that it was trained on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from m3oe_fast import checkpoint, cli
from m3oe_fast.cli.compute import ComputeOptions, place
from m3oe_fast.cli.matching import check_fit
from m3oe_fast.cli.output import check_output, write_json
from m3oe_fast.cli.run_config import options_of_run, parse_with_data_of
from m3oe_fast.data import load_options
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.options import DataOptions, option
from m3oe_fast.errors import ConfigError
from m3oe_fast.models import AnyModel
from m3oe_fast.training.console import make_console, print_scores, say
from m3oe_fast.training.evaluation import evaluate

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class EvaluateOptions:
    """What to measure on what."""

    checkpoint: str = option("", "The model: a run folder (its best weights), a checkpoint folder or a model.pt.")
    part: Literal[PARTS] = option("test", "The rows to score.")
    json: str | None = option(None, "Also write the scores into this file, as strict JSON; an undefined one is null.")

    def __post_init__(self) -> None:
        if not self.checkpoint.strip():
            raise ConfigError("name the model with --checkpoint, for example --checkpoint runs/a")
        if self.json is not None and not self.json.strip():
            raise ConfigError("json must name a file")


COMMAND = cli.Command(
    "evaluate",
    """\
Scores the test rows, or another part of a log, with a saved model and prints AUC, logloss and more
per domain and task. The log is that of the model's run unless the line names another.""",
    examples=[
        "--checkpoint runs/a",
        "--checkpoint runs/a/checkpoints/last --part val --json last.json",
        "--checkpoint model.pt --data prepared:prepared/ml-100k --backend reference",
    ],
    groups={"evaluation": EvaluateOptions, "data": DataOptions, "computation": ComputeOptions},
)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    options, data, compute = _parse(argv)
    target = None if options.json is None else Path(os.path.expanduser(options.json))
    if target is not None:
        check_output("json", target, overwrite=True)
    model = compute.load(options.checkpoint)
    dataset = load_options(data)
    check_fit(model, options.checkpoint, dataset)
    part = getattr(dataset, options.part)
    console = make_console()
    say(console, f"data      {dataset.name}, split {dataset.split} (split seed {dataset.split_seed})")
    say(console, f"rows      {options.part}, {len(part):,}")
    say(console, f"model     {options.checkpoint}")
    say(console, f"backend   {place(model)}")
    if _is_divided_otherwise(options.checkpoint, dataset):
        say(console, "warning: the run divided its rows otherwise, so it may have been trained on some of these")
    scores = evaluate(model, part, dataset)
    model.check_inputs()
    print_scores(console, options.part, scores, dataset.best_auc if options.part == "test" else None)
    if target is not None:
        write_json(target, _record(options, dataset, model, len(part)) | scores.to_dict())
        say(console, f"written   {target}")
    return 0


def _parse(argv: list[str]) -> tuple[EvaluateOptions, DataOptions, ComputeOptions]:
    """The options; those of the data come from the run's config.yaml where the line leaves them out."""
    options, data, compute = COMMAND.parse(argv)
    checkpoint.locate(options.checkpoint)
    run = options_of_run(options.checkpoint)
    if run is not None:
        return parse_with_data_of(run, COMMAND, argv)
    if "data" not in COMMAND.given(argv):
        raise ConfigError(
            f"{options.checkpoint} lies in no run folder with a config.yaml, which would name the log; "
            "name it with --data"
        )
    return options, data, compute


def _is_divided_otherwise(path: str, dataset: Dataset) -> bool:
    run = options_of_run(path) or {}
    division = {"split": dataset.split, "split_seed": dataset.split_seed}
    return any(run.get(name, value) != value for name, value in division.items())


def _record(options: EvaluateOptions, dataset: Dataset, model: AnyModel, rows: int) -> dict[str, Any]:
    return {
        "checkpoint": options.checkpoint,
        "data": {
            "name": dataset.name,
            "split": dataset.split,
            "split_seed": dataset.split_seed,
            "part": options.part,
            "rows": rows,
        },
        "backend": model.backend_name,
        "precision": model.precision,
    }


if __name__ == "__main__":
    cli.run(main)
