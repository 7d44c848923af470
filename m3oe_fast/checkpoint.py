"""One checkpoint file: written atomically, read without executing code.

Keys: "format" (int), "model" (its name; m3oe where it is missing), "config" (its configuration as a dict), "weights"
(state_dict), "encoder" (dict or None: vocabularies, scalers, domain map), "trainer" (dict or None: what a resumed run
needs).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from m3oe_fast.atomic import replacing
from m3oe_fast.errors import CheckpointError

if TYPE_CHECKING:
    from m3oe_fast.data import Encoder

FILE_NAME = "model.pt"
FORMAT = 1
# What torch.load was seen to raise on files with flipped, cut or foreign bytes.
_DAMAGE = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, RuntimeError),
    *(ValueError, LookupError, AttributeError, TypeError),
)
_KEYS = {"format", "config", "weights", "encoder", "trainer"}


def locate(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file behind a run folder (its best), a checkpoint folder, or the file itself.

    Raises:
        CheckpointError: nothing there.
    """
    path = Path(path)
    candidates = [path, path / FILE_NAME, path / "checkpoints" / "best" / FILE_NAME]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(
        f"no checkpoint at {path}: expected {FILE_NAME}, a folder that holds it, or a run folder with checkpoints/best"
    )


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint (see `locate` for what `path` may be).

    Raises:
        CheckpointError: missing, damaged, not ours, or written by a newer version.
    """
    file = locate(path)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        reason = str(error).split("\n", 1)[0].split(". ", 1)[0]  # torch explains itself for half a page
        raise CheckpointError(
            f"{file} is damaged or not a checkpoint of m3oe_fast ({reason}); use another one"
        ) from error
    if not isinstance(content, dict) or not set(content) >= _KEYS:
        raise CheckpointError(
            f"{file} is not a checkpoint of m3oe_fast; for published checkpoints see m3oe_fast.interop"
        )
    if content["format"] != FORMAT:
        raise CheckpointError(f"{file} has format {content['format']}, this version reads {FORMAT}; update m3oe_fast")
    return content


def model_name(content: dict[str, Any]) -> str:
    """The kind of model a checkpoint holds."""
    return content.get("model", "m3oe")


def encoder_of(content: dict[str, Any], path: str | os.PathLike[str]) -> Encoder | None:
    """The vocabularies in what ``read(path)`` gave.

    Raises:
        CheckpointError: they do not fit this version.
    """
    if content["encoder"] is None:
        return None
    from m3oe_fast.data import Encoder  # scoring prepared rows needs no pandas

    try:
        return Encoder.from_dict(content["encoder"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds vocabularies this version cannot read ({error!r})") from error


def write(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write a checkpoint file; a reader sees the old file or the whole new one, also after a crash.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    path = Path(path)
    cause: list[OSError] = []
    try:
        with replacing(path) as stream:
            torch.save({"format": FORMAT, **content}, _Watched(stream, cause))
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch.save hides that as well
            raise error.__context__ from None
        reason = cause[0] if cause else error
        raise CheckpointError(f"cannot write {path}: {getattr(reason, 'strerror', None) or reason}") from error


class _Watched:
    """A stream that remembers why it could not be written: torch.save raises an error of its own that does not say."""

    def __init__(self, stream: BinaryIO, cause: list[OSError]) -> None:
        self._stream = stream
        self._cause = cause

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self._cause.append(error)
            raise

    def flush(self) -> None:
        self._stream.flush()
