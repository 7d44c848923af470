"""Parquet and CSV logs are found, checked and read; whatever is wrong is one line that names file, row and field."""

import os

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3oe_fast.data import load, tabular
from m3oe_fast.errors import DataError

from .log_files import edit
from .tabular_files import SCHEMA, as_lists, make_frame, write_csv, write_parquet, write_schema


@pytest.fixture
def schema(tmp_path):
    return write_schema(tmp_path / "schemas" / "s.yaml")


@pytest.fixture
def frame():
    return make_frame(600)


def prepare(tmp_path, kind, schema, **options):
    """Prepare the log at tmp_path/log; nothing may be left behind when that fails."""
    return load(f"{kind}:{tmp_path / 'log'}", schema=schema, cache_dir=str(tmp_path / "cache"), **options)


def refused(tmp_path, kind, schema, message, **options):
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, kind, schema, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def change(path, column):
    """Write a Parquet file again with one column replaced: a function of the frame, or None to leave it out."""
    frame = pd.read_parquet(path)
    for name, make in column.items():
        frame = frame.drop(columns=name) if make is None else frame.assign(**{name: make(frame)})
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), path, row_group_size=100)


def test_columns_may_be_asked_for_and_come_in_order(tmp_path, schema, frame):
    log = tabular.find("parquet", str(write_parquet(tmp_path / "log", frame)), schema)
    chunks = list(log.chunks(("time", "price")))
    assert [chunk.start for chunk in chunks] == [0, 200, 400]
    assert np.array_equal(np.concatenate([chunk.dense("price") for chunk in chunks]), frame["price"])
    assert log.count_rows() == 600
    csv = tabular.find("csv", str(write_csv(tmp_path / "csv", frame)), schema)
    assert csv.count_rows() == 600


def test_files_that_are_not_ours_are_left_alone(tmp_path, schema, frame):
    folder = write_parquet(tmp_path / "log", frame)
    for name in ("_SUCCESS", "_part.parquet", ".part-9.parquet", "read.me", ".part-0.parquet.crc"):
        (folder / name).write_text("x")
    (folder / "sub").mkdir()
    assert len(tabular.find("parquet", str(folder), schema).files) == 3


def test_a_single_file_and_a_packed_one(tmp_path, schema, frame):
    frame.to_csv(tmp_path / "a.csv.gz", index=False)
    assert tabular.find("csv", str(tmp_path / "a.csv.gz"), schema).count_rows() == 600
    write_parquet(tmp_path / "p", frame, files=1).joinpath("part-0.parquet").rename(tmp_path / "data")
    assert tabular.find("parquet", str(tmp_path / "data"), schema).count_rows() == 600


def test_an_empty_file_among_others_is_no_error(tmp_path, schema, frame):
    folder = write_parquet(tmp_path / "log", frame)
    empty = pa.Table.from_pandas(pd.read_parquet(folder / "part-0.parquet"), preserve_index=False)[:0]
    pq.write_table(empty, folder / "part-00.parquet")
    assert sum(map(len, tabular.find("parquet", str(folder), schema).chunks(("price",)))) == 600
    csv = write_csv(tmp_path / "csv", frame)
    (csv / "part-00.csv").write_text((csv / "part-0.csv").read_text().partition("\n")[0] + "\n")
    assert tabular.find("csv", str(csv), schema).count_rows() == 600


def test_missing_schema_lists_the_columns(tmp_path, frame):
    write_parquet(tmp_path / "log", frame)
    refused(tmp_path, "parquet", None, "say what its columns are for with --schema .*its columns are user_id, item")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_nothing_there(tmp_path, schema, kind):
    refused(tmp_path, kind, schema, "log: no such file or folder; check the path")
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "x.txt").write_text("x")
    refused(tmp_path, kind, schema, rf"holds no files \*.{kind}")
    (tmp_path / "log" / f"part.{kind}").mkdir()
    refused(tmp_path, kind, schema, rf"part.{kind}: is no file")
    (tmp_path / "log" / f"part.{kind}").rmdir()
    os.symlink(tmp_path / "gone", tmp_path / "log" / f"part.{kind}")
    refused(tmp_path, kind, schema, rf"part.{kind}: is no file")


