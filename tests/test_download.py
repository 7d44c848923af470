"""Downloads: whatever the connection, the server or the disk does, the file is whole and right, or not there."""

import fcntl
import hashlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from m3oe_fast.data import download
from m3oe_fast.data.catalogue import CATALOGUE, downloadable, find_files, place_in
from m3oe_fast.data.download import fetch
from m3oe_fast.errors import DataError

from .publisher import Publisher

CONTENT = np.random.default_rng(0).bytes(3_000_001)
OTHER = np.random.default_rng(1).bytes(len(CONTENT))


@pytest.fixture(autouse=True)
def direct_and_quick(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSES", (0.0,) * 4)


@pytest.fixture
def place(tmp_path):
    return tmp_path / "cache" / "raw" / "log.zip"


def part_of(place, content=None):
    part = place.with_name("log.zip.part")
    if content is not None:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
    return part


def refused(publisher, place, message, file=None):
    """What is left in the folder after a download that fails in one line."""
    with pytest.raises(DataError, match=message) as caught:
        fetch(file or publisher.file(), place)
    assert "\n" not in str(caught.value)
    assert not place.exists()
    return [path.name for path in place.parent.iterdir()] if place.parent.exists() else None


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_fetches_and_does_nothing_the_second_time(place, algorithm):
    seen = []
    with Publisher(CONTENT) as publisher:
        file = publisher.file(algorithm=algorithm)
        assert fetch(file, place, seen.append)
        assert not fetch(file, place)
    assert place.read_bytes() == CONTENT
    assert publisher.asked == [None]
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, len(CONTENT))
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("ranges", [True, False])
def test_lost_connections(place, ranges):
    told = []
    with Publisher(CONTENT, ranges=ranges, cuts=[0, 1, 70_000, 1_000_000]) as publisher:
        assert fetch(publisher.file(), place, tell=told.append)
    assert place.read_bytes() == CONTENT
    offsets = ["bytes=1-", "bytes=70001-", "bytes=1070001-"] if ranges else ["bytes=1-", "bytes=70000-"]
    assert [asked for asked in dict.fromkeys(publisher.asked) if asked][: len(offsets)] == offsets
    assert told[2].startswith("the connection was lost at 70,00")


def test_tries_start_over_after_progress_only(place):
    with Publisher(CONTENT, cuts=[1000] * 30) as publisher:
        assert fetch(publisher.file(), place)
    assert len(publisher.asked) == 31
    place.unlink()
    with Publisher(CONTENT, ranges=False, cuts=[1000] * 30) as publisher:
        left = refused(publisher, place, r"lost at 1,000 bytes of 3\.0 MB, again and again; type the same line")
    assert len(publisher.asked) == 1 + len(download.PAUSES)
    assert left == ["log.zip.part"]


