"""The prepared folder: an Arrow IPC file per part, JSON for the rest, a manifest over all.

    {train,val,test}.arrow   one or more record batches ("segments"), uncompressed so that they can be
                             memory-mapped; each but the last has SEGMENT_ROWS rows:
                             "id:<field>" uint8/16/32 (the smallest that holds the vocabulary),
                             "dense" float32 [C], "domain" uint8/16, "label" float32 [T], and where the
                             log has them "bag:<name>" list of uint32, "weight" float32,
                             "user" int64 (whom the row is about, -1 unknown; no model sees it)
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
import mmap
import os
import re
import secrets
import shutil
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa

from m3oe_fast.errors import DataError

FORMAT = "m3oe_fast data 3"
MANIFEST = "manifest.json"
ENCODER = "encoder.json"
DATASET = "dataset.json"
PARTS = ("train", "val", "test")
SEGMENT_ROWS = 1 << 21  # bounds the memory that writing takes; a multiple of what a reader reads at a time
STALE_SECONDS = 3600  # a build takes minutes
_HIDDEN = re.compile(r"\..+\.[0-9a-f]{16}")
FILES = {MANIFEST, ENCODER, DATASET, *(f"{part}.arrow" for part in PARTS)}


Column: TypeAlias = np.ndarray | tuple[np.ndarray, np.ndarray]
Columns: TypeAlias = dict[str, Column]


class Damaged(Exception):
    """A prepared folder is not as it was written; the message says which file and why."""


def smallest_uint(size: int) -> np.dtype:
    """The smallest unsigned type that holds 0 .. size-1."""
    return np.min_scalar_type(max(size - 1, 0))


class PartWriter:
    """Writes the file of one part, rows in order, in the memory of one segment.

        with PartWriter(folder / "train.arrow") as writer:
            for chunk in chunks:
                writer.append(chunk)

    A ``with`` block that an exception leaves removes the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._file: BinaryIO | None = None
        self._writer: pa.RecordBatchFileWriter | None = None
        self._pending: list[Columns] = []
        self._rows = 0
        self._shape: dict[str, object] | None = None

    def __enter__(self) -> PartWriter:
        self._file = self._path.open("wb")  # not a file of Arrow, whose errors hide the system's
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
            self._file.close()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def append(self, columns: Columns) -> None:
        """Add n >= 0 rows; call it at least once, if need be with no rows.

        Args:
            columns: the same names, dtypes and widths each time. [n], or [n,width], where a width of 0 leaves the
                column out; for a bag (values [m], offsets [n+1]). The arrays are kept until they are written: do not
                write to them afterwards.

        Raises:
            ValueError: the columns differ in length, or from those before.
            DataError: a segment of a bag has more values than an Arrow list can hold.
            OSError: the file cannot be written.
        """
        columns = {name: column for name, column in columns.items() if not _is_empty(column)}
        shape = {name: _shape_of(column) for name, column in columns.items()}
        if self._shape is None:
            self._shape = shape
        if shape != self._shape or not shape:
            raise ValueError(f"{self._path}: columns {shape}, expected {self._shape}")
        lengths = {name: rows_of(column) for name, column in columns.items()}
        rows = next(iter(lengths.values()))
        if set(lengths.values()) != {rows}:
            raise ValueError(f"{self._path}: columns of different lengths {lengths}")
        start = 0
        while self._rows + rows - start >= SEGMENT_ROWS:
            stop = start + SEGMENT_ROWS - self._rows
            self._pending.append(slice_columns(columns, start, stop))
            self._write_segment()
            start = stop
        if start < rows or (not self._pending and self._writer is None):
            self._pending.append(slice_columns(columns, start, rows))
            self._rows += rows - start

    def _finish(self) -> None:
        if self._shape is None:
            raise ValueError(f"{self._path}: nothing was appended")
        if self._rows or self._writer is None:
            self._write_segment()
        self._writer.close()

    def _write_segment(self) -> None:
        arrays = {}
        for name in self._shape:
            arrays[name] = self._to_arrow(name, [columns.pop(name) for columns in self._pending])
        self._pending, self._rows = [], 0
        batch = pa.record_batch(arrays)
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)

    def _to_arrow(self, name: str, pieces: list[Column]) -> pa.Array:
        if not isinstance(pieces[0], tuple):
            column = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            flat = pa.array(np.ascontiguousarray(column).reshape(-1))
            return flat if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
        values = np.concatenate([values[offsets[0] : offsets[-1]] for values, offsets in pieces]).astype(np.uint32)
        if len(values) > np.iinfo(np.int32).max:
            raise DataError(f"{self._path}, {name}: {len(values):,} values in one segment; shorten the longest lists")
        lengths = np.concatenate([np.diff(offsets) for _, offsets in pieces])
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    def _discard(self) -> None:
        with suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)


