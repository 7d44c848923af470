"""Runs side by side, each a process of its own with its own memory, threads and log file.

A process holds a lock on its log as long as it lives, through the descriptor that it prints to. If the table is killed,
its runs live on; the next one finds their logs locked and waits for them, so that no run folder has two writers.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3oe_fast.comparison.folder import TableFolder
from m3oe_fast.comparison.plan import Outcome, Plan, Run
from m3oe_fast.comparison.progress import ComparisonDisplay
from m3oe_fast.errors import UserError
from m3oe_fast.training.interrupt import Interrupt

TRAIN = (sys.executable, "-m", "m3oe_fast.train")
"""The command of a run; its options come behind it."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 60.0
"""Given to interrupted runs, which end after the step that they are in and measure what they have."""


@dataclass
class _Process:
    """A run at work: a process of this table, or (None) one that an earlier table left behind."""

    started: float
    popen: subprocess.Popen[bytes] | None


class Workers:
    """Trains the runs of a plan that are not finished.

    Args:
        plan: the runs.
        folder: where they lie.
        words: the options of a run behind ``m3oe_fast.train``.
        result: the content of a finished run's metrics.json, else None.
        jobs: runs at a time.
        threads: of each run.
        display: hears of every run.
    """

    def __init__(
        self,
        plan: Plan,
        folder: TableFolder,
        words: Callable[[Run], Sequence[str]],
        result: Callable[[Run], Mapping[str, Any] | None],
        jobs: int,
        threads: int,
        display: ComparisonDisplay,
    ) -> None:
        self._plan, self._folder, self._words, self._result = plan, folder, words, result
        self._jobs, self._threads, self._display = jobs, threads, display
        self._running: dict[Run, _Process] = {}
        self.outcomes: dict[Run, Outcome] = {}

    def run(self) -> bool:
        """Train until every run has ended; returns False if Ctrl-C or SIGTERM ended it before.

        Afterwards ``outcomes`` has every run that has ended, those of earlier tables included.

        Raises:
            UserError: a log cannot be written, or a process cannot be started.
        """
        interrupt = Interrupt()
        try:
            with interrupt.listening():
                while not interrupt.requested:
                    self._fill()
                    if not self._running:
                        return True
                    self._display.at_work(list(self._running))
                    time.sleep(POLL_SECONDS)
                    self._reap()
                self._stop()
        except KeyboardInterrupt:  # a second Ctrl-C
            pass
        finally:
            self._kill()
        return False

    def _fill(self) -> None:
        """Take up what is left, as far as there is room."""
        before = -1
        while before != len(self.outcomes):  # a result can make further runs known
            before = len(self.outcomes)
            for run in self._plan.wanted(self.outcomes):
                if run not in self.outcomes and run not in self._running:
                    self._take_up(run)

    def _take_up(self, run: Run) -> None:
        if metrics := self._result(run):
            self.outcomes[run] = Outcome(metrics)
            self._display.kept()
        elif len(self._running) < self._jobs:
            self._running[run] = self._start(run)

    def _start(self, run: Run) -> _Process:
        log = self._folder.log(run)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"cannot write {log}: {error.strerror or error}") from error
        try:
            if not _lock(handle):
                self._display.message(f"waiting for {run.label}, which an earlier command left at work")
                return _Process(time.monotonic(), None)
            os.ftruncate(handle, 0)
            popen = subprocess.Popen(
                [*TRAIN, *self._words(run), f"--out={self._folder.run(run)}", "--resume=last"],
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
                # Ctrl-C reaches the table only, which then ends its runs once.
                start_new_session=True,
            )
        except OSError as error:
            raise UserError(f"cannot start {run.label}: {error.strerror or error}") from error
        finally:
            os.close(handle)
        return _Process(time.monotonic(), popen)

    def _reap(self) -> None:
        """Take note of the runs that have ended."""
        for run, process in list(self._running.items()):
            if process.popen is None:
                if _is_free(self._folder.log(run)):
                    del self._running[run]  # finished or not, it is taken up again
                continue
            status = process.popen.poll()
            if status is None:
                continue
            del self._running[run]
            metrics = self._result(run) if status == 0 else None
            reason = "" if metrics else _reason(status, self._folder.log(run))
            self.outcomes[run] = Outcome(metrics, reason)
            self._display.ended(run, self.outcomes[run], time.monotonic() - process.started)

    def _own(self) -> list[subprocess.Popen[bytes]]:
        return [process.popen for process in self._running.values() if process.popen is not None]

    def _stop(self) -> None:
        """Ask the runs to write their state and end, and wait for them."""
        own = self._own()
        self._display.message(f"stopping {len(own)} runs; Ctrl-C again to leave at once")
        for popen in own:
            popen.send_signal(signal.SIGTERM)  # whoever was started in the background may ignore SIGINT
        deadline = time.monotonic() + GRACE_SECONDS
        for popen in own:
            with suppress(subprocess.TimeoutExpired):
                popen.wait(max(0.0, deadline - time.monotonic()))

    def _kill(self) -> None:
        """Leave no process behind; files are replaced in one piece, so this costs a run at most its last steps."""
        for popen in self._own():
            popen.kill()
            popen.wait()


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_free(log: Path) -> bool:
    """Whether no process prints to the log any more."""
    try:
        handle = os.open(log, os.O_RDWR)
    except OSError:
        return True
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _reason(status: int, log: Path) -> str:
    """Why a run has no result, one line."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        lines = []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    if status == 0:
        return f"ended without a result; it last said: {last}"
    return last.removeprefix("error: ") or f"exit status {status}"
