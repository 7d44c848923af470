"""What a person sees of a download: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from m3oe_fast.data.catalogue import readable_size
from m3oe_fast.training.console import say

LINE_SECONDS = 10.0


class TransferDisplay:
    """Shows how many bytes of a file are there.

    Args:
        console: where to write.
        name: of the file.
        size: its bytes.
        line_seconds: between two lines where there is no terminal for a bar.
    """

    def __init__(self, console: Console, name: str, size: int, line_seconds: float = LINE_SECONDS) -> None:
        self._console, self._name, self._size, self._between = console, name, size, line_seconds
        self._next_line = time.perf_counter() + line_seconds
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=size, visible=False)
        self._begun = False

    def __enter__(self) -> TransferDisplay:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def report(self, done: int) -> None:
        """``done`` bytes are there."""
        if not self._begun:  # an earlier download's bytes tell nothing of the speed
            self._bar.reset(self._task, completed=done, visible=True)
            self._begun = True
        self._bar.update(self._task, completed=done)
        now = time.perf_counter()
        if self._bar.disable and now >= self._next_line:
            self._next_line = now + self._between
            say(
                self._console,
                f"{self._name}  {done / self._size:.0%}  {readable_size(done)} of {readable_size(self._size)}",
            )

    def tell(self, text: str) -> None:
        """Something a person should know, one line."""
        say(self._console, text)
