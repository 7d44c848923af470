"""Files that are whole or not there: written under another name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content replaces `path` when the block ends; after an error the old file is untouched.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    # Not mkstemp: its files are readable by their owner only, and a run folder is often shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what writers of `path` left that were killed half-way."""
    for stale in path.parent.iterdir():
        stem, _, writer = stale.name.rpartition(".")
        if stem == f".{path.name}" and writer.isdecimal() and not _is_alive(int(writer)):
            stale.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return True
