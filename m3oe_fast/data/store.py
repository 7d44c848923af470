"""The prepared folder: an Arrow IPC file per part, JSON for the rest, a manifest over all.

    {train,val,test}.arrow   one record batch, uncompressed so that it can be memory-mapped:
                             "id:<field>" uint8/16/32 (the smallest that holds the vocabulary),
                             "dense" float32 [C], "domain" uint8/16, "label" float32 [T]
    encoder.json             Encoder.to_dict()
    dataset.json             the facts of Dataset: split, counts, best AUC, warnings
    manifest.json            written last: format, and size and digest of every other file

A folder without a manifest, or with a file that differs from it, is damaged. ``publish`` makes a
folder appear under its final name only when it is complete, whatever other processes do meanwhile.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from m3oe_fast.errors import DataError

FORMAT = "m3oe_fast data 2"
MANIFEST = "manifest.json"
ENCODER = "encoder.json"
DATASET = "dataset.json"
PARTS = ("train", "val", "test")
STALE_SECONDS = 3600  # a build takes minutes
_HIDDEN = re.compile(r"\..+\.[0-9a-f]{16}")
FILES = {MANIFEST, ENCODER, DATASET, *(f"{part}.arrow" for part in PARTS)}


class Damaged(Exception):
    """A prepared folder is not as it was written; the message says which file and why."""


def smallest_uint(size: int) -> np.dtype:
    """The smallest unsigned type that holds 0 .. size-1."""
    return np.min_scalar_type(max(size - 1, 0))


def write_part(path: Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns, [N] or [N,width], as one record batch; a column of width 0 is left out."""
    arrays = {name: _to_arrow(column) for name, column in columns.items() if column.size or column.ndim == 1}
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


def read_part(path: Path) -> dict[str, np.ndarray]:
    """The columns of ``write_part`` as read-only views of the mapped file.

    Raises:
        Damaged: the file is no Arrow file of ours.
    """
    try:
        with pa.memory_map(str(path)) as file:
            batch = pa.ipc.open_file(file).get_batch(0)
    except (pa.ArrowInvalid, OSError) as error:
        raise Damaged(f"{path}: {str(error).splitlines()[0]}") from error
    return {name: _to_numpy(batch.column(name)) for name in batch.schema.names}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write plain JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf8")


def read_json(path: Path) -> dict[str, Any]:
    """Read plain JSON.

    Raises:
        Damaged: no such file, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{path}: no JSON object")
    return value


def seal(folder: Path) -> None:
    """Write the manifest over every file in ``folder``."""
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def check(folder: Path) -> None:
    """Compare every file with the manifest; reads them all once.

    Raises:
        Damaged: something is missing or differs.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise Damaged(f"{folder / MANIFEST}: format {manifest.get('format')!r} is not {FORMAT!r}")
    files = manifest.get("files")
    if not isinstance(files, dict) or files.keys() != FILES - {MANIFEST}:
        raise Damaged(f"{folder / MANIFEST}: does not list the files of a prepared log")
    for name, wanted in files.items():
        try:
            found = _fingerprint(folder / name)
        except OSError as error:
            raise Damaged(f"{folder / name}: {error.strerror}") from error
        if found != wanted:
            raise Damaged(f"{folder / name}: differs from what was written")


def publish(folder: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` fill a temporary folder beside ``folder``, seal it, rename it to ``folder``.

    An intact prepared folder of that name is kept: another process was faster. A damaged one is
    replaced.

    Raises:
        DataError: the place cannot be written to, or holds files that are not ours.
    """
    folder = Path(os.path.realpath(folder))  # a link to a folder stays one
    temporary = _hidden_name(folder)
    try:
        if folder.is_dir() and not _replaceable(folder):
            raise DataError(f"{folder}: holds other files, which stay; choose another folder")
        temporary.mkdir(parents=True)
        _sweep(folder.parent)
        build(temporary)
        seal(temporary)
        _put(temporary, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}; choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
        return
    except OSError as error:
        # Not `folder.is_dir()`: another process may have moved the folder away since.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    try:
        check(folder)
    except Damaged:
        # Renaming is atomic: a reader sees the damaged folder, none, or the new one, no mixture.
        grave = _hidden_name(folder)
        with suppress(FileNotFoundError):  # another process has just moved it away
            os.rename(folder, grave)
        shutil.rmtree(grave, ignore_errors=True)
        _put(temporary, folder)


def _replaceable(folder: Path) -> bool:
    """Whether everything in the folder is called as our files are."""
    return {path.name for path in folder.iterdir()} <= FILES


def _hidden_name(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.{secrets.token_hex(8)}"


def _sweep(parent: Path) -> None:
    """Remove what killed processes left: hidden folders of our files that nobody has touched for an hour."""
    for path in parent.glob(".*"):
        with suppress(OSError):
            stale = time.time() - path.stat().st_mtime > STALE_SECONDS
            if stale and _HIDDEN.fullmatch(path.name) and not path.is_symlink() and _replaceable(path):
                shutil.rmtree(path, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = hashlib.blake2b(digest_size=20)
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _to_arrow(column: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(column).reshape(-1))
    return flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])


def _to_numpy(column: pa.Array) -> np.ndarray:
    if isinstance(column, pa.FixedSizeListArray):
        return column.values.to_numpy().reshape(len(column), column.type.list_size)
    return column.to_numpy()
