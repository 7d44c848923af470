"""Finds and loads the compiled module `_C`, which registers the torch ops in the namespace `m3oe_fast`.

`_C` lies beside this file, both where the package is installed and in the source folder after `pip install .`
(the build leaves a copy there, since `python -m` in the clone's root imports the source folder).
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from m3oe_fast.errors import BackendError

REMEDY = "run `pip install .` in the source folder (needs a C++20 compiler, for example g++ 11 or newer)"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    import torch  # noqa: F401  (its libraries must be in the process before ours)

    try:
        return importlib.import_module("m3oe_fast._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "m3oe_fast._C":
            raise
        return None, f"the compiled kernels are not built: {REMEDY}"
    except ImportError as error:
        return None, f"the compiled kernels do not load ({error}): {REMEDY}"


def reasons_missing() -> list[str]:
    """Why the compiled module cannot be used; empty if it can."""
    module, reason = _load()
    return [] if module is not None else [reason]


def load() -> ModuleType:
    """The compiled module.

    Raises:
        BackendError: not built, or built for another Python or torch; says what to do.
    """
    module, reason = _load()
    if module is None:
        raise BackendError(reason)
    return module
