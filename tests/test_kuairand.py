"""KuaiRand: what is prepared is what pandas joins; --tabs, --exposure and --protocol; faults name file and row."""

import dataclasses
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from m3oe_fast.data import kuairand, load
from m3oe_fast.data.hashing import user_codes
from m3oe_fast.data.published_counts import Counts
from m3oe_fast.errors import DataError

from .kuairand_files import frames, packed, write
from .log_files import edit

OUTCOMES = (
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
    *("play_time_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter"),
)
VIDEOS = "video_features_basic_pure.csv"
USERS = "user_features_pure.csv"
FIRST = "log_standard_4_08_to_4_21_pure.csv"


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "KuaiRand-Pure")


def prepare(tmp_path, place, name="kuairand-pure", **options):
    return load(name, str(place), cache_dir=str(tmp_path / "cache"), **options)


def refused(tmp_path, place, message, **options):
    """One line, and no file is left, neither prepared nor unpacked."""
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, place, **options)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def joined(folder, tabs=("0", "1", "4"), name="pure"):
    """The kept rows as pandas joins them, in file order, all values as texts."""
    views, users, videos = frames(folder, name)
    views = views[views["tab"].isin(tabs)]
    return views.merge(users, "left", "user_id").merge(videos, "left", "video_id").reset_index(drop=True)


def canonical(value):
    return "" if value != value else re.sub(r"\.0+$", "", value)


def decoded(dataset, part="train"):
    """The id fields and the tags of a part as texts, "" where unknown."""
    batch = getattr(dataset, part).take(np.arange(len(getattr(dataset, part))))
    columns = {}
    for place, name in enumerate(dataset.schema.fields):
        texts = np.array(["", *dataset.encoder.vocabularies[name]], object)
        columns[name] = texts[batch.ids[:, place].numpy()].tolist()
    texts = ["", *dataset.encoder.vocabularies["tag"]]
    (bag,) = batch.bags
    ends = [*bag.offsets.tolist(), len(bag.values)]
    columns["tag"] = [[texts[code] for code in bag.values[a:b].tolist()] for a, b in pairwise(ends)][: len(batch.ids)]
    return columns, batch


def test_rows_are_those_that_pandas_joins(tmp_path, folder):
    dataset = prepare(tmp_path, folder, split="official")
    wanted = joined(folder)
    train = len(wanted) * 8 // 10
    columns, batch = decoded(dataset)
    assert len(dataset.train) == train
    for name in dataset.schema.fields:
        if name not in ("domain", "duration_bin"):
            assert columns[name] == wanted[name][:train].map(canonical).tolist(), name
    bins = kuairand.duration_bin(wanted["duration_ms"].astype(float).to_numpy())
    assert columns["duration_bin"] == [str(code) for code in bins[:train]]
    tags = wanted["tag"][:train].map(lambda tags: [] if tags != tags else tags.split(","))
    assert columns["tag"] == tags.tolist()
    assert dataset.schema.domains == ("0", "1", "4")
    assert batch.domain.tolist() == [("0", "1", "4").index(tab) for tab in wanted["tab"][:train]]
    assert np.array_equal(batch.label.numpy(), wanted[["is_click", "long_view"]][:train].astype(np.float32))
    assert np.array_equal(dataset.train.users(0, train), user_codes(wanted["user_id"][:train].tolist()))


def test_no_outcome_is_a_feature(tmp_path, folder):
    dataset = prepare(tmp_path, folder)
    features = {*dataset.schema.fields, *dataset.schema.bags, *dataset.schema.dense}
    assert not features & {*OUTCOMES, "tab", "time_ms", "date"}
    assert dataset.schema.tasks == ("click", "long_view")
    assert dataset.schema.bags == ("tag",)
    used = set().union(
        *(set(file.types) for file in kuairand.find("kuairand-pure", str(folder), None, None, tmp_path).files)
    )
    assert "play_cnt" not in used


def test_raw_rows_are_encoded_as_the_prepared_ones(tmp_path, folder):
    dataset = prepare(tmp_path, folder, split="official")
    rows = joined(folder)[: len(dataset.train)]
    duration = kuairand.duration_bin(rows["duration_ms"].astype(float).to_numpy())
    frame = rows.assign(duration_bin=duration.astype(str), tag=rows["tag"].fillna(""))
    batch = dataset.encoder.transform(frame, labels=True)
    stored = dataset.train.take(np.arange(len(dataset.train)))
    assert np.array_equal(batch.ids, stored.ids) and np.array_equal(batch.label, stored.label)
    assert np.array_equal(batch.bags[0].values, stored.bags[0].values)