class PartFile:
    """A part's file, opened: mapped columns, and a way to read them that leaves no trace in memory.

    Attributes:
        path: the file.
        segments: the columns of each segment, read-only views of the mapped file; a bag is (values uint32 [m],
            offsets int32 [n+1]). What is read through them stays resident until the system needs the memory.

    Raises:
        Damaged: the file is no Arrow file of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            # A mapping of our own: Arrow does not tell where in the file its buffers lie.
            mapping = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
            reader = pa.ipc.open_file(pa.py_buffer(mapping))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
            names = reader.schema.names
            self.segments: tuple[Columns, ...] = tuple(
                {name: _to_numpy(batch.column(name)) for name in names} for batch in batches
            )
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Damaged(f"{path}: {str(error).splitlines()[0]}") from error
        if not self.segments:
            raise Damaged(f"{path}: holds no rows, not even none of each column")
        self._descriptor = descriptor
        self._start = np.frombuffer(mapping, np.uint8).ctypes.data
        self._bytes = len(mapping)

    def copyto(self, out: np.ndarray, view: np.ndarray) -> None:
        """Copy ``view``, contiguous rows of a column of ``segments``, to ``out`` of the same shape and dtype.

        As ``np.copyto``, but past the mapping, so that the file does not become resident.

        Raises:
            ValueError: ``view`` is something else, or ``out`` differs from it.
            DataError: the file has become shorter.
        """
        if not view.nbytes:
            return
        position = view.ctypes.data - self._start
        if not 0 <= position <= self._bytes - view.nbytes or not view.flags.c_contiguous:
            raise ValueError(f"{self.path}: view {view.dtype} {view.shape} is no consecutive part of the file")
        if out.dtype != view.dtype or out.shape != view.shape:
            raise ValueError(f"{self.path}: out is {out.dtype} {out.shape}, view {view.dtype} {view.shape}")
        target = memoryview(out).cast("B")
        while target:
            count = os.preadv(self._descriptor, [target], position)
            if not count:
                raise DataError(f"{self.path}: shorter than when it was opened; prepare the log again")
            target, position = target[count:], position + count


def rows_of(column: Column) -> int:
    """The rows of a column."""
    return len(column[1]) - 1 if isinstance(column, tuple) else len(column)


def slice_columns(columns: Columns, start: int, stop: int) -> Columns:
    """The rows start .. stop-1, as views."""
    return {
        name: (column[0], column[1][start : stop + 1]) if isinstance(column, tuple) else column[start:stop]
        for name, column in columns.items()
    }


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


def _shape_of(column: Column) -> object:
    """What two pieces of one column have in common."""
    return "bag" if isinstance(column, tuple) else (column.dtype.str, column.shape[1:])


def _is_empty(column: Column) -> bool:
    return not isinstance(column, tuple) and column.shape[1:] == (0,)


def _to_numpy(column: pa.Array) -> Column:
    if isinstance(column, pa.FixedSizeListArray):
        return column.values.to_numpy().reshape(len(column), column.type.list_size)
    if isinstance(column, pa.ListArray):
        return column.values.to_numpy(), column.offsets.to_numpy()
    return column.to_numpy()
