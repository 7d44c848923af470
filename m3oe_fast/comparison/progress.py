"""What a person sees while a table is made: one bar on a terminal, and everywhere a line per run."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from m3oe_fast.comparison.plan import Outcome, Run
from m3oe_fast.training.console import REFRESH_SECONDS, duration, say

MOST_SHOWN = 2
"""Runs at work that the bar names."""


class ComparisonDisplay:
    """Counts runs and guesses what is left from those that it has seen end.

    Args:
        console: where to write.
        size: runs of the whole table.
        jobs: runs at a time.
    """

    def __init__(self, console: Console, size: int, jobs: int) -> None:
        self._console, self._size, self._jobs = console, size, jobs
        self._kept = self._done = self._failed = 0
        self._seconds = 0.0
        self._bar = Progress(
            TextColumn("runs"),
            BarColumn(bar_width=None),
            TextColumn(
                "{task.completed}/{task.total}  {task.fields[counts]}  left {task.fields[left]}  {task.fields[who]}"
            ),
            console=console,
            refresh_per_second=1 / REFRESH_SECONDS,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=size, counts="", left="-", who="")

    def __enter__(self) -> ComparisonDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def ended_runs(self) -> int:
        """Runs with a result and failed ones, those of earlier commands included."""
        return self._kept + self._done + self._failed

    def message(self, text: str) -> None:
        """Something a person should know, one line."""
        say(self._console, text)

    def kept(self) -> None:
        """A run was finished before."""
        self._kept += 1

    def at_work(self, runs: Sequence[Run]) -> None:
        """These runs are being trained."""
        if self._bar.disable:
            return
        names = [f"{run.row.model} {run.row.form}" for run in runs[:MOST_SHOWN]]
        who = ", ".join([*names, "..."] if len(runs) > MOST_SHOWN else names)
        counts = f"{len(runs)} running" + (f"  {self._failed} failed" if self._failed else "")
        self._bar.update(self._task, completed=self.ended_runs, counts=counts, left=self._left(), who=who)

    def ended(self, run: Run, outcome: Outcome, seconds: float) -> None:
        """A run has ended after so many seconds."""
        if outcome.metrics is None:
            self._failed += 1
            said = f"failed: {outcome.reason}"
        else:
            self._done += 1
            self._seconds += seconds
            said = f"val AUC {_auc(outcome, 'val')}  test AUC {_auc(outcome, 'test')}"
        self.message(
            f"run {self.ended_runs}/{self._size}  {run.label}  {said}  {duration(seconds)}  left {self._left()}"
        )

    def _left(self) -> str:
        if not self._done:
            return "-"
        return duration(self._seconds / self._done * (self._size - self.ended_runs) / self._jobs)


def _auc(outcome: Outcome, part: str) -> str:
    value = outcome.metrics[part]["auc"]["mean"]
    return "-" if value is None else f"{value:.4f}"