def test_duration_bins():
    assert kuairand.duration_bin(np.array([0.0, -5.0, 999.0, 6_999.0, 7_000.0, 18_000.0])).tolist() == [
        0,
        0,
        3,
        11,
        12,
        16,
    ]


def test_tabs_choose_and_order_the_domains(tmp_path, folder):
    dataset = prepare(tmp_path, folder, tabs="4, 0")
    counts = Counter(frames(folder)[0]["tab"])
    assert dataset.schema.domains == ("4", "0")
    assert dataset.notes == (
        f"rows by tab: 4: {counts['4']}, 0: {counts['0']}; left out {counts['1'] + counts['2']} "
        + "({})".format(", ".join(f"{tab}: {counts[tab]}" for tab in sorted("12", key=lambda tab: -counts[tab]))),
    )
    assert dataset.notes[0] in dataset.summary()
    rows = {name: sum(dataset.counts[part]["domains"][name]["rows"] for part in dataset.counts) for name in ("4", "0")}
    assert rows == {"4": counts["4"], "0": counts["0"]}
    assert "none left out" in prepare(tmp_path, folder, tabs="0,1,2,4").notes[0]


@pytest.mark.parametrize(
    ("tabs", "message"),
    [
        ("", "--tabs '': '' is no tab; write numbers as in 0,1,4"),
        ("0,x", "'x' is no tab"),
        ("0,01", "'01' is no tab"),
        ("0,1,0", "0 occurs twice"),
        ("1,9", "field tab: no row has 9, which is to be a domain; the values are 0, 1, 2, 4"),
    ],
)
def test_wrong_tabs(tmp_path, folder, tabs, message):
    refused(tmp_path, folder, message, tabs=tabs)


def test_the_random_log_can_be_left_out(tmp_path, folder):
    refused(tmp_path, folder, "--exposure 'all' is unknown; choose standard or random", exposure="all")
    views = frames(folder)[0]
    for exposure, mine in (("standard", views[:600]), ("random", views[600:])):
        dataset = prepare(tmp_path, folder, exposure=exposure)
        rows = len(dataset.train) + len(dataset.val) + len(dataset.test)
        assert rows == mine["tab"].isin(["0", "1", "4"]).sum()
    (folder / "data" / "log_random_4_22_to_5_08_pure.csv").unlink()
    assert len(prepare(tmp_path, folder, exposure="standard", split="user").train)


def test_options_of_kuairand_are_refused_elsewhere():
    for option in ({"tabs": "0"}, {"exposure": "random"}):
        with pytest.raises(DataError, match=rf"--{next(iter(option))} describes kuairand-pure and kuairand-1k"):
            load("demo", **option)


@pytest.mark.parametrize("split", ["random", "temporal", "user", "official"])
def test_every_split_divides_the_kept_rows_only(tmp_path, folder, split):
    dataset = prepare(tmp_path, folder, split=split)
    wanted = joined(folder)
    parts = (dataset.train, dataset.val, dataset.test)
    assert sum(map(len, parts)) == len(wanted)
    if split == "official":
        assert len(dataset.train) == len(wanted) * 8 // 10
    if split == "temporal":
        order = wanted["time_ms"].astype(int).sort_values(kind="stable").index[: len(wanted) * 8 // 10]
        mine = user_codes(wanted["user_id"][sorted(order)].tolist())
        assert np.array_equal(dataset.train.users(0, len(dataset.train)), mine)


def test_the_archive_is_unpacked_once_and_gives_the_same(tmp_path, folder, monkeypatch):
    archive = packed(folder, tmp_path / "KuaiRand-Pure.tar.gz")
    before = (archive.stat().st_mtime_ns, sorted(path.name for path in tmp_path.iterdir()))
    dataset = prepare(tmp_path, archive)
    (unpacked,) = (tmp_path / "cache").glob("kuairand-pure-files-*")
    assert sorted(path.name for path in unpacked.iterdir()) == sorted(
        [*(f"{log}_pure.csv" for log in (*kuairand.STANDARD, *kuairand.RANDOM)), USERS, VIDEOS]
    )
    times = {path: path.stat().st_mtime_ns for path in unpacked.iterdir()}
    assert prepare(tmp_path, archive, tabs="1").schema.domains == ("1",)
    assert {path: path.stat().st_mtime_ns for path in unpacked.iterdir()} == times
    assert before == (archive.stat().st_mtime_ns, sorted({path.name for path in tmp_path.iterdir()} - {"cache"}))
    assert prepare(tmp_path, folder / "data").folder == dataset.folder
    assert prepare(tmp_path, folder).folder == dataset.folder


def test_damaged_archives(tmp_path, folder):
    archive = packed(folder, tmp_path / "a.tar.gz")
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    refused(tmp_path, archive, "a.tar.gz: is damaged .*; fetch the file again")
    archive.write_bytes(b"no archive")
    refused(tmp_path, archive, "a.tar.gz: is damaged .*; fetch the file again")
    (folder / "data" / VIDEOS).unlink()
    refused(tmp_path, packed(folder, archive), f"a.tar.gz: lacks {VIDEOS}; fetch")


def test_files_that_are_missing(tmp_path, folder):
    refused(tmp_path, tmp_path / "gone", "gone: no such file or folder")
    (folder / "data" / USERS).unlink()
    (folder / "data" / FIRST).unlink()
    refused(tmp_path, folder, f"KuaiRand-Pure: lacks {FIRST}, {USERS}; fetch KuaiRand-Pure.tar.gz from https")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (FIRST, ",tab\n", ",tabb\n", "has no column tab .domain in the schema"),
        (FIRST, "video_id", "videoid", f"{FIRST}: has no column video_id; its columns are user_id, videoid"),
        (FIRST, "duration_ms", "duration", "has no column duration_ms; its columns are"),
        (USERS, "onehot_feat17", "onehot", f"{USERS}: has no column onehot_feat17; its columns are user_id"),
        (VIDEOS, "tag\n", "tags\n", f"{VIDEOS}: has no column tag; its columns are video_id, author_id"),
        (VIDEOS, "music_type", "music_id", f"{VIDEOS}: column music_id occurs twice"),
    ],
)
def test_columns_that_are_missing(tmp_path, folder, file, old, new, message):
    edit(folder / "data" / file, old, new)
    refused(tmp_path, folder, message)


