"""Where the torch to build against lies, without importing it."""

from __future__ import annotations

import importlib.util
import re
import sysconfig
from pathlib import Path

OLDEST = (2, 10)


def find_torch() -> Path | None:
    """The folder of a new enough torch, in this environment or, under build isolation, in the installing one."""
    candidates = [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        candidates.append(Path(spec.origin).parent)
    return next((folder for folder in candidates if _new_enough(folder)), None)


def _new_enough(folder: Path) -> bool:
    version = folder / "version.py"
    if not version.is_file() or not (folder / "include" / "torch" / "csrc" / "stable").is_dir():
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text())
    return found is not None and tuple(map(int, found.groups())) >= OLDEST
