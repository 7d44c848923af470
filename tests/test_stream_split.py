"""Streamed splits: exact where they can be, whatever the chunks, and 8:1:1."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data import stream_split, tabular
from m3oe_fast.data.stream_split import make_split
from m3oe_fast.errors import DataError

from .tabular_files import make_frame, write_csv, write_parquet, write_schema


@pytest.fixture
def frame():
    return make_frame(1000)


def parts_of(log, split, seed, scratch):
    """The part of every row, and the chunks that came by."""
    made = make_split(log, split, seed, scratch)
    columns = sorted({"click", *made.columns})
    passes = []
    for _ in range(2):
        assign = made.start()
        passes.append([assign(chunk) for chunk in log.chunks(columns)])
    assert all(map(np.array_equal, *passes)), "two passes divide the rows differently"
    return np.concatenate(passes[0])


def open_log(tmp_path, frame, kind="parquet", files=3):
    write = write_parquet if kind == "parquet" else write_csv
    folder = write(tmp_path / f"{kind}{files}", frame, files)
    return tabular.find(kind, str(folder), write_schema(tmp_path / "s.yaml"))


def stable_parts(order):
    parts = np.empty(len(order), np.int8)
    first, second = len(order) * 8 // 10, len(order) * 9 // 10
    for part, rows in enumerate(np.split(order, [first, second])):
        parts[rows] = part
    return parts


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("split", ["random", "temporal", "user", "official"])
def test_files_and_chunks_do_not_matter(tmp_path, frame, kind, split, monkeypatch):
    whole = parts_of(open_log(tmp_path, frame, kind, files=1), split, 3, tmp_path)
    monkeypatch.setattr(tabular, "CHUNK_ROWS", 64)
    monkeypatch.setattr("m3oe_fast.data.log_files.CHUNK_ROWS", 64)
    monkeypatch.setattr("m3oe_fast.data.log_files.CSV_BLOCK_BYTES", 4096)
    cut = open_log(tmp_path, frame, kind, files=7)
    assert sum(1 for _ in cut.chunks(("click",))) > 7
    assert np.array_equal(parts_of(cut, split, 3, tmp_path), whole)
    assert set(whole) == {0, 1, 2}


def test_official_and_temporal_are_exact(tmp_path, frame):
    log = open_log(tmp_path, frame)
    assert np.array_equal(parts_of(log, "official", 0, tmp_path), stable_parts(np.arange(1000)))
    order = np.argsort(frame["time"].to_numpy(), kind="stable")
    assert np.array_equal(parts_of(log, "temporal", 0, tmp_path), stable_parts(order))


@given(st.lists(st.sampled_from([-(2**63), -1, 0, 1, 5, 2**40, 2**63 - 1]), min_size=10, max_size=60))
def test_temporal_with_many_ties_and_extreme_keys(tmp_path_factory, times):
    scratch = tmp_path_factory.mktemp("t")
    frame = make_frame(len(times)).assign(time=np.array(times, np.int64))
    log = open_log(scratch, frame, files=2)
    wanted = stable_parts(np.argsort(frame["time"].to_numpy(), kind="stable"))
    assert np.array_equal(parts_of(log, "temporal", 0, scratch), wanted)


@pytest.mark.parametrize("kind", ["datetime", "text", "float"])
def test_temporal_with_other_types(tmp_path, frame, kind):
    wanted = stable_parts(np.argsort(frame["time"].to_numpy(), kind="stable"))
    dates = pd.to_datetime(frame["time"], unit="s")
    column = {
        "datetime": dates,
        "text": dates.dt.strftime("%Y-%m-%dT%H:%M:%S"),
        "float": frame["time"] - 100.5,
    }[kind]
    log = open_log(tmp_path, frame.assign(time=column))
    assert np.array_equal(parts_of(log, "temporal", 0, tmp_path), wanted)


def test_temporal_reads_its_spilled_keys_in_blocks(tmp_path, frame, monkeypatch):
    monkeypatch.setattr(stream_split, "_READ_ROWS", 7)
    wanted = stable_parts(np.argsort(frame["time"].to_numpy(), kind="stable"))
    assert np.array_equal(parts_of(open_log(tmp_path, frame), "temporal", 0, tmp_path), wanted)


def test_temporal_leaves_no_file(tmp_path, frame):
    log = open_log(tmp_path, frame)
    (tmp_path / "scratch").mkdir()
    make_split(log, "temporal", 0, tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_random_is_8_1_1_and_follows_the_seed(tmp_path):
    log = open_log(tmp_path, make_frame(20_000))
    parts = parts_of(log, "random", 0, tmp_path)
    shares = np.bincount(parts) / len(parts)
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 6 * np.sqrt(0.16 / len(parts))
    other = parts_of(log, "random", 1, tmp_path)
    assert 0.5 < (parts == other).mean() < 0.8  # 0.66 by chance


def test_user_puts_no_user_into_two_parts(tmp_path, frame):
    parts = parts_of(open_log(tmp_path, frame), "user", 5, tmp_path)
    users = frame["user_id"].astype(object).where(frame["user_id"].notna(), "nobody")
    assert (pd.Series(parts).groupby(users).nunique() == 1).all()
    assert len(set(parts[frame["user_id"].isna()])) == 1
    assert not np.array_equal(parts, parts_of(open_log(tmp_path, frame), "user", 6, tmp_path))


@pytest.mark.parametrize(
    ("split", "seed", "schema", "message"),
    [
        ("best", 0, "", "--split 'best' is unknown; choose one of"),
        ("random", -1, "", "--split_seed -1 is negative"),
        ("user", 0, "", "split user needs a user; name its column in the schema"),
        ("temporal", 0, "", "split temporal needs a timestamp; name its column in the schema"),
    ],
)
def test_impossible_splits(tmp_path, frame, split, seed, schema, message):
    folder = write_parquet(tmp_path / "p", frame)
    log = tabular.find("parquet", str(folder), write_schema(tmp_path / "s.yaml", "ids: [item]\nlabels: {c: click}\n"))
    with pytest.raises(DataError, match=message):
        make_split(log, split, seed, tmp_path)


def test_a_row_without_time_is_named(tmp_path, frame):
    time = frame["time"].astype("Int64")
    time[420] = pd.NA
    log = open_log(tmp_path, frame.assign(time=time))
    with pytest.raises(DataError, match=r"part-1.parquet, row 87 \(row group 0\), field time: is empty, and split"):
        make_split(log, "temporal", 0, tmp_path)
