"""The program that trains M3oE as published: what it trains, how, and what it keeps."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from m3oe_fast.errors import DataError
from m3oe_fast.training import Trainer
from tests.log_files import make_ratings, write_100k

# Last, so that an installed m3oe_fast comes before the source folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import environment, report, reproduction

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line that trains on a small log in the published format."""
    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    log = write_100k(tmp_path / "ml-100k", make_ratings(3000, users=60, movies=60))
    places = ["--data_path", str(log), "--cache_dir", str(tmp_path / "cache"), "--json", str(tmp_path / "result.json")]
    return [*places, "--epochs", "2", "--batch_size", "512", "--seeds", "1", "2", "--threads", "1"]


def test_every_split_way_and_seed_once_with_the_published_options(line, tmp_path, monkeypatch, capsys):
    made = []

    class Noting(Trainer):
        def __init__(self, model: Any, dataset: Any, options: Any, **rest: Any) -> None:
            made.append((dataset.split, model.config, options))
            super().__init__(model, dataset, options, **rest)

    monkeypatch.setattr(reproduction, "Trainer", Noting)
    assert reproduction.main(line) == 0
    expected = itertools.product(("official", "random", "user"), ("published", "joint"), (1, 2))
    assert [(split, options.bilevel, options.seed) for split, _, options in made] == list(expected)
    for _, config, options in made:
        assert (config.shared_experts, config.init, config.fusion) == (1, "published", "scalar") and config.gate_detach
        assert (options.lr, options.weight_decay, options.patience) == (1e-2, 1e-5, 10)
        assert options.fusion_lr == (1e-2 if options.bilevel == "joint" else 1e-3)

    text = (tmp_path / "result.json").read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text
    by_split = {split["split"]: split for split in result["splits"]}
    for split in by_split.values():
        assert sum(split["counts"][part]["rows"] for part in ("train", "val", "test")) == 3000
        for way in split["ways"]:
            first, second = (run["test_auc"]["mean"] for run in way["runs"])
            assert way["auc"]["mean"] == pytest.approx((first + second) / 2)
            assert way["std"] == pytest.approx(abs(first - second) / 2**0.5)
    of_users = by_split["user"]["counts"]["test"]
    assert of_users["new_users"] == of_users["users"] > 0 == by_split["random"]["counts"]["test"]["new_users"]
    printed = capsys.readouterr().out
    assert printed.strip() == report.render(result).strip()
    assert [printed.count(f"| {split} ") for split in by_split] == [3, 3, 3]  # a line per way, and one of its users


def test_the_same_seed_gives_the_same_figures(line, tmp_path):
    results = []
    for _ in range(2):
        assert reproduction.main([*line, "--splits", "random", "--ways", "joint"]) == 0
        (split,) = json.loads((tmp_path / "result.json").read_text())["splits"]
        results.append([run["test_auc"] for run in split["ways"][0]["runs"]])
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


def test_an_undefined_auc_is_named():
    run = {"test_auc": {"mean": None, "a/click": 0.7, "b/like": None}, "test_logloss": {"mean": 0.6}, "fusion": {}}
    with pytest.raises(DataError, match="b/like"):
        reproduction.summary([run, run])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "two or more"),
        (["--seeds", "1", "1"], "all different"),
        (["--splits", "random", "random"], "--splits must be all different"),
        (["--ways", "alternating"], "invalid choice"),
        (["--shared_experts", "0"], "at least 1"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        reproduction.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
