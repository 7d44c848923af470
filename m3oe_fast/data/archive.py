"""A read-only folder or zip (a wheel is a zip) whose members are read by name.

Folder members are memory-mapped; zip members are unpacked in memory and checked against their CRC.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
import zlib
from pathlib import Path
from typing import Literal

import pyarrow as pa

from m3oe_fast.errors import DataError

MAX_DEPTH = 4  # levels of folders listed: enough for an unpacked wheel, bounded for a home folder


class Archive:
    """The files of one folder or zip.

    Args:
        path: an existing folder, zip or wheel.

    Raises:
        DataError: the path does not exist, cannot be read, or is a file that is no intact zip.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.expanduser(path))
        kind = kind_of(self.path)
        if kind is None:
            raise DataError(f"{self.path}: no such file or folder; check the path")
        self.is_folder = kind == "folder"
        self.names = _list_folder(self.path) if self.is_folder else _list_zip(self.path)

    def where(self, name: str) -> str:
        """How messages name a member."""
        return f"{self.path}/{name}" if self.is_folder else f"{self.path}!{name}"

    def find(self, file_name: str) -> str | None:
        """The one member with this file name, in any folder; None if there is none.

        Raises:
            DataError: several members have this name.
        """
        found = [name for name in self.names if name.rpartition("/")[2] == file_name]
        if len(found) > 1:
            raise DataError(
                f"{self.path}: holds {file_name} {len(found)} times ({', '.join(found)}); "
                "name the folder of the one you mean"
            )
        return found[0] if found else None

    def read(self, name: str) -> pa.Buffer:
        """The bytes of a member.

        Raises:
            DataError: the member cannot be read or fails its CRC.
        """
        try:
            if self.is_folder:
                return _map_file(self.path / name)
            with zipfile.ZipFile(self.path) as file:
                return pa.py_buffer(file.read(name))
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise DataError(f"{self.where(name)}: damaged in the archive ({error}); fetch the file again") from error
        except OSError as error:
            raise DataError(f"{self.where(name)}: cannot be read: {error.strerror or error}") from error

    def digest(self, names: list[str]) -> str:
        """Hash of the bytes that a reader of ``names`` sees: those files, or the whole zip."""
        total = hashlib.blake2b(digest_size=20)
        if not self.is_folder:
            names = []
            total.update(_map_file(self.path))
        for name in names:
            data = self.read(name)
            total.update(f"{name.rpartition('/')[2]}\n{data.size}\n".encode())
            total.update(data)
        return total.hexdigest()


def kind_of(path: Path) -> Literal["file", "folder"] | None:
    """What lies at ``path``; None if nothing does, or no file or folder.

    Raises:
        DataError: the path cannot be followed: a folder on it is locked, or it is too long.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else None


def _map_file(path: Path) -> pa.Buffer:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return pa.py_buffer(b"")
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _list_folder(path: Path) -> list[str]:
    try:
        os.listdir(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
    found: list[str] = []
    level = [path]
    for _ in range(MAX_DEPTH):
        entries = [entry for folder in level for entry in _entries(folder)]
        found += [entry.relative_to(path).as_posix() for entry in entries if os.path.isfile(entry)]
        level = [entry for entry in entries if os.path.isdir(entry) and not os.path.islink(entry)]
    return sorted(found)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # somebody else's subfolder holds nothing of ours
        return []


def _list_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as file:
            return sorted(name for name in file.namelist() if not name.endswith("/"))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not an intact zip or wheel ({error}); fetch it again or name a folder") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
