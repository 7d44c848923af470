"""What a person sees of a training run: a bar or plain lines, and the end table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from m3oe_fast.metrics import Scores
    from m3oe_fast.training.trainer import Epoch, Result

REFRESH_SECONDS = 0.25
LINE_SECONDS = 30.0
"""Between two lines of one epoch where there is no terminal for a bar."""
PLAIN_WIDTH = 500
"""Width of what is not a terminal: lines in a log file must not be wrapped or cut."""
MOST_PAIRS = 60
"""Rows of the end table; a log of hundreds of domains has the rest in metrics.json."""

_UNDEFINED = "-"
_EXTRA = {"GAUC": "gauc", "calib.": "calibration"}  # headings and the names of metrics.json


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

    def begin_epoch(self, epoch: int, epochs: int, rows: int, done: int = 0) -> None:
        """Epoch ``epoch`` (from 1) of at most ``epochs`` begins; it has ``rows`` rows.

        A run that goes on inside an epoch has ``done`` of them behind it.
        """

    def advance(self, done: int, mean_loss: Callable[[], float]) -> None:
        """``done`` rows of the epoch are through; calling ``mean_loss`` may wait for the device."""

    def end_epoch(self, epoch: Epoch, is_best: bool) -> None:
        """The epoch is finished and written."""


class ConsoleDisplay(Display):
    """On a terminal a bar with rows/s, ETA, loss and validation AUC; elsewhere a line now and then, and one per epoch.

    Args:
        console: where to write; by default standard output.
        line_seconds: between two lines of one epoch where there is no bar.
    """

    def __init__(self, console: Console | None = None, line_seconds: float = LINE_SECONDS) -> None:
        self._console = console or make_console()
        self._between = REFRESH_SECONDS if self._console.is_terminal else line_seconds
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._epochs = self._rows = self._skipped = 0
        self._auc = _UNDEFINED
        self._next_refresh = 0.0
        self._started = 0.0

    def __enter__(self) -> ConsoleDisplay:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]} rows/s  left {task.fields[left]}"),
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

    def begin_epoch(self, epoch: int, epochs: int, rows: int, done: int = 0) -> None:
        self._label, self._epochs, self._rows, self._skipped = f"epoch {epoch}/{epochs}", epochs, rows, done
        self._started = time.perf_counter()
        # The first bar at once; a first line after a while, as short epochs need none.
        self._next_refresh = self._started + (self._between if self._bar is None else 0.0)
        if self._bar is None:
            return
        if self._task is not None:
            self._bar.remove_task(self._task)
        unknown = dict.fromkeys(("rate", "left", "loss"), _UNDEFINED)
        self._task = self._bar.add_task(self._label, total=rows, completed=done, auc=self._auc, **unknown)

    def advance(self, done: int, mean_loss: Callable[[], float]) -> None:
        now = time.perf_counter()
        finished = done >= self._rows
        if now < self._next_refresh and not (finished and self._bar is not None):
            return
        self._next_refresh = now + self._between
        rate = (done - self._skipped) / max(now - self._started, 1e-9)
        left = duration((self._rows - done) / rate) if rate > 0 else _UNDEFINED
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:,.0f}", left=left, loss=f"{mean_loss():.4f}")
        elif not finished:
            share = f"{done / self._rows:.0%}"
            self.message(f"{self._label}  {share}  loss {mean_loss():.4f}  {rate:,.0f} rows/s  left {left}")

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


def print_table(console: Console, table: Table) -> None:
    """Print a table; a file or a pipe gets no padding and no empty lines."""
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        if line.strip():
            say(console, line.strip())


def print_result(console: Console, result: Result, best_auc: Mapping[str, float | None] | None) -> None:
    """Print the table of a run per (domain, task), and why a value is missing from it.

    Args:
        console: see `make_console`.
        result: what the trainer returned.
        best_auc: as for `print_scores`.
    """
    say(console, "scores on the test rows with the weights of the best epoch; val AUC: on the validation rows")
    print_scores(console, "test", result.test, best_auc, result.val)


def print_scores(
    console: Console,
    part: str,
    scores: Scores,
    best_auc: Mapping[str, float | None] | None = None,
    val: Scores | None = None,
) -> None:
    """Print a table per (domain, task), and why a value is missing from it.

    GAUC, calibration, and a task's scores over all domains have their places where one of them is defined. With names
    of usual length the table fits 100 columns.

    Args:
        console: see `make_console`.
        part: what was scored, in a word.
        scores: its scores.
        best_auc: the best AUC that any model can reach on it, by "<domain>/<task>" and "mean"; None if unknown.
        val: the scores of the validation rows, for a column of their own.
    """
    plain = not console.is_terminal
    columns = _columns(scores, best_auc, val)
    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    for name in ("domain", "task"):
        table.add_column(name, no_wrap=plain)
    for name in ("rows", "pos.", *columns):
        table.add_column(name, justify="right", no_wrap=plain)
    pairs = scores.pairs
    for pair in pairs[:MOST_PAIRS]:
        values = [_number(values.get(pair.name)) for values in columns.values()]
        table.add_row(Text(pair.domain), Text(pair.task), f"{pair.rows:,}", _share(pair.positives, pair.rows), *values)
    table.add_section()
    for task, values in _over_all_domains(scores, columns, val).items():
        own = [pair for pair in pairs if pair.task == task]
        rows, positives = sum(pair.rows for pair in own), sum(pair.positives for pair in own)
        table.add_row("overall", Text(task), f"{rows:,}", _share(positives, rows), *values)
    table.add_row("mean", "", "", "", *(_number(values.get("mean")) for values in columns.values()))
    print_table(console, table)
    if len(pairs) > MOST_PAIRS:
        say(console, f"{len(pairs) - MOST_PAIRS} more pairs are in the means and not in the table")
    for metric, how in scores.approximate.items():
        say(console, f"approximate: {part} {metric} {how}")
    missing = [] if val is None else _undefined("val", val)
    missing += _undefined(part, scores)
    for line in missing[:MOST_PAIRS]:
        say(console, line)
    if len(missing) > MOST_PAIRS:
        say(console, f"{len(missing) - MOST_PAIRS} more values are undefined")


def _columns(
    scores: Scores, best_auc: Mapping[str, float | None] | None, val: Scores | None
) -> dict[str, Mapping[str, float | None]]:
    """The numbers of the table: heading to values by "<domain>/<task>" and "mean"."""
    measured = scores.to_dict()
    columns = {} if val is None else {"val AUC": val.to_dict()["auc"]}
    columns["AUC"] = measured["auc"]
    if best_auc is not None:
        columns["best"] = best_auc
    columns["logloss"] = measured["logloss"]
    for name, metric in _EXTRA.items():
        if any(value is not None for value in measured.get(metric, {}).values()):
            columns[name] = measured[metric]
    return columns


def _over_all_domains(scores: Scores, columns: Mapping[str, Any], val: Scores | None) -> dict[str, list[str]]:
    """The cells of each task's scores over all domains; nothing for one domain, or where none is defined."""
    if len({pair.domain for pair in scores.pairs}) < 2:
        return {}
    overall = scores.to_dict().get("overall", {})
    by_heading = {"AUC": overall.get("auc", {}), "logloss": overall.get("logloss", {})}
    by_heading |= {name: overall.get(metric, {}) for name, metric in _EXTRA.items()}
    by_heading["val AUC"] = {} if val is None else val.to_dict().get("overall", {}).get("auc", {})
    rows = {}
    for task in dict.fromkeys(pair.task for pair in scores.pairs):
        values = [by_heading.get(heading, {}).get(task) for heading in columns]
        if any(value is not None for value in values):
            rows[task] = [_number(value) for value in values]
    return rows


def _undefined(part: str, scores: Scores) -> list[str]:
    return [f"undefined: {part} {line}" for line in scores.undefined()]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else _UNDEFINED


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _number(value: float | None) -> str:
    return _UNDEFINED if value is None else f"{value:.4f}"
