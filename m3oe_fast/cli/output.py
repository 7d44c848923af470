"""The file a command writes besides what it prints: checked before the work begins, whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from m3oe_fast.atomic import replacing
from m3oe_fast.errors import ConfigError
from m3oe_fast.training.run_folder import write_text


def check_output(option: str, path: Path, *, overwrite: bool) -> None:
    """Make sure that a file can be written; leaves no trace.

    Args:
        option: that named it, for messages.
        path: the file.
        overwrite: whether it may be there already.

    Raises:
        ConfigError: it is there, it is a folder, or its folder cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"--{option} {path} is a folder; name a file")
    if not overwrite and os.path.lexists(path):
        raise ConfigError(f"--{option} {path} is there already; name another file, or add --overwrite")
    try:
        with contextlib.suppress(_Undone), writing(path):
            raise _Undone
    except OSError as error:
        raise ConfigError(f"cannot write --{option} {path} ({error.strerror or error}); name another file") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """As ``atomic.replacing``; besides, after an error the folders are gone that it had to make.

    Raises:
        OSError: the folder cannot be written or the disk is full.
    """
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        with replacing(path) as stream:
            yield stream
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON.

    Raises:
        UserError: the folder cannot be written or the disk is full; an old file is untouched.
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


class _Undone(Exception):
    """Ends the writing of a file that is not to stay."""