def test_pauses_grow(place, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with Publisher(CONTENT, statuses=[503, 429, 500]) as publisher:
        assert fetch(publisher.file(), place)
    assert slept == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("ranges", [True, False])
def test_goes_on_with_an_earlier_part(place, ranges):
    part_of(place, CONTENT[:2_000_000])
    seen = []
    with Publisher(CONTENT, ranges=ranges) as publisher:
        assert fetch(publisher.file(), place, seen.append)
    assert publisher.asked == ["bytes=2000000-"]
    assert place.read_bytes() == CONTENT
    assert seen[0] == 2_000_000
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize(
    ("earlier", "asked"),
    [
        (OTHER[:5], ["bytes=5-", None]),
        (OTHER, [None]),
        (CONTENT, []),
        (CONTENT + b"more", [None]),
        (b"", [None]),
    ],
    ids=["begins otherwise", "complete but other", "complete", "too long", "empty"],
)
def test_part_of_other_content_is_never_mixed_in(place, earlier, asked):
    part_of(place, earlier)
    with Publisher(CONTENT) as publisher:
        assert fetch(publisher.file(), place)
    assert place.read_bytes() == CONTENT
    assert publisher.asked == asked


def test_file_that_changes_while_it_is_fetched(place):
    with Publisher(CONTENT, cuts=[1_000_000]) as publisher:
        file = publisher.file()
        publisher.content = OTHER

        def change(_text):
            publisher.content = CONTENT

        assert fetch(file, place, tell=change)
    assert publisher.asked == [None, "bytes=1000000-", None]
    assert place.read_bytes() == CONTENT


def test_wrong_checksum_leaves_nothing(place):
    with Publisher(OTHER) as publisher:
        file = publisher.file(content=CONTENT)
        wanted = rf"what came has sha256:{hashlib.sha256(OTHER).hexdigest()} where {file.checksum} is expected"
        assert refused(publisher, place, wanted, file) is None
        assert publisher.asked == [None], "fetched again although one answer gave it all"
        part_of(place, CONTENT[:10])
        assert refused(publisher, place, wanted, file) == []
    assert publisher.asked == [None, "bytes=10-", None]


def test_damaged_file_in_its_place_is_fetched_again(place):
    place.parent.mkdir(parents=True)
    place.write_bytes(OTHER)
    told = []
    with Publisher(CONTENT) as publisher:
        assert fetch(publisher.file(), place, tell=told.append)
    assert told == [f"{place} is not the publisher's log.zip, or damaged; fetching it"]
    assert place.read_bytes() == CONTENT


def test_damaged_file_stays_until_there_is_a_better_one(place):
    place.parent.mkdir(parents=True)
    place.write_bytes(OTHER)
    with Publisher(CONTENT, statuses=[404]) as publisher, pytest.raises(DataError, match="HTTP 404"):
        fetch(publisher.file(), place)
    assert place.read_bytes() == OTHER


@pytest.mark.parametrize("content", [b"<html>log in</html>", CONTENT + b"1"], ids=["shorter", "longer"])
@pytest.mark.parametrize("earlier", [b"", CONTENT[:7]])
def test_file_of_another_size_is_refused_before_it_comes(place, content, earlier):
    part_of(place, earlier)
    with Publisher(content) as publisher:
        left = refused(
            publisher,
            place,
            rf"offers {len(content):,} bytes \(application/zip\) where log\.zip with 3,000,001 bytes",
            publisher.file(content=CONTENT),
        )
    assert left == (["log.zip.part"] if earlier else [])


def test_server_without_a_length(place):
    with Publisher(CONTENT, headers={"Content-Length": None}) as publisher:
        assert fetch(publisher.file(), place)
    assert place.read_bytes() == CONTENT
    place.unlink()
    with Publisher(CONTENT + b"1", headers={"Content-Length": None}) as publisher:
        assert refused(publisher, place, "sends more than log.zip with", publisher.file(content=CONTENT)) == []
    with Publisher(CONTENT[:-1], headers={"Content-Length": None}) as publisher:
        left = refused(publisher, place, "again and again", publisher.file(content=CONTENT))
    assert left == ["log.zip.part"]


def test_range_that_was_not_asked_for(place):
    part_of(place, CONTENT[:1000])
    with Publisher(CONTENT, first=500) as publisher:
        assert fetch(publisher.file(), place)
    assert publisher.asked == ["bytes=1000-", None]
    assert place.read_bytes() == CONTENT


def test_server_file_shorter_than_the_part(place):
    part_of(place, CONTENT[:2000])
    with Publisher(CONTENT[:1000]) as publisher:
        refused(publisher, place, "offers 1,000 bytes", publisher.file(content=CONTENT))
    assert publisher.asked == ["bytes=2000-", None]


@pytest.mark.parametrize("earlier", [b"", CONTENT[:100]])
def test_redirect(place, earlier):
    part_of(place, earlier)
    with Publisher(CONTENT) as publisher:
        file = publisher.file()
        moved = type(file)(file.name, file.url.replace("/log.zip", "/moved/log.zip"), file.size, file.checksum)
        assert fetch(moved, place)
    assert publisher.paths == ["/moved/log.zip", "/log.zip"]
    assert publisher.asked[1] == ("bytes=100-" if earlier else None)
    assert place.read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_refusals_are_not_tried_again(place, status):
    with Publisher(CONTENT, statuses=[status] * 9) as publisher:
        assert refused(publisher, place, rf"log\.zip: the server answers HTTP {status} .*name it with --from") is None
    assert len(publisher.asked) == 1


def test_busy_server(place):
    with Publisher(CONTENT, statuses=[503] * 9) as publisher:
        assert refused(publisher, place, r"the server is busy \(HTTP 503\), again and again") is None


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_no_network(place):
    publisher = Publisher(CONTENT, port=closed_port())
    assert (
        refused(publisher, place, r"cannot be reached \(Connection refused\); check the network and the proxy") is None
    )


def test_network_that_goes_away_for_a_while(place, monkeypatch):
    publisher = Publisher(CONTENT, cuts=[1000])
    with publisher:
        file, real, tries = publisher.file(), download.urllib.request.build_opener, []

        def unreliable():
            tries.append(1)
            if len(tries) in (2, 3):
                raise download.urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))
            return real()

        monkeypatch.setattr(download.urllib.request, "build_opener", unreliable)
        told = []
        assert fetch(file, place, tell=told.append)
    assert [text.partition(";")[0] for text in told] == [
        "the connection was lost at 1,000 bytes of 3.0 MB",
        "the server cannot be reached (Connection refused)",
        "the server cannot be reached (Connection refused)",
    ]
    assert place.read_bytes() == CONTENT


def test_silent_server(place, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with Publisher(CONTENT, hold_at=1000) as publisher:
        file = publisher.file()

        def wake(_text):
            publisher.hold_at = None

        assert fetch(file, place, tell=wake)
    assert publisher.asked == [None, "bytes=1000-"]
    assert place.read_bytes() == CONTENT


def test_proxy_of_the_environment(place, monkeypatch):
    monkeypatch.delenv("no_proxy")
    with Publisher(CONTENT) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        file = proxy.file()
        assert fetch(type(file)(file.name, "http://publisher.example/log.zip", file.size, file.checksum), place)
    assert proxy.paths == ["http://publisher.example/log.zip"]


def test_no_room_is_known_beforehand(place, monkeypatch):
    part_of(place, CONTENT[:1])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 2_999_999}))
    with Publisher(CONTENT) as publisher:
        left = refused(publisher, place, r"log\.zip needs 3\.0 MB more and 3\.0 MB are free; make room")
        assert publisher.asked == []
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 3_000_000}))
        assert fetch(publisher.file(), place)
    assert left == ["log.zip.part"]


