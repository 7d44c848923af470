"""Streamed logs: prepared rows are those of a simple reading of the frame, in bounded memory, or nothing is left."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from bench import generated
from m3oe_fast.data import Encoder, load, stream_build
from m3oe_fast.data.columns import id_text
from m3oe_fast.data.hashing import buckets_of, user_codes
from m3oe_fast.data.store import PartFile

from .tabular_files import as_lists, make_frame, write_csv, write_parquet, write_schema

PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("log")


@pytest.fixture(scope="module")
def frame():
    return make_frame(3000)


@pytest.fixture(scope="module")
def dataset(place, frame):
    """Split official: the rows of a part are known."""
    folder = write_parquet(place / "log", frame, files=4)
    return load(
        f"parquet:{folder}", schema=write_schema(place / "s.yaml"), split="official", cache_dir=str(place / "cache")
    )


def rows_of(frame, part):
    first, second = len(frame) * 8 // 10, len(frame) * 9 // 10
    return frame[{"train": slice(0, first), "val": slice(first, second), "test": slice(second, None)}[part]]


def text(value):
    return "" if value is None or value is pd.NA or value != value else id_text(value)


def column(dataset, part, name):
    return np.concatenate([s[name] for s in PartFile(dataset.folder / f"{part}.arrow").segments])


def all_of(dataset, part):
    part = getattr(dataset, part)
    return part.take(np.arange(len(part)))


def test_sizes_and_names(dataset):
    schema = dataset.schema
    assert schema.fields == ("user_id", "item", "query", "domain")
    assert (schema.bags, schema.bag_pooling) == (("genres", "words"), ("mean", "sum"))
    assert (schema.dense, schema.tasks, schema.weighted) == (("price",), ("click", "long_view"), True)
    assert schema.domains == ("home", "live", "shop")
    assert schema.vocab_sizes[2:] == (51, 4)
    assert schema.bag_vocab_sizes == (1 + 3, 21)


def test_vocabularies_count_training_rows_only(dataset, frame):
    train = rows_of(frame, "train")
    counts = Counter(map(text, train["item"]))
    wanted = {item for item, count in counts.items() if item and count >= 3}
    assert set(dataset.encoder.vocabularies["item"]) == wanted
    assert {count for item, count in counts.items() if item} & {1, 2}, "no rare item: the test proves little"
    assert set(dataset.encoder.vocabularies["user_id"]) == set(map(text, train["user_id"])) - {""}
    assert dataset.encoder.scalers["price"] == (train["price"].min(), train["price"].max())


@pytest.mark.parametrize("part", PARTS)
def test_rows_are_those_of_a_simple_reading(dataset, frame, part):
    rows, batch, encoder = rows_of(frame, part), all_of(dataset, part), dataset.encoder
    for number, name in enumerate(("user_id", "item")):
        known = {found: place for place, found in enumerate(encoder.vocabularies[name], start=1)}
        assert batch.ids[:, number].tolist() == [known.get(text(value), 0) for value in rows[name]]
    assert batch.ids[:, 2].tolist() == buckets_of([str(value) for value in rows["query"]], 50).tolist()
    assert batch.domain.tolist() == [("home", "live", "shop").index(tab) for tab in rows["tab"]]
    assert batch.ids[:, 3].tolist() == (batch.domain + 1).tolist()
    low, high = encoder.scalers["price"]
    scaled = ((rows["price"].clip(low, high) - low) / (high - low)).to_numpy(np.float32)
    assert np.array_equal(batch.dense[:, 0], scaled)
    assert np.array_equal(batch.label[:, 0], rows["click"], equal_nan=True)
    longer = np.where(rows["seconds"].isna(), np.nan, rows["seconds"] >= 30)
    assert np.array_equal(batch.label[:, 1], longer, equal_nan=True)
    assert np.array_equal(batch.row_weight, rows["weight"])
    users = user_codes([text(value) for value in rows["user_id"]])
    assert np.array_equal(column(dataset, part, "user"), users)
    assert (users == -1).any()
    known = {found: place for place, found in enumerate(encoder.vocabularies["genres"], start=1)}
    wanted = [[known[text(v).replace("5.0", "5")] for v in values.split("|") if v] for values in rows["genres"]]
    ends = batch.bags[0].offsets.tolist()
    assert [batch.bags[0].values[a:b].tolist() for a, b in pairwise(ends)] == wanted
    words = [word for values in rows["words"] for word in values.split()]
    assert batch.bags[1].values.tolist() == buckets_of(words, 20).tolist()


@pytest.mark.parametrize("lists", [False, True])
def test_frames_are_encoded_as_the_log_was(dataset, frame, lists):
    encoder = Encoder.from_dict(json.loads(json.dumps(dataset.encoder.to_dict(), allow_nan=False)))
    assert encoder == dataset.encoder
    rows = rows_of(frame, "test")
    batch = encoder.transform((as_lists(rows) if lists else rows).drop(columns="weight"), labels=True)
    stored = all_of(dataset, "test")
    assert torch.equal(batch.ids, stored.ids) and (batch.ids == 0).any()
    assert torch.equal(batch.dense, stored.dense)
    assert torch.equal(batch.domain, stored.domain)
    assert np.array_equal(batch.label, stored.label, equal_nan=True)
    assert batch.row_weight is None
    for one, two in zip(batch.bags, stored.bags, strict=True):
        assert torch.equal(one.values, two.values) and torch.equal(one.offsets, two.offsets)


@pytest.mark.parametrize("split", ["random", "temporal", "user", "official"])
def test_csv_holds_the_same_rows(place, dataset, frame, split):
    options = {"schema": str(place / "s.yaml"), "split": split, "cache_dir": str(place / "cache")}
    csv = load(f"csv:{write_csv(place / 'csv', frame)}", **options)
    parquet = load(f"parquet:{place / 'log'}", **options)
    assert csv.counts == parquet.counts
    assert csv.encoder == parquet.encoder
    for one, two in zip(all_of(csv, "val")[:4], all_of(parquet, "val")[:4], strict=True):
        assert np.array_equal(one, two, equal_nan=True)


def test_counts_are_exact(dataset, frame):
    known = set(rows_of(frame, "train")["user_id"].dropna())
    for part in PARTS:
        rows = rows_of(frame, part)
        count = dataset.counts[part]
        assert (count["rows"], count["users"]) == (len(rows), rows["user_id"].nunique())
        assert count["new_users"] == len(set(rows["user_id"].dropna()) - known)
        for name, own in rows.groupby("tab"):
            assert count["domains"][name] == {"rows": len(own), "users": own["user_id"].nunique()}


def test_users_are_counted_alike_in_many_passes(dataset, monkeypatch):
    rows = np.array([[d["rows"] for d in dataset.counts[part]["domains"].values()] for part in PARTS])
    whole = stream_build.count_users(dataset.folder, rows)
    monkeypatch.setattr(stream_build, "USERS_AT_A_TIME", 100)
    monkeypatch.setattr(stream_build, "BLOCK_ROWS", 64)
    assert stream_build.count_users(dataset.folder, rows) == whole
    assert [total for total, _, _ in whole] == [dataset.counts[part]["users"] for part in PARTS]


def test_leaks_are_warned_of(place, frame):
    leaky = frame.assign(paid=frame["click"].fillna(0) * 7)
    folder = write_parquet(place / "leaky", leaky)
    schema = write_schema(place / "leaky.yaml", "ids: [user_id, paid]\nuser: user_id\nlabels: {click: click}\n")
    warnings = load(f"parquet:{folder}", schema=schema, cache_dir=str(place / "cache")).warnings
    assert len(warnings) == 1 and warnings[0].startswith("feature paid alone predicts task click with AUC 1.0000")


def test_rows_without_any_label_are_kept(place, frame):
    folder = write_parquet(place / "empty", frame.assign(click=np.nan, seconds=np.nan))
    data = load(f"parquet:{folder}", schema=str(place / "s.yaml"), cache_dir=str(place / "cache"))
    assert sum(data.counts[part]["rows"] for part in PARTS) == len(frame)
    assert torch.isnan(all_of(data, "train").label).all()
    assert any("0 positive and 0 negative labels" in line for line in data.warnings)


def test_an_encoder_without_the_new_keys_is_read(dataset):
    values = dataset.encoder.to_dict()
    for name in ("buckets", "bag_separators"):
        del values[name]
    for name in ("bags", "bag_vocab_sizes", "bag_pooling", "weighted"):
        del values["schema"][name]
    assert Encoder.from_dict(values).buckets == {}


def command(place, *argv, limit=None):
    line = [sys.executable, "-m", "m3oe_fast.prepare", *argv]
    limits = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(line, capture_output=True, text=True, preexec_fn=limits)


def test_command_prepares_and_training_data_opens(place, dataset):
    out = place / "out"
    done = command(place, f"parquet:{place / 'log'}", "--schema", str(place / "s.yaml"), "--out", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    assert "data parquet:log, split random (split seed 0)" in done.stdout
    assert len(load(f"prepared:{out}").train) > 2000


@pytest.mark.parametrize("split", ["random", "temporal"])
def test_full_disk_leaves_nothing(place, dataset, split):
    out = place / "full" / "out"
    line = [f"parquet:{place / 'log'}", "--schema", str(place / "s.yaml"), "--split", split, "--out", str(out)]
    done = command(place, *line, limit=20_000)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {out}: cannot be written: ")
    assert not list(out.parent.iterdir())


def test_out_that_cannot_be_a_folder(place, dataset):
    (place / "file").write_text("x")
    done = command(
        place, f"parquet:{place / 'log'}", "--schema", str(place / "s.yaml"), "--out", str(place / "file" / "out")
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "cannot be" in done.stderr


def test_missing_file_fails_in_one_line(place):
    done = command(place, "parquet:no/where", "--schema", "s.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no/where: no such file or folder; check the path\n"


MEASURE = """
import re, sys
import m3oe_fast.prepare
# Not ru_maxrss: it begins with what the parent had.
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
assert m3oe_fast.prepare.main(sys.argv[1:]) == 0
print(peak() - before)
"""


def peak_of(folder, out):
    line = [sys.executable, "-c", MEASURE, f"parquet:{folder}", "--schema", f"{folder}/schema.yaml", "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_bounded(tmp_path):
    """Here 3 M rows take 300 MB in memory before anything is made of them, and 140 MB when they are prepared."""
    generated.write(tmp_path / "log", 3_000_000, users=20_000, items=5_000, block_rows=1 << 16)
    assert peak_of(tmp_path / "log", str(tmp_path / "out")) < 500 << 20
