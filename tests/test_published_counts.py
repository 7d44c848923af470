"""Counts of a log against those of a publication: rows decide, other differences warn."""

import dataclasses

import numpy as np
import pytest

from m3oe_fast.data import load, movielens
from m3oe_fast.data.published_counts import Counts, Published
from m3oe_fast.errors import DataError

from .log_files import make_ratings, write_1m

PAPER = Published("the paper", Counts((30, 1_000), {"user": (5, 6)}), "fetch it again", option="--tabs")


def test_counts_of_rows_in_memory():
    domain = np.array([0, 1, 1, 0, 1])
    counts = Counts.of(domain, 3, {"user": np.array([4, 4, -1, 2, 4])})
    assert counts == Counts((2, 3, 0), {"user": (2, 1, 0)})


def test_equal_counts_pass():
    assert PAPER.check("log", PAPER.counts, {"a": 30, "b": 1_000}) == []


def test_other_users_warn():
    (line,) = PAPER.check("log", Counts((30, 1_000), {"user": (5, 7)}))
    assert line == "user has 5 / 7 different values in the domains, 5 / 6 in the paper, although the rows agree"


@pytest.mark.parametrize(
    ("by_value", "advice"),
    [
        ({"0": 1_000, "7": 30, "9": 2}, r"\(rows by value: 0: 1,000, 7: 30, 9: 2\); --tabs 7,0 has those counts$"),
        (
            {"0": 1_000, "7": 31},
            "only 0 of them have such a count, so no --tabs gives the published rows: fetch it again$",
        ),
        ({"0": 1, "7": 2}, "none of them has such a count"),
    ],
)
def test_other_rows_are_refused(by_value, advice):
    with pytest.raises(
        DataError, match="log: --protocol paper: the paper has 30 / 1,000 rows in its domains, this log 1 / 2"
    ):
        PAPER.check("log", Counts((1, 2), {"user": (1, 1)}), by_value)
    with pytest.raises(DataError, match=advice):
        PAPER.check("log", Counts((1, 2), {"user": (1, 1)}), by_value)


def test_two_domains_of_one_size_are_two_values():
    paper = dataclasses.replace(PAPER, counts=Counts((30, 30), {}))
    with pytest.raises(DataError, match="--tabs a,b has those counts"):
        paper.check("log", Counts((1, 30), {}), {"a": 30, "b": 30, "c": 1})


def test_movielens(tmp_path, monkeypatch):
    log = make_ratings()
    place = str(write_1m(tmp_path / "ml-1m", log))
    options = {"cache_dir": str(tmp_path / "cache"), "protocol": "paper"}
    with pytest.raises(
        DataError, match=r"210,747 / 395,556 / 393,906 rows in its domains, this log \d.*; fetch the com"
    ):
        load("movielens-1m", place, **options)
    assert not (tmp_path / "cache").exists()
    domain = {user: sum(age >= edge for edge in (25, 35)) for user, (_, age, _, _) in log.users.items()}
    seen = [[(user, movie) for user, movie, _, _ in log.rows if domain[user] == place] for place in range(3)]
    users, movies = (tuple(len({pair[side] for pair in pairs}) for pairs in seen) for side in (0, 1))
    counts = Counts(tuple(map(len, seen)), {"user_id": users, "movie_id": movies})
    paper = dataclasses.replace(movielens.PAPER, counts=counts)
    log_1m = dataclasses.replace(movielens.LOGS["movielens-1m"], published=paper, domain_rows=counts.rows)
    monkeypatch.setitem(movielens.LOGS, "movielens-1m", log_1m)
    assert not [line for line in load("movielens-1m", place, **options).warnings if "paper" in line]
    with pytest.raises(DataError, match="the paper has no counts of demo"):
        load("demo", protocol="paper")
