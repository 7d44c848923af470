"""A command of this folder in a process of its own: with its own allocator settings, or with memory that nothing else
has touched."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gate import GateError
from m3oe_fast.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The document that `python -m module arguments` keeps; its progress goes to this process's stderr.

    Raises:
        GateError: the child's gate refused a contender; the child has said which.
        UserError: the child failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, *arguments, "--json", str(path)]
        status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
        if status == 1 and not path.exists():
            raise GateError(f"{module} {' '.join(arguments)}, for the reason above")
        if status:
            raise UserError(f"{module} {' '.join(arguments)} ended with exit status {status}")
        return json.loads(path.read_text(encoding="utf-8"))
