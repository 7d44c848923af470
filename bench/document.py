"""The JSON document of a run: what was measured, where, and with which settings."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import environment, machine

FORMAT = 1


def header(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The part every document has; `kind` is the command's name."""
    return {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "environment": environment.record(),
        "settings": settings,
    }


def write(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Write a document in one piece; a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
