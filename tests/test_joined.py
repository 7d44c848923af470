"""Rows take columns from side tables while they stream: as pandas merges them, whatever the order and the gaps."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from m3oe_fast.data import joined, log_files
from m3oe_fast.data.joined import Computed, JoinedFile, SideTable
from m3oe_fast.data.log_files import CsvFile, ParquetFile
from m3oe_fast.errors import DataError


def table(path, frame, wholes=("user", "item"), numbers=()):
    frame.to_csv(path, index=False)
    return CsvFile(path, ",", numbers, wholes=wholes)


@pytest.fixture
def log(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user": rng.integers(-5, 40, 500), "item": rng.integers(0, 90, 500), "click": 1})
    frame["item"] = frame["item"].astype("Int64").mask(rng.random(500) < 0.1)
    return frame


@pytest.fixture
def users():
    rng = np.random.default_rng(1)
    return pd.DataFrame({"user": rng.permutation(np.arange(-3, 30)), "city": [f"c{n % 4}" for n in range(33)]})


@pytest.fixture
def items():
    rng = np.random.default_rng(2)
    frame = pd.DataFrame({"item": rng.permutation(80) * 10**12 // 10**12, "price": rng.random(80)})
    return frame.assign(name=[None if n % 7 == 0 else f"n{n}" for n in range(80)])


@pytest.fixture
def file(tmp_path, log, users, items):
    sides = (
        SideTable(table(tmp_path / "users.csv", users), "user", ("city",)),
        SideTable(table(tmp_path / "items.csv", items, numbers=("price",)), "item", ("price", "name")),
    )
    doubled = Computed("user", pa.int64(), lambda column: pa.array(column.to_numpy() * 2))
    return JoinedFile(table(tmp_path / "log.csv", log), sides, {"twice": doubled})


def read(file, columns):
    table = pa.Table.from_batches(list(file.batches(columns)))
    assert tuple(table.column_names) == tuple(columns)
    return table.to_pandas()


@pytest.mark.parametrize("block", [300, 1 << 23])
@pytest.mark.parametrize("small", [0, 1 << 12])
def test_as_pandas_merges(file, log, users, items, block, small, monkeypatch):
    monkeypatch.setattr(log_files, "CSV_BLOCK_BYTES", block)
    monkeypatch.setattr(joined, "SMALL_DICTIONARY", small)
    wanted = log.merge(users, "left", "user").merge(items, "left", "item").assign(twice=log["user"] * 2)
    columns = ("name", "twice", "user", "city", "price")
    found = read(file, columns)
    for name in columns:
        # An empty text and a row without a partner both count as missing.
        mine, theirs = (
            [None if value == "" or pd.isna(value) else value for value in frame[name]] for frame in (found, wanted)
        )
        assert mine == theirs, name
    assert file.types["city"] == pa.string() and file.types["price"] == pa.float64() and file.rows is None
    assert file.row_name(0) == "2"


def test_only_what_is_asked_for_is_read(tmp_path, file):
    (tmp_path / "items.csv").unlink()
    assert read(file, ("click", "city"))["city"].notna().any()
    with pytest.raises(DataError, match=r"items.csv: cannot be read: .*; fetch or write it again"):
        read(file, ("name",))


def test_a_side_table_is_read_once(tmp_path, file):
    first = read(file, ("city",))
    (tmp_path / "users.csv").unlink()
    assert read(file, ("city",)).equals(first)


def test_a_side_table_without_rows(tmp_path, log, users):
    side = SideTable(table(tmp_path / "users.csv", users[:0]), "user", ("city",))
    found = read(JoinedFile(table(tmp_path / "log.csv", log), (side,), {}), ("user", "city"))
    assert len(found) == len(log) and found["city"].isna().all()


def test_parquet_logs_join_too(tmp_path, log, users):
    log.to_parquet(tmp_path / "log.parquet", index=False)
    side = SideTable(table(tmp_path / "users.csv", users), "user", ("city",))
    file = JoinedFile(ParquetFile(tmp_path / "log.parquet"), (side,), {})
    assert file.rows == len(log)
    assert read(file, ("city",))["city"].isna().sum() == (~log["user"].isin(users["user"])).sum()


def test_keys_that_are_no_keys(tmp_path, log, users):
    base = table(tmp_path / "log.csv", log)

    def refused(frame, message):
        side = SideTable(table(tmp_path / "users.csv", frame), "user", ("city",))
        with pytest.raises(DataError, match=message):
            read(JoinedFile(base, (side,), {}), ("city",))

    twice = pd.concat([users, users[4:6]], ignore_index=True)
    refused(
        twice, rf"users.csv, row 35, field user: {users['user'][4]} occurs a second time; keep one row for each user"
    )
    refused(
        users.assign(user=users["user"].astype("Int64").mask(users.index == 6)),
        r"users.csv, row 8, field user: is empty",
    )
    refused(users.astype({"user": str}).replace({"user": {"7": "x7"}}), "field user: 'x7' is not a whole number; mend")


def test_columns_that_are_missing(tmp_path, log, users):
    file = table(tmp_path / "users.csv", users)
    with pytest.raises(DataError, match=r"users.csv: has no column age; its columns are user, city"):
        SideTable(file, "user", ("age",))
    with pytest.raises(DataError, match=r"users.csv: has no column id; its columns are"):
        SideTable(file, "id", ("city",))
    base = table(tmp_path / "log.csv", log.drop(columns="user"))
    with pytest.raises(DataError, match=r"log.csv: has no column user; its columns are item, click"):
        JoinedFile(base, (SideTable(file, "user", ("city",)),), {})
