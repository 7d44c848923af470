"""The prepared folder: what is written is read back, damage is noticed, publishing is atomic."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3oe_fast.data import store
from m3oe_fast.errors import DataError

COLUMNS = {
    "id:a": np.array([0, 255], np.uint8),
    "id:b": np.array([65535, 1], np.uint16),
    "dense": np.array([[0.5, np.nan], [1, 2]], np.float32),
    "label": np.array([[1], [np.nan]], np.float32),
}


def fill(folder, text="{}"):
    for part in store.PARTS:
        store.write_part(folder / f"{part}.arrow", COLUMNS)
    (folder / store.ENCODER).write_text(text)
    (folder / store.DATASET).write_text(text)


@pytest.fixture
def folder(tmp_path):
    store.publish(tmp_path / "log", fill)
    return tmp_path / "log"


def test_columns_come_back_mapped_and_read_only(folder):
    found = store.read_part(folder / "val.arrow")
    assert found.keys() == COLUMNS.keys()
    for name, column in COLUMNS.items():
        assert found[name].dtype == column.dtype
        assert np.array_equal(found[name], column, equal_nan=column.dtype.kind == "f")
        assert not found[name].flags.writeable
        assert not found[name].flags.owndata


def test_column_of_width_0_is_left_out(tmp_path):
    store.write_part(tmp_path / "p", {"x": np.zeros(2, np.uint8), "dense": np.zeros((2, 0))})
    assert store.read_part(tmp_path / "p").keys() == {"x"}


@pytest.mark.parametrize(("size", "kind"), [(1, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")])
def test_smallest_uint(size, kind):
    assert store.smallest_uint(size) == np.dtype(kind)


def test_intact_folder_passes(folder):
    store.check(folder)
    assert {path.name for path in folder.iterdir()} == store.FILES
    assert [path.name for path in folder.parent.iterdir()] == ["log"]


@pytest.mark.parametrize("name", sorted(store.FILES))
@pytest.mark.parametrize("damage", ["delete", "truncate", "flip", "empty"])
def test_any_damage_is_noticed(folder, name, damage):
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-1] if damage == "truncate" else b"")
    with pytest.raises(store.Damaged, match=r"log/\w+\.(arrow|json)"):
        store.check(folder)


@pytest.mark.parametrize("manifest", [{}, {"format": store.FORMAT}, {"format": store.FORMAT, "files": {}}, []])
def test_manifest_of_something_else(folder, manifest):
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(store.Damaged, match=r"manifest\.json"):
        store.check(folder)


def test_no_arrow_file_is_damaged(tmp_path):
    (tmp_path / "x.arrow").write_bytes(b"no arrow file at all")
    with pytest.raises(store.Damaged, match=r"x\.arrow"):
        store.read_part(tmp_path / "x.arrow")


def test_publish_keeps_an_intact_folder(folder):
    store.publish(folder, lambda place: fill(place, '{"later": 1}'))
    assert (folder / store.ENCODER).read_text() == "{}"
    assert [path.name for path in folder.parent.iterdir()] == ["log"]


def test_publish_replaces_a_damaged_folder(folder):
    (folder / "train.arrow").unlink()
    store.publish(folder, lambda place: fill(place, '{"later": 1}'))
    store.check(folder)
    assert (folder / store.ENCODER).read_text() == '{"later": 1}'
    assert [path.name for path in folder.parent.iterdir()] == ["log"]


def test_publish_leaves_other_files_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").write_text("dear diary")
    with pytest.raises(DataError, match="home: holds other files, which stay"):
        store.publish(tmp_path / "home", fill)
    assert (tmp_path / "home" / "diary.txt").read_text() == "dear diary"


def test_failure_leaves_nothing_behind(tmp_path):
    def fail(place):
        fill(place)
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        store.publish(tmp_path / "log", fail)
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/log: cannot be written: .*choose another folder"):
        store.publish(tmp_path / "file" / "log", fill)


@pytest.mark.parametrize("damaged", [False, True])
def test_publishing_at_once(tmp_path, damaged):
    """Threads meet at the same system calls as processes do."""
    folder = tmp_path / "log"
    if damaged:
        folder.mkdir()
        (folder / store.ENCODER).write_text("{}")
    together = threading.Barrier(4)

    def publish(number):
        def build(place):
            fill(place, json.dumps({"by": number}))
            together.wait(timeout=30)

        store.publish(folder, build)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(publish, range(4)))
    store.check(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "log").symlink_to(tmp_path / "disk")
    store.publish(tmp_path / "log", fill)
    assert (tmp_path / "log").is_symlink()
    store.check(tmp_path / "disk")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "log"]


def test_name_that_is_too_long(tmp_path):
    with pytest.raises(DataError, match="cannot be written: File name too long"):
        store.publish(tmp_path / ("x" * 300), fill)


def test_publish_sweeps_what_killed_processes_left(tmp_path):
    stale, fresh = tmp_path / f".other.{'a' * 16}", tmp_path / f".other.{'b' * 16}"
    foreign, unlike = tmp_path / f".other.{'c' * 16}", tmp_path / ".config"
    for path in (stale, fresh, foreign, unlike):
        path.mkdir()
    (stale / "train.arrow").write_text("half")
    (foreign / "diary.txt").write_text("dear diary")
    for path in (stale, foreign, unlike):
        os.utime(path, (0, 0))
    store.publish(tmp_path / "log", fill)
    assert {path.name for path in tmp_path.iterdir()} == {"log", fresh.name, foreign.name, ".config"}