def test_damaged_parquet_files(tmp_path, schema, frame):
    path = write_parquet(tmp_path / "log", frame) / "part-1.parquet"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused(tmp_path, "parquet", schema, "part-1.parquet: is a Parquet file that is cut short; fetch")
    path.write_bytes(b"user_id,item\n1,2\n")
    refused(tmp_path, "parquet", schema, "part-1.parquet: is no Parquet file; fetch")
    path.write_bytes(b"")
    refused(tmp_path, "parquet", schema, "part-1.parquet: is empty; fetch")
    middle = bytearray(data)
    middle[4:2000] = os.urandom(1996)
    path.write_bytes(middle)
    refused(tmp_path, "parquet", schema, "part-1.parquet: (is damaged|cannot be read)")
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    path.write_bytes(data[:footer] + b"\xff" * 40 + data[footer + 40 :])
    refused(tmp_path, "parquet", schema, "part-1.parquet: (is damaged|cannot be read)")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_locked_files(tmp_path, schema, frame):
    path = write_parquet(tmp_path / "log", frame) / "part-1.parquet"
    path.chmod(0)
    refused(tmp_path, "parquet", schema, "part-1.parquet: cannot be read: Permission denied")


def test_read_errors_name_the_file(tmp_path, schema, frame, monkeypatch):
    write_parquet(tmp_path / "log", frame)

    def broken(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", broken)
    refused(tmp_path, "parquet", schema, "part-0.parquet: cannot be read: Input/output error; fetch or write it again")


def test_a_file_with_another_schema(tmp_path, schema, frame):
    path = write_parquet(tmp_path / "log", frame) / "part-2.parquet"
    data = path.read_bytes()
    for column, message in (
        ({"item": None}, r"part-2.parquet: has no column item \(ids in the schema\); its columns are user_id, query"),
        ({"query": lambda f: f["query"].astype(str)}, "part-2.parquet, field query: is of type .*string, but int64 in"),
        ({"time": lambda f: f["time"].astype(float)}, "part-2.parquet, field time: is of type double, but int64 in"),
    ):
        path.write_bytes(data)
        change(path, column)
        refused(tmp_path, "parquet", schema, message)


def test_whole_numbers_may_be_floats_in_one_file(tmp_path, schema, frame):
    """A file with a gap holds floats where the others hold whole numbers; the ids are the same."""
    folder = write_parquet(tmp_path / "log", frame)
    wanted = prepare(tmp_path, "parquet", schema, split="official").test.take(np.arange(60)).ids
    change(folder / "part-2.parquet", {"query": lambda f: f["query"].astype(float)})
    assert (prepare(tmp_path, "parquet", schema, split="official").test.take(np.arange(60)).ids == wanted).all()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"price": lambda f: "cheap"}, r"row 1 \(row group 0\), field price: 'cheap' is not a number; mend it"),
        (
            {"price": lambda f: f["price"].mask(f.index == 150)},
            r"row 151 \(row group 1\), field price: nan is no finite number; fill it in",
        ),
        ({"price": lambda f: np.where(f.index == 3, -np.inf, 1.0)}, "row 4 .*field price: -inf is no finite number"),
        ({"click": lambda f: 2.0}, r"row 1 \(row group 0\), field click: label click is 2, not 0 or 1"),
        ({"tab": lambda f: f["tab"].mask(f.index == 5)}, r"row 6 .*field tab: None is in no domain \(home, "),
        ({"weight": lambda f: -1.0}, "row 1 .*field weight: -1 is no weight; write a finite number, 0 or more"),
        ({"weight": lambda f: f["weight"].mask(f.index == 7)}, "row 8 .*field weight: nan is no weight"),
        ({"weight": lambda f: 1e300}, "row 1 .*field weight: inf is no weight"),
    ],
)
def test_values_that_do_not_fit(tmp_path, schema, frame, column, message):
    path = write_parquet(tmp_path / "log", frame, files=1) / "part-0.parquet"
    change(path, column)
    refused(tmp_path, "parquet", schema, f"log/part-0.parquet, {message}")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"price": lambda f: [[1.0]] * len(f)}, "field price: is of type list<.*but dense takes texts or numbers"),
        ({"item": lambda f: [b"x"] * len(f)}, "field item: is of type binary, but ids takes texts or numbers"),
        ({"genres": lambda f: 1}, "field genres: is of type int64, but bags takes lists or separated texts"),
        ({"time": lambda f: [b"x"] * len(f)}, "field time: is of type binary, but timestamp takes times"),
    ],
)
def test_types_that_do_not_fit(tmp_path, schema, frame, column, message):
    change(write_parquet(tmp_path / "log", frame, files=1) / "part-0.parquet", column)
    refused(tmp_path, "parquet", schema, message)


def test_texts_of_a_bag_need_a_separator(tmp_path, frame):
    write_parquet(tmp_path / "log", frame)
    schema = write_schema(tmp_path / "s.yaml", "bags: [genres]\nlabels: {click: click}\n")
    refused(tmp_path, "parquet", schema, r"field genres: holds texts; say what .*\{name: genres, separator: \"\|\"\}")


