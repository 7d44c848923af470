"""Folders and zips read alike, and damage is told in one line."""

import zipfile

import pytest

from m3oe_fast.data.archive import Archive
from m3oe_fast.errors import DataError


@pytest.fixture
def folder(tmp_path):
    inner = tmp_path / "log" / "ml" / "data"
    inner.mkdir(parents=True)
    (inner / "a.inter").write_bytes(b"x" * 5000)
    (inner / "empty").write_bytes(b"")
    return tmp_path / "log"


def zip_of(folder, target):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder).as_posix())
    return target


def test_folder_and_zip_hold_the_same_bytes(folder, tmp_path):
    packed = Archive(zip_of(folder, tmp_path / "log.whl"))
    plain = Archive(folder)
    assert packed.names == plain.names == ["ml/data/a.inter", "ml/data/empty"]
    for archive in (packed, plain):
        assert archive.read(archive.find("a.inter")).to_pybytes() == b"x" * 5000
        assert archive.read(archive.find("empty")).to_pybytes() == b""
        assert archive.find("b.inter") is None


def test_digest_follows_the_bytes_that_are_read(folder):
    before = Archive(folder).digest(["ml/data/a.inter"])
    (folder / "unrelated").write_text("new")
    assert Archive(folder).digest(["ml/data/a.inter"]) == before
    (folder / "ml/data/a.inter").write_bytes(b"y" * 5000)
    assert Archive(folder).digest(["ml/data/a.inter"]) != before


def test_missing_path(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no such file or folder; check"):
        Archive(tmp_path / "nothing")


def test_file_that_occurs_twice(folder):
    (folder / "a.inter").write_text("other")
    with pytest.raises(DataError, match=r"holds a\.inter 2 times \(a\.inter, ml/data/a\.inter\)"):
        Archive(folder).find("a.inter")


@pytest.mark.parametrize("keep", [0, 10, 60, -1])
def test_truncated_zip(folder, tmp_path, keep):
    path = zip_of(folder, tmp_path / "log.zip")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"log\.zip: not an intact zip or wheel"):
        Archive(path)


def test_flipped_byte_in_a_member(folder, tmp_path):
    path = zip_of(folder, tmp_path / "log.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"a.inter") + len("a.inter") + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"log\.zip!ml/data/a\.inter: damaged in the archive"):
        Archive(path).read("ml/data/a.inter")


def test_member_that_vanished(folder):
    archive = Archive(folder)
    (folder / "ml/data/a.inter").unlink()
    with pytest.raises(DataError, match=r"a\.inter: cannot be read: No such file"):
        archive.read("ml/data/a.inter")


def test_path_that_is_too_long():
    with pytest.raises(DataError, match="cannot be read: File name too long; check the path"):
        Archive("x" * 300)


def locked(*_, **__):
    raise PermissionError(13, "Permission denied")


def test_path_under_a_locked_folder(monkeypatch, folder):
    monkeypatch.setattr("pathlib.Path.stat", locked)
    with pytest.raises(DataError, match=r"log: cannot be read: Permission denied; check the path"):
        Archive(folder)


def test_folder_that_cannot_be_listed(monkeypatch, folder):
    monkeypatch.setattr("m3oe_fast.data.archive.os.listdir", locked)
    with pytest.raises(DataError, match=r"log: cannot be read: Permission denied; check the path"):
        Archive(folder)


def test_home_of_nobody():
    with pytest.raises(DataError, match="no such file or folder"):
        Archive("~no-such-user-here/log")
