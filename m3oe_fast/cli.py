"""What every ``python -m m3oe_fast.<command>`` shares: errors as one line, exit codes, Ctrl-C.

Exit codes: 0 done, 2 the user's input is wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from m3oe_fast.errors import UserError


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """Run ``main(argv)`` as a command and exit with its status.

    Args:
        main: takes the arguments after the command's name, returns the exit status.
    """
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        # The reader (head, less) went away; a second failure at interpreter exit would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)
