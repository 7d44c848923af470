"""Finds and loads what lies outside the Python sources: the compiled module `_C` and the folder `kernels/`.

`_C` registers the torch ops in the namespace `m3oe_fast`. It lies beside this file, both where the package is installed
and in the source folder after `pip install .` (the build leaves a copy there, since `python -m` in the clone's root
imports the source folder, not the installed one).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from m3oe_fast.errors import BackendError

REMEDY = "run `pip install .` in the source folder (needs a C++20 compiler, for example g++ 11)"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    import torch  # noqa: F401  (its libraries must be in the process before ours)

    from m3oe_fast import __version__

    try:
        module = importlib.import_module("m3oe_fast._C")
    except ModuleNotFoundError as error:
        if error.name != "m3oe_fast._C":
            raise
        return None, f"the compiled kernels are not built: {REMEDY}"
    except ImportError as error:
        return None, f"the compiled kernels do not load ({error}): {REMEDY}"
    if module.version != __version__:
        return None, f"the compiled kernels are of version {module.version}, the sources of {__version__}: {REMEDY}"
    try:
        module.cpu_isa()
    except RuntimeError as error:  # M3OE_FAST_CPU_ISA names a set that cannot run here
        return None, str(error)
    return module, ""


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


def find_kernels() -> None:
    """Makes `m3oe_fast.kernels` importable in a source folder, where it lies beside the package, not in it."""
    package = Path(__file__).parent
    beside = package.parent / "kernels"
    if (package / "kernels").is_dir() or not (beside / "__init__.py").is_file():
        return
    name = "m3oe_fast.kernels"
    spec = importlib.util.spec_from_file_location(
        name, beside / "__init__.py", submodule_search_locations=[str(beside)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
