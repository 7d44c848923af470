"""Members of a .tar.gz archive, unpacked once into a folder of the cache."""

from __future__ import annotations

import gzip
import shutil
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from m3oe_fast.atomic import replacing
from m3oe_fast.errors import DataError

COPY_BYTES = 1 << 22


def unpack(archive: Path, names: Sequence[str], folder: Path) -> None:
    """Write the files ``names`` of ``archive`` into ``folder``; one that is there already is left as it is.

    A file appears under its name only when it is complete, so that a run that was stopped is continued by the next.

    Args:
        archive: a .tar.gz file, which is only read.
        names: file names, in whatever folder of the archive.
        folder: created if need be.

    Raises:
        DataError: the archive is damaged or lacks a file, or the folder cannot be written.
    """
    missing = {name for name in names if not (folder / name).is_file()}
    if not missing:
        return
    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r:") as members:
                for member in members:
                    name = member.name.rpartition("/")[2]
                    if name in missing and member.isreg():
                        _write(members, member, folder / name)
                        missing.remove(name)
            while stream.read(COPY_BYTES):  # only the end of the stream has its checksum
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        _remove(names, folder)
        raise DataError(f"{archive}: is damaged ({error}); fetch the file again") from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror or error}; check the file") from error
    if missing:
        _remove(names, folder)
        raise DataError(f"{archive}: lacks {', '.join(sorted(missing))}; fetch the file again")


def _remove(names: Sequence[str], folder: Path) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _write(members: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = members.extractfile(member)
    try:
        with replacing(path) as target:
            shutil.copyfileobj(source, target, COPY_BYTES)
    except gzip.BadGzipFile:  # an OSError as well
        raise
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written: {error.strerror or error}; free {(member.size >> 20) + 1:,} MB there, or "
            "choose another --cache_dir"
        ) from error
