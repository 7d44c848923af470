"""The command: what it prints, where it writes, how it fails."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
import warnings

import pytest

from m3oe_fast import prepare
from m3oe_fast.data import DataOptions, load
from m3oe_fast.data.catalogue import CATALOGUE
from m3oe_fast.errors import ConfigError, DataError

from .log_files import edit, make_ratings, write_1m, write_100k, write_recbole, zipped
from .publisher import Publisher


@pytest.fixture
def source(tmp_path):
    return write_recbole(tmp_path / "source", make_ratings())


def line(source, *more):
    labels = "click=rating>3,like=rating>4"
    roles = ["--domain_column", "age", "--domain_bins", "25,35", "--labels", labels]
    return [f"recbole:{source}", *roles, *more]


def test_prints_summary_and_place(source, tmp_path, capsys):
    assert prepare.main(line(source, "--out", str(tmp_path / "out"), "--split", "user")) == 0
    printed = capsys.readouterr().out.splitlines()
    dataset = load(f"prepared:{tmp_path / 'out'}")
    assert printed == [*dataset.summary(), f"prepared in {tmp_path / 'out'}"]


def test_writes_into_the_cache_that_load_uses(source, tmp_path, capsys):
    prepare.main(line(source, "--cache_dir", str(tmp_path / "cache")))
    (folder,) = (tmp_path / "cache").iterdir()
    assert f"prepared in {folder}" in capsys.readouterr().out


def test_name_may_stand_alone_or_after_data():
    for argv in (["demo"], ["--data", "demo"], ["demo", "--data", "demo"], []):
        assert prepare.parse(argv) == (DataOptions(), prepare.PrepareOptions())
    with pytest.raises(ConfigError, match="both recbole:x and movielens-1m stand for --data"):
        prepare.parse(["--data", "recbole:x", "movielens-1m"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--bogus", "1"], "--bogus"),
        (["demo", "more"], "more"),
        (["--split", "best"], "--split must be one of random, .* got best"),
        (["--split_seed", "x"], "--split_seed.*x"),
    ],
)
def test_bad_options(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        prepare.parse(argv)
    assert "\n" not in str(caught.value)


def test_help_is_for_newcomers(capsys):
    with pytest.raises(SystemExit) as caught:
        prepare.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("examples:", "--domain_bins", "--out", "exit status", "8:1:1", "--download", "--from PATH", '"list"'):
        assert word in text


def test_command_fails_in_one_line_and_leaves_nothing(source, tmp_path):
    edit(source / "ml-100k.inter", "rating:float", "rating")
    command = [
        sys.executable,
        "-m",
        "m3oe_fast.prepare",
        *line(source, "--out", str(tmp_path / "o")),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {source}/ml-100k.inter, row 1: 'rating' is no typed")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_out_may_be_a_link_to_a_folder(source, tmp_path, capsys):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    assert prepare.main(line(source, "--out", str(tmp_path / "out"))) == 0
    assert len(load(f"prepared:{tmp_path / 'disk'}").test) > 0


def test_row_numbers_of_labels_count_empty_lines(source, tmp_path):
    path = source / "ml-100k.inter"
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], "", "", *text[1:], "1\t1\tbad\t1"]))
    with pytest.raises(DataError, match=rf"row {len(text) + 3}, field rating: 'bad' is not a number"):
        prepare.main(line(source, "--out", str(tmp_path / "out")))


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A publisher of a small MovieLens-1M, to which the catalogue points."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    archive = zipped(write_1m(tmp_path / "ml-1m", make_ratings()), tmp_path / "ml-1m.zip", "ml-1m/")
    with Publisher(archive.read_bytes()) as publisher:
        entry = dataclasses.replace(CATALOGUE["movielens-1m"], file=publisher.file("ml-1m.zip"))
        monkeypatch.setitem(CATALOGUE, "movielens-1m", entry)
        yield publisher


def test_download_then_every_command_finds_it(published, tmp_path, capsys):
    cache = str(tmp_path / "cache")
    with pytest.raises(DataError, match=r"ml-1m\.zip is not there: .*prepare movielens-1m --download fetches it"):
        load("movielens-1m", cache_dir=cache)
    assert prepare.main(["movielens-1m", "--download", "--cache_dir", cache]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("MovieLens 1M: ")
    assert f"http://127.0.0.1:{published.port}/ml-1m.zip" in printed[0]
    assert "no redistribution" in printed[1]
    assert "https://grouplens.org/datasets/movielens/1m/" in printed[1]
    assert "Harper" in printed[2]
    assert printed[3] == f"fetched   {cache}/raw/ml-1m.zip, checksum as published"
    assert (tmp_path / "cache" / "raw" / "ml-1m.zip").read_bytes() == published.content
    dataset = load("movielens-1m", cache_dir=cache)
    assert printed[-1] == f"prepared in {dataset.folder}"
    assert dataset.folder == load("movielens-1m", str(tmp_path / "ml-1m.zip"), cache_dir=cache).folder
    assert prepare.main(["movielens-1m", "--download", "--cache_dir", cache]) == 0
    assert f"{cache}/raw/ml-1m.zip is there and intact" in capsys.readouterr().out
    assert published.asked == [None]


def test_failed_download_prepares_nothing(published, tmp_path):
    published.content = published.content[::-1]
    with pytest.raises(DataError, match="what came has sha256:"):
        prepare.main(["movielens-1m", "--download", "--cache_dir", str(tmp_path / "cache")])
    assert not (tmp_path / "cache").exists()


def test_ctrl_c_in_a_download_says_how_to_go_on(published, tmp_path):
    entry = dataclasses.asdict(CATALOGUE["movielens-1m"].file)
    program = """
