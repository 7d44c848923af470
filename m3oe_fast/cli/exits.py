"""How a command ends: errors and warnings as one line, exit codes, Ctrl-C.

Exit codes: 0 done, 2 the user's input is wrong or a file or device refused, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from m3oe_fast.errors import UserError


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main(argv)`` as a command and exit with its status.

    Args:
        main: takes the arguments after the command's name, returns the exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        # Names from a log or a path need not fit the terminal's encoding.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = _one_line
    try:
        status = _status_of(main)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader (head, less) went away.
        status = 0
    except OSError as error:
        _complain(error)
        status = 2
    # The interpreter is on its way out: a second Ctrl-C could only print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _let_go_of_stdout()
    sys.exit(status)


def _status_of(main: Callable[[list[str]], int]) -> int | str | None:
    try:
        return main(sys.argv[1:])
    except SystemExit as done:  # --help
        return done.code


_as_python_has_it = warnings.formatwarning


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning meant for the user as one line, like errors; others with the place in the source."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _as_python_has_it(message, category, filename, lineno, line)


def _complain(error: OSError) -> None:
    named = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    with contextlib.suppress(OSError):
        print(f"error: {named}{error.strerror or error}", file=sys.stderr)


def _let_go_of_stdout() -> None:
    """Write out what is left, or drop it: a failure at interpreter exit would print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
