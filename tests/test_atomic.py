"""Files are whole or not there, and a killed writer's half is swept."""

import os
import subprocess
import sys

import pytest

from m3oe_fast.atomic import replacing


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write(path, content=b"new"):
    with replacing(path) as stream:
        stream.write(content)


def test_old_file_stays_and_no_other_after_an_error(tmp_path):
    path = tmp_path / "a"
    write(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as stream:
        stream.write(b"half")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_halves_of_dead_writers_are_swept_and_nothing_else(tmp_path):
    dead = dead_process()
    kept = {f".a.{os.getppid()}", f".b.{dead}", f"a.{dead}", ".a.txt"}
    for name in (*kept, f".a.{dead}", ".a.99999999999999999999"):
        (tmp_path / name).write_bytes(b"half")
    write(tmp_path / "a")
    assert set(os.listdir(tmp_path)) == {"a", *kept}


def test_a_half_of_another_user_stays(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.kill", refuse)
    (tmp_path / ".a.123").write_bytes(b"half")
    write(tmp_path / "a")
    assert set(os.listdir(tmp_path)) == {"a", ".a.123"}
