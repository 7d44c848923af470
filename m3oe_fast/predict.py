"""``python -m m3oe_fast.predict``: score raw rows in Parquet or CSV files with a saved model."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from m3oe_fast import cli
from m3oe_fast.cli.compute import ComputeOptions, place
from m3oe_fast.cli.output import check_output
from m3oe_fast.data.options import option
from m3oe_fast.errors import ConfigError
from m3oe_fast.model import SCORED_AT_ONCE
from m3oe_fast.scoring import open_inputs, score_files
from m3oe_fast.training.console import make_console, say

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal for a bar."""


@dataclass(frozen=True)
class PredictOptions:
    """What to score, and where the scores go."""

    checkpoint: str = option("", "The model: a run folder (its best weights), a checkpoint folder or a model.pt.")
    input: str = option(
        "",
        "Raw rows, with the columns of the log that the model was trained on: a Parquet or CSV file, or a folder of "
        "them. Labels are not needed.",
    )
    output: str = option("", "The Parquet file to write: a column score_<task> for each task, a row for each row.")
    keep: str | None = option(
        None,
        "Columns of the input that the output has before the scores, for example user_id,item_id; all for all of them "
        "(default: none).",
    )
    overwrite: bool = option(False, "Replace an output that is there already.")
    batch_size: int = option(SCORED_AT_ONCE, "Rows encoded and scored at once.")

    def __post_init__(self) -> None:
        for name, example in (("checkpoint", "runs/a"), ("input", "rows.parquet"), ("output", "scores.parquet")):
            if not getattr(self, name).strip():
                raise ConfigError(f"{name} is missing; name it, for example --{name} {example}")
        if not self.output.endswith(".parquet"):
            raise ConfigError(f"output must be a name that ends in .parquet, got {self.output!r}")
        if not 1 <= self.batch_size < 2**31:
            raise ConfigError(f"batch_size must be an integer of at least 1, got {self.batch_size!r}")

    @property
    def kept(self) -> list[str]:
        """The columns that ``keep`` names."""
        return [] if self.keep is None else [name for name in self.keep.split(",") if name]


COMMAND = cli.Command(
    "predict",
    """\
Scores raw log rows with a saved model, through the vocabularies saved with it, and writes the
probability of each task. Memory stays bounded however many rows there are.""",
    examples=[
        "--checkpoint runs/a --input rows.parquet --output scores.parquet",
        "--checkpoint runs/a --input folder/ --output scores.parquet --keep user_id,item_id",
        "--checkpoint model.pt --input rows.csv --output scores.parquet --keep all --overwrite",
    ],
    groups={"scoring": PredictOptions, "computation": ComputeOptions},
    interrupted="interrupted by Ctrl-C (nothing is written)",
)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UserError: something the user has to mend.
    """
    options, compute = COMMAND.parse(argv)
    source, target = (Path(os.path.expanduser(path)) for path in (options.input, options.output))
    check_output("output", target, overwrite=options.overwrite)
    files = open_inputs(source)
    if any(target.exists() and file.path.samefile(target) for file in files):
        raise ConfigError(f"--output {target} is one of the files to score; name another file")
    model = compute.load(options.checkpoint)
    rows = [file.rows for file in files]
    total = None if None in rows else sum(rows)
    console = make_console()
    say(console, f"model     {options.checkpoint}")
    say(console, f"backend   {place(model)}")
    say(console, f"input     {source}" + (f", {len(files)} files" if len(files) > 1 else ""))
    started = time.perf_counter()
    with _progress(console, total) as advance:
        scored = score_files(model, files, target, keep=options.kept, batch_size=options.batch_size, advance=advance)
    seconds = time.perf_counter() - started
    say(console, f"scored {scored:,} rows in {seconds:.1f} s, {scored / seconds:,.0f} rows/s, into {target}")
    return 0


@contextmanager
def _progress(console: Console, total: int | None) -> Iterator[Callable[[int], None]]:
    """Something to call with the rows done since the last call: a bar on a terminal, a line now and then elsewhere."""
    if console.is_terminal:
        with Progress(
            TextColumn("scoring"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:,.0f} rows  {task.fields[rate]} rows/s  left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        ) as bar:
            task = bar.add_task("", total=total, rate="-")
            started = time.perf_counter()

            def move(rows: int) -> None:
                done = bar.tasks[0].completed + rows
                bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - started):,.0f}")

            yield move
    else:
        yield _Lines(console, total)


class _Lines:
    """Progress in lines."""

    def __init__(self, console: Console, total: int | None) -> None:
        self._console, self._total = console, total
        self._done = 0
        self._started = self._said = time.perf_counter()

    def __call__(self, rows: int) -> None:
        self._done += rows
        now = time.perf_counter()
        if now - self._said < LINE_SECONDS:
            return
        self._said = now
        of = "" if self._total is None else f" of {self._total:,}"
        say(self._console, f"scored {self._done:,}{of} rows, {self._done / (now - self._started):,.0f} rows/s")


if __name__ == "__main__":
    cli.run(main)
