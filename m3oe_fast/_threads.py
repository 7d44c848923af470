"""How threads wait in the package's own commands: asleep, not spinning.

libgomp reads the environment when it is loaded, which the first ``import torch`` does. Nothing here may import torch.
"""

from __future__ import annotations

import os
import re
import sys

WAIT_POLICY, SPIN_COUNT = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"

chosen = False
"""Whether `wait_asleep` set the policy of this process."""


def wait_asleep() -> None:
    """Let waiting threads sleep if this process is a command of the package and nobody has chosen otherwise.

    A thread that spins holds a core that another program, or its own team, could use. On idle cores sleeping costs
    little, so it is the better default; but a program that imports the package decides for itself.
    """
    global chosen
    if _is_own_command() and "torch" not in sys.modules and not {WAIT_POLICY, SPIN_COUNT} & os.environ.keys():
        os.environ[WAIT_POLICY] = "PASSIVE"
        chosen = True


def _is_own_command() -> bool:
    """Whether this is ``python -m m3oe_fast.<command>``, at the time when ``-m`` looks for the module.

    That imports the package first, with a sys.argv of "-m" and the arguments behind the module's name. The name itself
    is in sys.orig_argv only: as a word, or at the end of one such as -mNAME or -umNAME.
    """
    if sys.argv[:1] != ["-m"]:
        return False
    word = "".join(sys.orig_argv[-len(sys.argv) :][:1])
    return re.fullmatch(r"(-\w*?m)?m3oe_fast(\.\w+)+", word) is not None
