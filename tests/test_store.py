"""The prepared folder: what is written is read back, damage is noticed, publishing is atomic."""

import json
import os
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from m3oe_fast.data import store
from m3oe_fast.errors import DataError

COLUMNS = {
    "id:a": np.array([0, 255], np.uint8),
    "id:b": np.array([65535, 1], np.uint16),
    "dense": np.array([[0.5, np.nan], [1, 2]], np.float32),
    "label": np.array([[1], [np.nan]], np.float32),
}


def write(path, *chunks):
    with store.PartWriter(path) as writer:
        for chunk in chunks:
            writer.append(chunk)


def rows_of(path):
    """Every segment of a file as plain lists; a bag as a list a row."""
    return [
        {
            name: [column[0][a:b].tolist() for a, b in pairwise(column[1])]
            if isinstance(column, tuple)
            else column.tolist()
            for name, column in segment.items()
        }
        for segment in store.PartFile(path).segments
    ]


def fill(folder, text="{}"):
    for part in store.PARTS:
        write(folder / f"{part}.arrow", COLUMNS)
    (folder / store.ENCODER).write_text(text)
    (folder / store.DATASET).write_text(text)


@pytest.fixture
def folder(tmp_path):
    store.publish(tmp_path / "log", fill)
    return tmp_path / "log"


def test_columns_come_back_mapped_and_read_only(folder):
    (found,) = store.PartFile(folder / "val.arrow").segments
    assert found.keys() == COLUMNS.keys()
    for name, column in COLUMNS.items():
        assert found[name].dtype == column.dtype
        assert np.array_equal(found[name], column, equal_nan=column.dtype.kind == "f")
        assert not found[name].flags.writeable
        assert not found[name].flags.owndata


def test_column_of_width_0_is_left_out(tmp_path):
    write(tmp_path / "p", {"x": np.zeros(2, np.uint8), "dense": np.zeros((2, 0))})
    assert rows_of(tmp_path / "p") == [{"x": [0, 0]}]


@pytest.mark.parametrize("chunks", [[3, 0, 4, 1], [8], [1] * 8, [3, 3, 2], [0, 8, 0]])
def test_segments_are_full_whatever_is_appended(tmp_path, monkeypatch, chunks):
    monkeypatch.setattr(store, "SEGMENT_ROWS", 3)
    ends = np.concatenate([[0], np.cumsum(chunks)])
    offsets = np.array([0, 2, 2, 3, 6, 6, 6, 7, 9])
    bag = np.arange(9, dtype=np.int64)
    write(
        tmp_path / "p",
        *(
            {
                "x": np.arange(a, b, dtype=np.uint8),
                "y": np.zeros((b - a, 2), np.float32),
                "z": (bag, offsets[a : b + 1]),
            }
            for a, b in pairwise(ends)
        ),
    )
    lists = [bag[a:b].tolist() for a, b in pairwise(offsets)]
    assert rows_of(tmp_path / "p") == [
        {"x": list(range(a, b)), "y": [[0, 0]] * (b - a), "z": lists[a:b]} for a, b in [(0, 3), (3, 6), (6, 8)]
    ]
    values, ends = store.PartFile(tmp_path / "p").segments[1]["z"]
    assert (values.dtype, ends.dtype) == (np.uint32, np.int32)