def test_disk_that_fills_up(place):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Publisher(CONTENT) as publisher:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_003, hard))
        try:
            left = refused(publisher, place, r"log\.zip\.part: cannot be written: File too large; make room")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert left == ["log.zip.part"]
        assert part_of(place).read_bytes() == CONTENT[:1_000_003]
        assert fetch(publisher.file(), place)
    assert publisher.asked == [None, "bytes=1000003-"]
    assert place.read_bytes() == CONTENT


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Publisher(CONTENT) as publisher,
        pytest.raises(DataError, match=r"cannot be written: .*name another --cache_dir"),
    ):
        fetch(publisher.file(), tmp_path / "file" / "raw" / "log.zip")


def test_two_processes(place):
    with Publisher(CONTENT) as publisher, open(part_of(place, CONTENT[:10]), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(publisher, place, r"log\.zip\.part: another process is downloading it; wait until it is done")
        assert publisher.asked == []
        assert part_of(place).read_bytes() == CONTENT[:10]
    with Publisher(CONTENT) as publisher:
        assert fetch(publisher.file(), place)


def test_ctrl_c_keeps_the_part(place):
    def interrupt(done):
        if done > 1_000_000:
            raise KeyboardInterrupt

    with Publisher(CONTENT) as publisher:
        with pytest.raises(KeyboardInterrupt):
            fetch(publisher.file(), place, interrupt)
        there = part_of(place).stat().st_size
        assert there > 1_000_000
        assert fetch(publisher.file(), place)
    assert publisher.asked == [None, f"bytes={there}-"]
    assert place.read_bytes() == CONTENT


def test_kill_9_in_the_middle(place):
    program = """
import sys
from pathlib import Path
from m3oe_fast.data.catalogue import PublishedFile
from m3oe_fast.data.download import fetch
name, url, size, checksum, place = sys.argv[1:]
fetch(PublishedFile(name, url, int(size), checksum), Path(place))
"""
    with Publisher(CONTENT, hold_at=1_234_567) as publisher:
        file = publisher.file()
        words = [file.name, file.url, str(file.size), file.checksum, str(place)]
        running = subprocess.Popen([sys.executable, "-c", program, *words])
        part = part_of(place)
        until = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size == 1_234_567):
            assert running.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        with pytest.raises(DataError, match="another process"):
            fetch(file, place)
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
        assert [path.name for path in place.parent.iterdir()] == ["log.zip.part"]
        publisher.hold_at = None
        assert fetch(file, place)
    assert publisher.asked == [None, "bytes=1234567-"]
    assert place.read_bytes() == CONTENT


def test_catalogue_is_complete():
    assert list(CATALOGUE) == [
        "movielens-100k",
        "movielens-1m",
        "kuairand-pure",
        "kuairand-1k",
        "ali-ccp",
        "census-income",
    ]
    for log in CATALOGUE.values():
        assert (log.file is None) == bool(log.by_hand) == bool(log.why_by_hand)
        assert log.page.startswith("https://")
        if log.file is not None:
            algorithm, _, digest = log.file.checksum.partition(":")
            assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size
            assert log.file.url == f"{log.file.url.rpartition('/')[0]}/{log.file.name}"
            assert log.file.url.startswith("https://")


def test_files_of_a_public_log(tmp_path):
    place = place_in(tmp_path, downloadable("movielens-1m"))
    assert place == tmp_path / "raw" / "ml-1m.zip"
    with pytest.raises(DataError, match=rf"{place} is not there: python -m m3oe_fast\.prepare movielens-1m --download"):
        find_files("movielens-1m", None, tmp_path)
    assert find_files("movielens-1m", "elsewhere", tmp_path) == "elsewhere"
    place.parent.mkdir()
    place.write_bytes(b"")
    assert find_files("movielens-1m", None, tmp_path) == str(place)


def test_log_behind_a_login_is_fetched_by_hand(tmp_path):
    how = r"sample_train\.tar\.gz and sample_test\.tar\.gz at https://tianchi.*prepare ali-ccp --from FOLDER"
    with pytest.raises(DataError, match=f"--download cannot fetch Ali-CCP .*: its publisher asks for a login; .*{how}"):
        downloadable("ali-ccp")
    with pytest.raises(DataError, match=f"--data ali-ccp needs --data_path: .*{how}"):
        find_files("ali-ccp", None, tmp_path)
    with pytest.raises(DataError, match="--download: demo is no public data set; choose one of movielens-100k"):
        downloadable("demo")