import dataclasses, json, sys
from m3oe_fast import cli, prepare
from m3oe_fast.data.catalogue import CATALOGUE, PublishedFile
file = PublishedFile(**json.loads(sys.argv.pop(1)))
CATALOGUE["movielens-1m"] = dataclasses.replace(CATALOGUE["movielens-1m"], file=file)
cli.run(prepare.main)
"""
    published.hold_at = 1000
    part = tmp_path / "cache" / "raw" / "ml-1m.zip.part"
    words = [json.dumps(entry), "movielens-1m", "--download", "--cache_dir", str(tmp_path / "cache")]
    running = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size == 1000):
        assert running.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == "interrupted\n"
    assert out.splitlines()[-1] == f"stopped; what came is kept in {part}, and the same line goes on from there"
    assert [path.name for path in part.parent.iterdir()] == ["ml-1m.zip.part"]
    published.hold_at = None
    assert prepare.main(words[1:]) == 0
    assert published.asked == [None, "bytes=1000-"]


def test_local_archive_is_compared_with_the_published_one(published, tmp_path, capsys):
    cache = ["--cache_dir", str(tmp_path / "cache")]
    archive = tmp_path / "ml-1m.zip"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare.main(["movielens-1m", "--from", str(archive), *cache])
        prepare.main(["movielens-1m", "--from", str(tmp_path / "ml-1m"), *cache])
    zipped(tmp_path / "ml-1m", tmp_path / "archive.zip", "other/")
    found = hashlib.sha256((tmp_path / "archive.zip").read_bytes()).hexdigest()
    wanted = hashlib.sha256(archive.read_bytes()).hexdigest()
    for option in ("--from", "--data_path", "--dataset_path"):
        with pytest.warns(
            UserWarning, match=rf"archive\.zip \(sha256:{found}\) is not .*ml-1m\.zip \(sha256:{wanted}\)"
        ):
            assert prepare.main(["movielens-1m", option, str(tmp_path / "archive.zip"), *cache]) == 0
    assert published.asked == []


def test_only_the_kind_of_archive_that_is_published_is_compared(tmp_path):
    folder = write_recbole(tmp_path / "r", make_ratings())
    wheel = zipped(folder, tmp_path / "recbole.whl", "recbole/dataset_example/ml-100k/")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare.main(["movielens-100k", "--from", str(wheel), "--cache_dir", str(tmp_path / "c")]) == 0
    archive = zipped(write_100k(tmp_path / "p", make_ratings()), tmp_path / "ml-100k.zip", "ml-100k/")
    with pytest.warns(UserWarning, match=r"is not the publisher's ml-100k\.zip"):
        assert prepare.main(["movielens-100k", "--from", str(archive), "--cache_dir", str(tmp_path / "c")]) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["movielens-1m", "--from", "a", "--data_path", "a"], "both --from and --data_path say where"),
        (["movielens-1m", "--dataset_path=a", "--from=a"], "both --from and --dataset_path say where"),
        (["movielens-1m", "--download", "--from", "a"], "both --download and --from say where"),
        (["movielens-1m", "--data_path", "a", "--download"], "both --download and --data_path say where"),
    ],
)
def test_files_come_from_one_place(argv, message):
    with pytest.raises(ConfigError, match=message):
        prepare.main(argv)


def test_download_and_a_place_from_a_file_of_options(tmp_path):
    (tmp_path / "c.yaml").write_text("data_path: a\n")
    with pytest.raises(ConfigError, match="both --download and data_path say where"):
        prepare.main(["movielens-1m", "--download", "--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["demo", "--download"], "demo is no public data set; choose one of movielens-100k, movielens-1m,"),
        (["recbole:x", "--download"], "recbole:x is no public data set"),
        (["ali-ccp", "--download"], "fetch sample_train.*at https.*then type: .*prepare ali-ccp --from FOLDER"),
        (["movielens-1m", "--from", "/no/where.zip"], "/no/where.zip: no such file or folder"),
        (["movielens"], "is unknown; .*prepare list"),
    ],
)
def test_wrong_input_leaves_nothing(argv, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        prepare.main([*argv, "--cache_dir", str(tmp_path / "cache")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_list_shows_sizes_and_licences(capsys):
    assert prepare.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows[2:]] == list(CATALOGUE)
    for name, holds, size, licence in rows[2:]:
        assert holds == CATALOGUE[name].holds
        assert licence == CATALOGUE[name].terms
        assert size == CATALOGUE[name].size or CATALOGUE[name].page in size
    assert "--download" in lines[-1]
