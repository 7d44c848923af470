"""What a person sees of a training run: a bar or plain lines, and the end table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from m3oe_fast.metrics import Measure, Scores
    from m3oe_fast.training.trainer import Epoch, Result

REFRESH_SECONDS = 0.25
PLAIN_WIDTH = 500
"""Width of what is not a terminal: lines in a log file must not be wrapped or cut."""

_UNDEFINED = "-"


class Display:
    """Hears of a run's progress and says nothing; the base of every display."""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def message(self, text: str) -> None:
        """Something the user should know, one line."""

    def begin_epoch(self, epoch: int, epochs: int, rows: int) -> None:
        """Epoch ``epoch`` (from 1) of at most ``epochs`` begins; it has ``rows`` rows."""

    def advance(self, done: int, mean_loss: Callable[[], float]) -> None:
        """``done`` rows of the epoch are through; calling ``mean_loss`` may wait for the device."""

    def end_epoch(self, epoch: Epoch, is_best: bool) -> None:
        """The epoch is finished and written."""


class ConsoleDisplay(Display):
    """On a terminal a bar with rows/s, ETA, loss and validation AUC; everywhere a line per epoch.

    Args:
        console: where to write; by default standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or make_console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._epochs = self._rows = 0
        self._auc = _UNDEFINED
        self._next_refresh = 0.0
        self._started = 0.0

    def __enter__(self) -> ConsoleDisplay:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}% {task.fields[rate]} rows/s  left"),
                TimeRemainingColumn(),
                TextColumn("loss {task.fields[loss]}  val AUC {task.fields[auc]}"),
                console=self._console,
                refresh_per_second=1 / REFRESH_SECONDS,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def message(self, text: str) -> None:
        say(self._console, text)

    def begin_epoch(self, epoch: int, epochs: int, rows: int) -> None:
        self._epochs, self._rows = epochs, rows
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._started = time.perf_counter()
        self._next_refresh = 0.0
        self._task = self._bar.add_task(
            f"epoch {epoch}/{epochs}", total=rows, rate=_UNDEFINED, loss=_UNDEFINED, auc=self._auc
        )

    def advance(self, done: int, mean_loss: Callable[[], float]) -> None:
        now = time.perf_counter()
        if self._bar is None or (now < self._next_refresh and done < self._rows):
            return
        self._next_refresh = now + REFRESH_SECONDS
        rate = f"{done / max(now - self._started, 1e-9):,.0f}"
        self._bar.update(self._task, completed=done, rate=rate, loss=f"{mean_loss():.4f}")

    def end_epoch(self, epoch: Epoch, is_best: bool) -> None:
        auc, logloss = epoch.val["auc"]["mean"], epoch.val["logloss"]["mean"]
        self._auc = _number(auc)
        self.message(
            f"epoch {epoch.epoch}/{self._epochs}  loss {epoch.train_loss:.4f}  "
            f"val AUC {_number(auc)}  val logloss {_number(logloss)}  "
            f"{epoch.seconds:.1f} s  {epoch.samples_per_second:,.0f} rows/s" + ("  best so far" if is_best else "")
        )


def make_console() -> Console:
    """A console on standard output that never wraps or colours what goes to a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def say(console: Console, text: str) -> None:
    """Print one line as it is; what looks like markup in a name stays."""
    console.print(text, markup=False, soft_wrap=True)
    console.file.flush()


def print_result(console: Console, result: Result, best_auc: Mapping[str, float | None] | None) -> None:
    """Print the table per (domain, task), and why a value is missing from it.

    Args:
        console: see `make_console`.
        result: what the trainer returned.
        best_auc: the best test AUC that any model can reach, by "<domain>/<task>" and "mean"; None
            if unknown.
    """
    plain = not console.is_terminal
    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    for name in ("domain", "task"):
        table.add_column(name, no_wrap=plain)
    numbers = ["test rows", "positive", "val AUC", "test AUC", "test logloss"]
    if best_auc is not None:
        numbers.insert(4, "best possible")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=plain)
    for val, test in zip(result.val.pairs, result.test.pairs, strict=True):
        share = f"{test.positives / test.rows:.1%}" if test.rows else _UNDEFINED
        aucs = [_value(val.auc), _value(test.auc)]
        if best_auc is not None:
            aucs.append(_number(best_auc.get(test.name)))
        table.add_row(Text(test.domain), Text(test.task), f"{test.rows:,}", share, *aucs, _value(test.logloss))
    table.add_section()
    means = [_number(result.val.mean_auc), _number(result.test.mean_auc)]
    if best_auc is not None:
        means.append(_number(best_auc.get("mean")))
    table.add_row("mean", "", "", "", *means, _number(result.test.mean_logloss))
    if plain:
        _print_without_padding(console, table)
    else:
        console.print(table)
    for part, scores in (("val", result.val), ("test", result.test)):
        for line in _undefined(part, scores):
            say(console, line)


def _undefined(part: str, scores: Scores) -> list[str]:
    return [f"undefined: {part} {line}" for line in scores.undefined()]


def _print_without_padding(console: Console, table: Table) -> None:
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        if line.strip():
            say(console, line.strip())


def _value(measure: Measure) -> str:
    return _number(measure.value)


def _number(value: float | None) -> str:
    return _UNDEFINED if value is None else f"{value:.4f}"
