"""load(): prepares once, finds it again, mends damage, and leaves the source as it is."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch

from m3oe_fast.data import DataOptions, Encoder, load, load_options, recbole
from m3oe_fast.data.loading import default_cache_dir
from m3oe_fast.errors import DataError

from .log_files import GENRE_FLAGS, edit, make_ratings, write_1m, write_100k, write_recbole

ROLES = {"domain_column": "age", "domain_bins": "25,35", "labels": "click=rating>3,like=rating>4"}


@pytest.fixture
def source(tmp_path):
    return write_recbole(tmp_path / "source", make_ratings())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def load_source(source, cache, **options):
    return load(f"recbole:{source}", cache_dir=str(cache), **{**ROLES, **options})


def test_surface(source, cache):
    dataset = load_source(source, cache, split="user", split_seed=4)
    assert (dataset.name, dataset.split, dataset.best_auc) == ("recbole:ml-100k", "user", None)
    assert dataset.schema.tasks == ("click", "like")
    assert dataset.schema.domains == ("<25", "25-34", ">=35")
    assert isinstance(dataset.encoder, Encoder)
    total = sum(len(part) for part in (dataset.train, dataset.val, dataset.test))
    assert total == len(make_ratings().rows)
    ids, dense, domain, label, _, _ = dataset.train.take(np.arange(5))
    assert ids.shape == (5, len(dataset.schema.fields))
    assert dense.shape == (5, 0)
    assert domain.dtype == torch.int64
    assert label.shape == (5, 2)
    sizes = torch.tensor(dataset.schema.vocab_sizes)
    assert all((batch.ids < sizes).all() for batch in dataset.test.batches(16))


def test_summary_names_split_rows_and_users(source, cache):
    lines = load_source(source, cache, split="user", split_seed=4).summary()
    assert lines[0].startswith("data recbole:ml-100k, split user (split seed 4); rows and (users)")
    assert lines[2].split()[:4] == ["train", *lines[2].split()[1:2], "24", "0"]
    assert lines[4].split()[2:4] == ["3", "3"], "test users are new under the user split"


def test_summary_of_many_domains_stays_short(source, cache):
    dataset = load_source(source, cache, domain_column="user_id", domain_bins=None)
    lines = dataset.summary()
    assert len(dataset.schema.domains) == 30
    assert "(22 more)" in lines[1]
    assert len(dataset.warnings) < 15
    assert max(map(len, lines[:5])) < 160


def test_second_load_reads_no_source_again(source, cache, monkeypatch):
    first = load_source(source, cache)
    monkeypatch.setattr(recbole, "read_atomic", None)
    assert load_source(source, cache).folder == first.folder


def test_key_follows_content_schema_split_and_seed(source, cache):
    folders = {
        load_source(source, cache, **options).folder
        for options in (
            {},
            {"split": "user"},
            {"split_seed": 1},
            {"domain_bins": "25"},
            {"labels": "click=rating>3"},
            {"drop_columns": "gender"},
        )
    }
    edit(source / "ml-100k.user", "writer", "reader")
    folders.add(load_source(source, cache).folder)
    assert len(folders) == 7
    assert {path for path in cache.iterdir()} == folders


@pytest.mark.parametrize("file", ["train.arrow", "encoder.json", "manifest.json", "dataset.json"])
def test_damaged_entry_is_rebuilt(source, cache, file):
    before = load_source(source, cache)
    wanted = before.train.take(np.arange(20))
    path = before.folder / file
    path.write_bytes(path.read_bytes()[:-7])
    again = load_source(source, cache)
    assert again.folder == before.folder
    assert all(map(torch.equal, again.train.take(np.arange(20))[:3], wanted[:3]))
    assert len(list(cache.iterdir())) == 1


def test_half_written_entry_is_rebuilt(source, cache):
    folder = load_source(source, cache).folder
    (folder / "manifest.json").unlink()
    (folder / "test.arrow").unlink()
    assert len(load_source(source, cache).test) > 0


def test_bad_source_leaves_no_trace(source, cache):
    edit(source / "ml-100k.inter", "\t", ",")
    with pytest.raises(DataError, match="row 1"):
        load_source(source, cache)
    assert not cache.exists()


def test_impossible_split_leaves_no_trace(tmp_path, cache):
    small = write_recbole(tmp_path / "small", make_ratings(rows=4))
    with pytest.raises(DataError, match=r"split random leaves val without rows \(4 rows in all\)"):
        load_source(small, cache)
    assert list(cache.iterdir()) == []


def test_source_is_never_written(source, cache):
    before = {path: path.read_bytes() for path in source.iterdir()}
    for path in before:
        path.chmod(0o444)
    source.chmod(0o555)
    load_source(source, cache)
    source.chmod(0o755)
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_default_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "m3oe_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "m3oe_fast"


def test_cache_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written: .*; choose another folder"):
        load_source(source, tmp_path / "file")


def test_prepared_folder_by_name(source, tmp_path):
    options = DataOptions(data=f"recbole:{source}", split="user", split_seed=4, **ROLES)
    written = load_options(options, tmp_path / "out")
    opened = load(f"prepared:{tmp_path / 'out'}")
    assert opened.identity == written.identity
    assert (opened.split, opened.split_seed) == ("user", 4)
    with pytest.raises(DataError, match="prepared with split user, not temporal; drop --split"):
        load(f"prepared:{tmp_path / 'out'}", split="temporal")
    load(f"prepared:{tmp_path / 'out'}", split="user", split_seed=4)
    with pytest.raises(DataError, match="prepared with split seed 4, not 5; drop --split_seed"):
        load(f"prepared:{tmp_path / 'out'}", split_seed=5)
    (tmp_path / "out" / "val.arrow").unlink()
    with pytest.raises(DataError, match=r"val\.arrow: No such file.*write the folder again"):
        load(f"prepared:{tmp_path / 'out'}")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        load(f"prepared:{tmp_path / 'nowhere'}")


def test_out_folder_of_another_log_is_kept(source, tmp_path):
    options = DataOptions(data=f"recbole:{source}", **ROLES)
    load_options(options, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert load_options(options, tmp_path / "out").identity == facts["identity"]
    edit(source / "ml-100k.user", "writer", "reader")
    with pytest.raises(DataError, match="out: holds recbole:ml-100k, split random, or an older"):
        load_options(options, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("movielens", {}, "--data 'movielens' is unknown; choose one of demo, recbole:PATH"),
        ("recbole:", {}, "of which path"),
        ("recbole:/no/where", {}, "/no/where: no such file or folder"),
        ("parquet:", {}, "of which path"),
        ("csv:/no/where", {}, "/no/where: no such file or folder"),
        ("demo", {"schema": "s.yaml"}, "--schema describes parquet: and csv: logs; demo fixes its own"),
        ("recbole:x", {"schema": "s.yaml"}, "--schema describes parquet: and csv: logs; recbole:x fixes its own"),
        ("parquet:x", {"labels": "a=b"}, "--labels describes recbole: logs; --schema describes its columns"),
        ("csv:x", {"data_path": "y"}, "--data_path does not go with csv:PATH"),
        ("prepared:x", {"schema": "s.yaml"}, "--schema does not go with prepared:x"),
        ("demo", {"labels": "a=b>1"}, "--labels describes recbole: logs; demo fixes its own"),
        ("demo", {"data_path": "ml-1m.zip"}, "--data_path does not go with demo"),
        ("prepared:" + "x" * 300, {}, "cannot be read: File name too long"),
        ("demo", {"split": "best"}, "--split 'best' is unknown"),
        ("demo", {"split_seed": -1}, "--split_seed -1 is negative"),
        ("movielens-1m", {"data_path": "/no/where"}, "/no/where: no such file or folder"),
    ],
)
def test_bad_options(name, options, message, cache):
    with pytest.raises(DataError, match=message):
        load(name, **options, cache_dir=str(cache))


def test_movielens_1m_end_to_end(tmp_path, cache):
    dataset = load("movielens-1m", str(write_1m(tmp_path / "ml", make_ratings())), cache_dir=str(cache))
    assert dataset.schema.dense == ("age",)
    assert any("complete log" in line for line in dataset.warnings)
    frame_like = dataset.encoder.to_dict()
    assert Encoder.from_dict(json.loads(json.dumps(frame_like))) == dataset.encoder


def test_path_spelled_otherwise_is_the_same_entry(source, cache, monkeypatch):
    monkeypatch.chdir(source.parent)
    assert load_source(source, cache).folder == load_source(os.path.join(".", source.name), cache).folder


@pytest.mark.parametrize("option", ["data_path", "domain_column", "domain_bins", "labels", "drop_columns"])
def test_prepared_folder_takes_no_options_of_a_log(option, source, tmp_path):
    load_options(DataOptions(data=f"recbole:{source}", **ROLES), tmp_path / "out")
    with pytest.raises(DataError, match=f"--{option} does not go with prepared:.*whose rows are fixed"):
        load(f"prepared:{tmp_path / 'out'}", **{option: "age"})


def test_prepared_folder_is_not_prepared_again(source, tmp_path):
    load_options(DataOptions(data=f"recbole:{source}", **ROLES), tmp_path / "out")
    with pytest.raises(DataError, match=r"again: prepared:.* is prepared already"):
        load_options(DataOptions(data=f"prepared:{tmp_path / 'out'}"), tmp_path / "again")


def test_long_names_of_logs(tmp_path, cache):
    folder = write_recbole(tmp_path / "long", make_ratings(), "x" * 240)
    assert len(load_source(folder, cache).folder.name) < 150


def raw_recbole(folder):
    """The rows of the files as text, joined, every column under its own name."""
    tables = []
    for kind in ("inter", "user", "item"):
        table = pd.read_csv(folder / f"ml-100k.{kind}", sep="\t", dtype=str, quoting=3, keep_default_na=False)
        tables.append(table.rename(columns=lambda name: name.partition(":")[0]))
    return tables[0].merge(tables[1], on="user_id").merge(tables[2], on="item_id")


def raw_1m(folder):
    names = {
        "ratings": ["user_id", "movie_id", "rating", "timestamp"],
        "users": ["user_id", "gender", "age", "occupation", "zip"],
        "movies": ["movie_id", "title", "genres"],
    }
    log, users, movies = (
        pd.DataFrame(
            [line.split("::") for line in (folder / f"{kind}.dat").read_text("latin-1").splitlines()], columns=columns
        )
        for kind, columns in names.items()
    )
    return log.merge(users, on="user_id").merge(movies, on="movie_id")


def raw_100k(folder):
    """As users of u.item have it: the genre flags turned into texts."""
    log = pd.read_csv(folder / "u.data", sep="\t", names=["user_id", "item_id", "rating", "timestamp"])
    users = pd.read_csv(
        folder / "u.user",
        sep="|",
        names=["user_id", "age", "gender", "occupation", "zip_code"],
        dtype={"zip_code": str},
    )
    names = ["item_id", "title", "release", "video", "url", *GENRE_FLAGS]
    items = pd.read_csv(folder / "u.item", sep="|", names=names, encoding="latin-1", quoting=3)
    flags = items[GENRE_FLAGS].to_numpy()
    items["genres"] = ["|".join(np.array(GENRE_FLAGS)[row == 1]) for row in flags]
    return log.merge(users, on="user_id").merge(items[["item_id", "genres"]], on="item_id")


@pytest.mark.parametrize(
    ("name", "writer", "raw"),
    [
        ("recbole", write_recbole, raw_recbole),
        ("movielens-100k", write_recbole, raw_recbole),
        ("movielens-100k", write_100k, raw_100k),
        ("movielens-1m", write_1m, raw_1m),
    ],
)
def test_raw_rows_are_encoded_as_the_prepared_ones(name, writer, raw, tmp_path, cache):
    ratings = make_ratings(300)
    ratings.rows.sort(key=lambda row: row[3])
    folder = writer(tmp_path / "log", ratings)
    if name == "recbole":
        dataset = load_source(folder, cache, split="official")
    else:
        dataset = load(name, str(folder), split="official", cache_dir=str(cache))
    frame = raw(folder)
    assert frame["timestamp"].astype(int).is_monotonic_increasing
    batch = dataset.encoder.transform(frame[-len(dataset.test) :], labels=True)
    wanted = dataset.test.take(np.arange(len(dataset.test)))
    for found, stored in zip(batch[:4], wanted[:4], strict=True):
        assert torch.equal(found, stored)
    genre = dataset.schema.fields.index("class" if name == "recbole" else "genre")
    assert batch.ids[:, genre].all(), "an unknown genre: the first of several was not looked up"