def replace_field(path, row, field, value):
    """Change one value; row 2 is the first one after the header."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    frame.loc[row - 2, field] = value
    frame.to_csv(path, index=False)


@pytest.mark.parametrize(
    ("file", "row", "field", "value", "message"),
    [
        (FIRST, 5, "user_id", "u7", "row 5, field user_id: 'u7' is not a whole number"),
        (FIRST, 6, "is_click", "yes", "row 6, field is_click: 'yes' is not a number"),
        (FIRST, 7, "time_ms", "", "row 7, field time_ms: is empty, and split temporal needs it"),
        (USERS, 9, "user_id", "", f"{USERS}, row 9, field user_id: is empty"),
        (
            USERS,
            9,
            "user_id",
            "0",
            f"{USERS}, row 9, field user_id: 0 occurs a second time; keep one row for each user_id",
        ),
        (VIDEOS, 4, "video_id", "x", f"{VIDEOS}, row 4, field video_id: 'x' is not a whole number"),
    ],
)
def test_values_that_do_not_fit(tmp_path, folder, file, row, field, value, message):
    replace_field(folder / "data" / file, row, field, value)
    refused(tmp_path, folder, message, split="temporal")


def test_rows_are_counted_in_the_file_although_others_are_left_out(tmp_path, folder):
    path = folder / "data" / FIRST
    views = pd.read_csv(path)
    row = int(np.flatnonzero(views["tab"] == 1)[3])
    assert (views["tab"][:row] == 2).any()
    replace_field(path, row + 2, "long_view", "3")
    refused(tmp_path, folder, rf"{FIRST}, row {row + 2}, field long_view: label long_view is 3, not 0 or 1")


def test_a_line_that_is_cut_short(tmp_path, folder):
    path = folder / "data" / FIRST
    path.write_bytes(path.read_bytes()[:-9])
    refused(tmp_path, folder, rf"{FIRST}, row 301: 1\d columns where the header has 19")


def test_what_is_unknown_of_users_and_videos_stays_empty(tmp_path, folder):
    path = folder / "data" / VIDEOS
    videos = pd.read_csv(path, dtype=str)
    gone = frames(folder)[0]["video_id"].iloc[0]
    videos[videos["video_id"] != gone].to_csv(path, index=False)
    (folder / "data" / USERS).write_text((folder / "data" / USERS).read_text().partition("\n")[0] + "\n")
    replace_field(folder / "data" / FIRST, 3, "duration_ms", "")
    dataset = prepare(tmp_path, folder, tabs="0,1,2,4", split="official")
    columns, _ = decoded(dataset)
    rows = [place for place, video in enumerate(columns["video_id"]) if video == gone]
    assert rows and {columns[name][row] for row in rows for name in ("author_id", "music_id")} == {""}
    assert all(columns["tag"][row] == [] for row in rows)
    assert set(columns["onehot_feat0"]) == {""} and "" not in columns["user_id"]
    assert columns["duration_bin"].index("") == 1
    assert columns["author_id"].count("") == len(rows)


def test_rare_videos_of_1k_are_unknown(tmp_path):
    folder = write(tmp_path / "1k", rows=600, videos=400, name="1k")
    dataset = prepare(tmp_path, folder, "kuairand-1k", split="official")
    rows = joined(folder, name="1k")[: len(dataset.train)]
    for name in ("video_id", "author_id", "music_id"):
        counts = Counter(rows[name])
        assert set(dataset.encoder.vocabularies[name]) == {text for text, count in counts.items() if count >= 5}
    assert len(dataset.encoder.vocabularies["user_id"]) == rows["user_id"].nunique()


def published(folder, tabs):
    rows = joined(folder, tabs)
    groups = [rows[rows["tab"] == tab] for tab in tabs]
    distinct = {name: tuple(group[name].nunique() for group in groups) for name in ("user_id", "video_id")}
    return dataclasses.replace(kuairand.PUBLISHED, counts=Counts(tuple(map(len, groups)), distinct))


def test_the_counts_of_the_paper():
    assert kuairand.PUBLISHED.counts.rows == (178_087, 2_236_414, 93_165)
    assert sum(kuairand.PUBLISHED.counts.rows) == 2_507_666


def test_protocol_paper_checks_the_counts(tmp_path, folder, monkeypatch):
    refused(
        tmp_path,
        folder,
        r"--protocol paper: .* has 178,087 / 2,236,414 / 93,165 rows .*this log \d+ / \d+ / \d+ \(rows by value: "
        r"0: \d+, 1: \d+, 2: \d+, 4: \d+\); none of them has such a count, so no --tabs gives the published rows: use",
        protocol="paper",
    )
    monkeypatch.setattr(kuairand, "PUBLISHED", published(folder, ("0", "1", "4")))
    assert prepare(tmp_path, folder, protocol="paper").warnings == ()
    refused_line = r"--tabs 0,1,4 has those counts$"
    with pytest.raises(DataError, match=refused_line):
        prepare(tmp_path, folder, protocol="paper", tabs="4,1,0")
    monkeypatch.setattr(kuairand, "PUBLISHED", published(folder, ("0", "1", "2")))
    with pytest.raises(DataError, match=r"--tabs 0,1,2 has those counts$"):
        prepare(tmp_path, folder, protocol="paper")
    lines = (folder / "data" / FIRST).read_text().splitlines(keepends=True)
    (folder / "data" / FIRST).write_text("".join(line for line in lines if not line.endswith(",2\n")))
    with pytest.raises(DataError, match="only 0, 1 of them have such a count"):
        prepare(tmp_path, folder, protocol="paper")


def test_other_numbers_of_users_or_videos_give_a_warning(tmp_path, folder, monkeypatch):
    wanted = published(folder, ("0", "1", "4"))
    users = wanted.counts.distinct["user_id"]
    counts = Counts(wanted.counts.rows, {**wanted.counts.distinct, "user_id": (1, *users[1:])})
    monkeypatch.setattr(kuairand, "PUBLISHED", dataclasses.replace(wanted, counts=counts))
    (line,) = prepare(tmp_path, folder, protocol="paper").warnings
    assert line == (
        f"user_id has {users[0]} / {users[1]} / {users[2]} different values in the domains, "
        f"1 / {users[1]} / {users[2]} in the M3oE paper (Table 1), although the rows agree"
    )


def test_a_log_prepared_without_the_check_is_checked(tmp_path, folder):
    prepare(tmp_path, folder)
    with pytest.raises(DataError, match="--protocol paper"):
        prepare(tmp_path, folder, protocol="paper")


def test_protocol_paper_where_the_paper_has_no_counts(tmp_path):
    folder = write(tmp_path / "1k", name="1k")
    refused(tmp_path, folder, "the paper has no counts of kuairand-1k; drop", name="kuairand-1k", protocol="paper")
    with pytest.raises(DataError, match="--protocol 'book' is unknown"):
        load("demo", protocol="book")


def test_command(tmp_path, folder):
    archive = packed(folder, tmp_path / "KuaiRand.tar.gz")
    command = [sys.executable, "-m", "m3oe_fast.prepare", "kuairand-pure", "--data_path", str(archive), "--tabs", "1,0"]
    done = subprocess.run(
        [*command, "--cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "rows by tab: 1: " in done.stdout and "data kuairand-pure, split random" in done.stdout
    dataset = load(f"prepared:{tmp_path / 'out'}")
    assert dataset.schema.domains == ("1", "0")
    with pytest.raises(DataError, match="--tabs does not go with prepared:"):
        load(f"prepared:{tmp_path / 'out'}", tabs="1,0")
