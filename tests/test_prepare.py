"""The command: what it prints, where it writes, how it fails."""

import subprocess
import sys

import pytest

from m3oe_fast import prepare
from m3oe_fast.data import DataOptions, load
from m3oe_fast.errors import ConfigError, DataError

from .log_files import edit, make_ratings, write_recbole


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
        assert prepare.parse(argv) == (DataOptions(), None)
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
    for word in ("examples:", "--domain_bins", "--out", "exit status", "8:1:1"):
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
