"""Fetches a publisher's archive: whole and checked, or not there.

Bytes gather in ``NAME.part`` beside the archive's place. Whatever ends a download (a lost connection, Ctrl-C, kill -9,
a full disk), the next one asks for the rest with an HTTP Range request. Nothing else is remembered: size and checksum
are known beforehand, so a server whose file has another size is refused at once, and a part that turns out not to
belong to the rest is fetched once more from its first byte. The archive appears under its name by a rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPResponse
from io import FileIO
from pathlib import Path

from m3oe_fast.data.catalogue import PublishedFile, readable_size
from m3oe_fast.errors import DataError

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before another try; they start over whenever a try got further than all before."""
TIMEOUT_SECONDS = 30.0
"""Without a byte, after which a connection counts as lost."""
BLOCK = 1 << 18
BUSY = (429, 500, 502, 503, 504)
"""HTTP statuses that pass."""


def fetch(
    file: PublishedFile,
    place: Path,
    report: Callable[[int], None] = lambda done: None,
    tell: Callable[[str], None] = lambda text: None,
) -> bool:
    """Make sure that ``place`` holds ``file``; proxies are those of the environment (``https_proxy``).

    Args:
        file: what to fetch.
        place: its path when complete; its folder is made.
        report: hears how many bytes are there.
        tell: hears what a person should know, one line.

    Returns:
        Whether anything had to be fetched.

    Raises:
        DataError: the server cannot be reached or has no such file, the content is not what it should be, another
            process fetches the same file, or the disk is full. Only ``NAME.part`` stays, where it can be gone on with.
    """
    if place.is_file():
        if _is_intact(place, file):
            return False
        tell(f"{place} is not the publisher's {file.name}, or damaged; fetching it")
    part = place.with_name(f"{place.name}.part")
    try:
        with _folder(place.parent), _claimed(part) as stream:
            if not _is_intact(place, file):  # else another process has fetched it meanwhile
                _check_room(stream, file, place.parent)
                _complete(_Download(file, stream, report, tell), part)
                os.fsync(stream.fileno())
                part.replace(place)
        return True
    except OSError as error:  # of the disk: those of the network do not come here
        raise DataError(
            f"{part}: cannot be written: {error.strerror or error}; make room or name another --cache_dir, and the "
            "same line goes on"
        ) from error


def checksum(path: Path, algorithm: str) -> str:
    """``ALGORITHM:HEX`` of a file's content; ``algorithm`` is a name of hashlib.

    Raises:
        OSError: the file cannot be read.
    """
    total = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return f"{algorithm}:{total.hexdigest()}"


def checksum_like(path: Path, file: PublishedFile) -> str:
    """The checksum of a local file, by the algorithm of the publisher's one."""
    return checksum(path, file.checksum.partition(":")[0])