def test_last_segment_that_is_full_is_not_followed_by_an_empty_one(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SEGMENT_ROWS", 2)
    write(tmp_path / "p", {"x": np.arange(4)})
    assert rows_of(tmp_path / "p") == [{"x": [0, 1]}, {"x": [2, 3]}]


def test_part_without_rows_has_its_columns(tmp_path):
    write(tmp_path / "p", {"x": np.zeros(0, np.uint8), "z": (np.zeros(0, np.uint32), np.zeros(1, np.int32))})
    assert rows_of(tmp_path / "p") == [{"x": [], "z": []}]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "nothing was appended"),
        ([{"x": np.zeros(1)}, {"y": np.zeros(1)}], "columns .*y.*, expected .*x"),
        ([{"x": np.zeros(1, np.uint8)}, {"x": np.zeros(1, np.uint16)}], "columns .*u2.*, expected .*u1"),
        ([{"x": np.zeros((1, 2))}, {"x": np.zeros((1, 3))}], r"columns .*3,.*, expected .*2,"),
        ([{"x": np.zeros(1), "y": np.zeros(2)}], "different lengths"),
        ([{"x": np.zeros(2), "y": (np.zeros(2), np.zeros(2))}], "different lengths"),
        ([{}], "columns {}"),
    ],
)
def test_columns_that_do_not_fit_together_leave_no_file(tmp_path, chunks, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "p", *chunks)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk(size):
    """Files cannot grow beyond ``size`` bytes, of which the system tells as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1 << 12, (1 << 16) + 256])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path, size):
    def build(place):
        write(place / "train.arrow", {"x": np.zeros(1 << 16, np.uint8)})

    with full_disk(size), pytest.raises(DataError, match="log: cannot be written: File too large; choose") as caught:
        store.publish(tmp_path / "log", build)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_copyto_reads_past_the_mapping(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SEGMENT_ROWS", 4)
    columns = {"x": np.arange(6, dtype=np.uint16), "y": np.arange(12, dtype=np.float32).reshape(6, 2)}
    write(tmp_path / "p", columns)
    file = store.PartFile(tmp_path / "p")
    for name, column in columns.items():
        for segment, (start, stop) in zip(file.segments, [(1, 4), (4, 6)], strict=True):
            view = segment[name][start % 4 :]
            out = np.empty_like(view)
            file.copyto(out, view)
            assert np.array_equal(out, column[start:stop])


def test_copyto_wants_the_same_kind(tmp_path):
    write(tmp_path / "p", {"x": np.arange(6, dtype=np.uint16)})
    file = store.PartFile(tmp_path / "p")
    column = file.segments[0]["x"]
    for out in (np.empty(6, np.uint32), np.empty(5, np.uint16)):
        with pytest.raises(ValueError, match=r"out is .*, view uint16 \(6,\)"):
            file.copyto(out, column)
    for view in (column[::2], np.array(column)):
        with pytest.raises(ValueError, match="is no consecutive part of the file"):
            file.copyto(np.empty_like(view), view)


def test_file_that_shrinks_while_it_is_open(tmp_path):
    write(tmp_path / "p", {"x": np.zeros(1 << 16, np.uint8)})
    file = store.PartFile(tmp_path / "p")
    os.truncate(tmp_path / "p", 1 << 12)
    with pytest.raises(DataError, match="p: shorter than when it was opened; prepare the log again"):
        file.copyto(np.empty(1 << 16, np.uint8), file.segments[0]["x"])


def test_closed_with_the_last_reference(tmp_path):
    write(tmp_path / "p", {"x": np.zeros(9, np.uint8)})
    before = os.listdir("/proc/self/fd")
    file = store.PartFile(tmp_path / "p")
    view = file.segments[0]["x"]
    del file
    assert view.tolist() == [0] * 9  # the mapping lives as long as its views
    del view
    assert os.listdir("/proc/self/fd") == before


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


@pytest.mark.parametrize("content", [b"no arrow file at all", b"", b"ARROW1" * 9])
def test_no_arrow_file_is_damaged(tmp_path, content):
    (tmp_path / "x.arrow").write_bytes(content)
    with pytest.raises(store.Damaged, match=r"x\.arrow: \w"):
        store.PartFile(tmp_path / "x.arrow")


def test_arrow_file_of_another_program(tmp_path):
    gaps, nothing = pa.record_batch({"x": pa.array([1, None])}), pa.schema({"x": pa.int8()})
    for name, schema, batches in (("gaps", gaps.schema, [gaps]), ("nothing", nothing, [])):
        with pa.ipc.new_file(str(tmp_path / name), schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        with pytest.raises(store.Damaged, match=rf"{name}: \w"):
            store.PartFile(tmp_path / name)


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
