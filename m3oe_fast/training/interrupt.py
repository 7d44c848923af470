"""Ctrl-C and SIGTERM as a wish that is granted between two steps, where the state of a run is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Hears of Ctrl-C and of SIGTERM, which a scheduler sends before it kills.

    Attributes:
        requested: whether the run shall end after the step that it is in.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals meanwhile. The second one raises KeyboardInterrupt at once.

        Outside the main thread Python delivers none, and nothing is changed.
        """
        self.requested = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # Who started the process in the background may have had it ignore Ctrl-C.
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._hear) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                # A handler that was not set from Python cannot be set back.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