def _is_intact(path: Path, file: PublishedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size and checksum_like(path, file) == file.checksum


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder; after an error one that was made and is empty does not stay."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def _claimed(part: Path) -> Iterator[FileIO]:
    """The part, open and locked; an empty one does not stay. Unbuffered, so that a kill loses nothing."""
    stream = _lock(part)
    try:
        yield stream
    finally:
        with contextlib.suppress(FileNotFoundError):
            if _size(stream) == 0 and _is_same(stream, part):
                part.unlink()
        stream.close()


def _lock(part: Path) -> FileIO:
    while True:
        stream = FileIO(os.open(part, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same(stream, part):
                return stream
        except BlockingIOError as error:
            stream.close()
            raise DataError(f"{part}: another process is downloading it; wait until it is done") from error
        # Its owner has just put it in its place or removed it.
        stream.close()


def _is_same(stream: FileIO, part: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), part.stat())
    except FileNotFoundError:
        return False


def _size(stream: FileIO) -> int:
    return os.fstat(stream.fileno()).st_size


def _check_room(stream: FileIO, file: PublishedFile, folder: Path) -> None:
    needed, free = file.size - _size(stream), shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{folder}: {file.name} needs {readable_size(needed)} more and {readable_size(free)} are free; "
            "make room or name another --cache_dir"
        )


def _complete(download: _Download, part: Path) -> None:
    """Fill the part and check it; one that was put together of two answers has a second chance.

    Raises:
        DataError: as ``fetch``; a part with the wrong content is gone.
    """
    file = download.file
    while True:
        download.run()
        found = checksum_like(part, file)
        if found == file.checksum:
            return
        joined = download.joined
        download.start_over()
        if not joined:
            raise DataError(
                f"{file.url}: what came has {found} where {file.checksum} is expected; it is removed; type the same "
                "line again later, or fetch it with a browser and name it with --from"
            )
        download.tell("the earlier part does not belong to the rest; fetching all of it")


class _Lost(Exception):
    """An answer that another try may better; the message says what happened."""


class _Download:
    """One file on its way into an open part.

    Attributes:
        file: what to fetch.
        tell: hears what a person should know.
        joined: whether the part holds bytes of more than one answer.
    """

    def __init__(
        self, file: PublishedFile, stream: FileIO, report: Callable[[int], None], tell: Callable[[str], None]
    ) -> None:
        self.file, self.tell = file, tell
        self._stream, self._report = stream, report
        self._answered = False
        self.joined = _size(stream) > 0

    def start_over(self) -> None:
        """Drop what is there."""
        self._stream.truncate(0)
        self.joined = False

    def run(self) -> None:
        """Fetch until the part has its full size.

        Raises:
            DataError: the server cannot be reached, refuses, or has another file.
            OSError: the part cannot be written.
        """
        most, pauses = _size(self._stream), list(PAUSES)
        while True:
            try:
                return self._receive()
            except _Lost as lost:
                if _size(self._stream) > most:
                    most, pauses = _size(self._stream), list(PAUSES)
                if not pauses:
                    raise DataError(f"{self.file.url}: {lost}, again and again; {self._how_to_go_on()}") from lost
                pause = pauses.pop(0)
                self.tell(f"{lost}; trying again in {pause:g} s")
                time.sleep(pause)

    def _receive(self) -> None:
        """Fetch what is missing, by one request."""
        if _size(self._stream) > self.file.size:
            self.start_over()
        done = _size(self._stream)
        self._report(done)
        if done == self.file.size:
            return
        with self._open(done) as response:
            self._answered = True
            done = self._first_byte(response, done)
            self._stream.truncate(done)
            self._stream.seek(done)
            self.joined = done > 0
            while block := _read(response):
                done += len(block)
                if done > self.file.size:
                    self.start_over()
                    raise DataError(f"{self.file.url}: sends more than {self._expected()}; {self._by_hand()}")
                self._write(block)
                self._report(done)
        if done < self.file.size:
            raise _Lost(f"the connection was lost at {readable_size(done)} of {readable_size(self.file.size)}")

    def _open(self, start: int) -> HTTPResponse:
        headers = {"User-Agent": "m3oe_fast"} | ({"Range": f"bytes={start}-"} if start else {})
        request = urllib.request.Request(self.file.url, headers=headers)
        try:
            return urllib.request.build_opener().open(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except urllib.error.URLError as error:  # the request could not be sent
            if self._answered and not isinstance(error.reason, ssl.SSLCertVerificationError):
                raise _Lost(f"the server cannot be reached ({_reason(error.reason)})") from error
            raise DataError(
                f"{self.file.url}: cannot be reached ({_reason(error.reason)}); check the network and the proxy "
                f"(https_proxy), or {self._by_hand()}"
            ) from error
        except (OSError, HTTPException) as error:
            raise _Lost(f"the server gave no answer ({_reason(error)})") from error

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        error.close()
        if error.code == 416:  # the server's file ends before our part does
            self.start_over()
            return _Lost("the server has less than the earlier part")
        if error.code in BUSY:
            return _Lost(f"the server is busy (HTTP {error.code})")
        return DataError(f"{self.file.url}: the server answers HTTP {error.code} ({error.reason}); {self._by_hand()}")

    def _first_byte(self, response: HTTPResponse, asked: int) -> int:
        """Where in the file an answer begins; refuses a file of another size, without reading it."""
        first, total = 0, response.headers.get("Content-Length")
        if response.status == 206:
            given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            if given is None or int(given[1]) != asked:
                self.start_over()
                raise _Lost("the server sends another range than it was asked for")
            first, total = asked, given[2]
        if total is not None and total.isdecimal() and int(total) != self.file.size:
            kind = response.headers.get_content_type()
            raise DataError(
                f"{self.file.url}: offers {int(total):,} bytes ({kind}) where {self._expected()} is expected: a login "
                f"page in between, or a new edition; {self._by_hand()}"
            )
        return first

    def _write(self, block: bytes) -> None:
        left = memoryview(block)
        while left:
            left = left[self._stream.write(left) :]

    def _expected(self) -> str:
        return f"{self.file.name} with {self.file.size:,} bytes"

    def _by_hand(self) -> str:
        return "fetch it with a browser and name it with --from"

    def _how_to_go_on(self) -> str:
        return f"type the same line again to go on, or {self._by_hand()}"


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read1(BLOCK)
    except (OSError, HTTPException):
        return b""  # the caller counts the bytes


def _reason(error: object) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