def test_columns_that_occur_twice(tmp_path, schema, frame):
    write_csv(tmp_path / "log", frame, files=1)
    edit(tmp_path / "log" / "part-0.csv", "unused", "item")
    refused(tmp_path, "csv", schema, "part-0.csv: column item occurs twice; rename one")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("price,genres", "prize,genres", r"part-0.csv: has no column price \(dense in the schema\); its columns are"),
        (",x\n", "\n", r"part-0.csv, row 2: 11 columns where the header has 12 \(wrong delimiter"),
        (",x\n", ",x,y\n", "part-0.csv, row 2: 13 columns where the header has 12"),
        ("home", '"home', r"part-0.csv(, row \d+)?: .*mend the file"),
    ],
)
def test_csv_files_that_cannot_be_read(tmp_path, schema, frame, old, new, message):
    edit(write_csv(tmp_path / "log", frame, files=1) / "part-0.csv", old, new)
    refused(tmp_path, "csv", schema, message)


def test_csv_values_that_do_not_fit(tmp_path, schema, frame):
    path = write_csv(tmp_path / "log", frame, files=1) / "part-0.csv"
    lines = path.read_text().splitlines()
    for column, value, message in (
        (3, "cheap", "part-0.csv, row 5, field price: 'cheap' is not a number; mend it"),
        (3, "", "part-0.csv, row 5, field price: nan is no finite number"),
        (7, "2", "part-0.csv, row 5, field click: label click is 2, not 0 or 1"),
        (8, "long", "part-0.csv, row 5, field seconds: 'long' is not a number"),
        (6, "", "part-0.csv, row 5, field tab: '' is in no domain"),
        (10, "-2", "part-0.csv, row 5, field weight: -2 is no weight"),
    ):
        fields = lines[4].split(",")
        fields[column] = value
        path.write_text("\n".join([*lines[:4], ",".join(fields), *lines[5:]]))
        refused(tmp_path, "csv", schema, message)
    path.write_bytes("\n".join(lines).encode().replace("été".encode(), b"\xe9t\xe9"))
    refused(tmp_path, "csv", schema, r"part-0.csv, row \d+: not UTF-8 text; save the file as UTF-8")
    path.write_text("")
    refused(tmp_path, "csv", schema, "part-0.csv: is empty; fetch or write it again")
    path.write_text(lines[0] + "\n")
    refused(tmp_path, "csv", schema, r"log: the split leaves train without rows \(0 rows in all\)")


def test_another_delimiter(tmp_path, frame):
    (tmp_path / "log").mkdir()
    frame.to_csv(tmp_path / "log" / "a.csv", sep="\t", index=False)
    schema = write_schema(tmp_path / "s.yaml", SCHEMA + 'delimiter: "\\t"\n')
    assert len(prepare(tmp_path, "csv", schema).train) > 400


def test_a_part_without_rows(tmp_path, schema, frame):
    write_parquet(tmp_path / "log", frame[:3], files=1)
    refused(tmp_path, "parquet", schema, r"log: the split leaves \w+ without rows \(3 rows in all\); take a larger log")


def test_too_many_domains(tmp_path, schema, frame, monkeypatch):
    write_parquet(tmp_path / "log", frame)
    monkeypatch.setattr("m3oe_fast.data.fit.MAX_DOMAINS", 2)
    refused(tmp_path, "parquet", schema, "field tab: more than the 2 domains that fit; use bins or values")


def test_a_domain_that_is_not_listed(tmp_path, frame):
    write_parquet(tmp_path / "log", frame)
    text = SCHEMA.replace("domain: tab", "domain: {column: tab, values: [home, live]}")
    schema = write_schema(tmp_path / "s.yaml", text)
    refused(tmp_path, "parquet", schema, r"field tab: 'shop' is in no domain \(home, live\); mend or drop the row")


def test_cache_follows_content_and_schema(tmp_path, schema, frame):
    folder = write_parquet(tmp_path / "log", frame)
    first = prepare(tmp_path, "parquet", schema).folder
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert prepare(tmp_path, "parquet", schema).folder == first
    changed = write_schema(tmp_path / "t.yaml", SCHEMA.replace("buckets: 50", "buckets: 51"))
    other = prepare(tmp_path, "parquet", changed)
    assert other.folder != first
    change(folder / "part-1.parquet", {"price": lambda f: f["price"] + 1e-9})
    assert prepare(tmp_path, "parquet", schema).folder not in (first, other.folder)


def test_lists_and_texts_are_both_bags(tmp_path, schema, frame):
    write_parquet(tmp_path / "log", frame)
    texts = prepare(tmp_path, "parquet", schema)
    write_parquet(tmp_path / "lists" / "log", as_lists(frame))
    lists = prepare(tmp_path / "lists", "parquet", schema)
    for one, two in zip(texts.train.take(np.arange(400)).bags, lists.train.take(np.arange(400)).bags, strict=True):
        assert (one.values == two.values).all() and (one.offsets == two.offsets).all()
