"""Small logs written in the published formats: MovieLens as GroupLens and as RecBole write it.

Every writer takes the same ``Ratings``, so tests can compare what different formats are read as.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

GENRE_FLAGS = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


@dataclass
class Ratings:
    """A MovieLens-like log: rows of (user, movie, rating, timestamp) and what is known of both."""

    rows: list[tuple[int, int, int, int]]
    users: dict[int, tuple[str, int, str, str]]  # gender, age, occupation, zip
    movies: dict[int, tuple[str, list[str]]]  # title, genres
    name: str = field(default="")


def make_ratings(rows: int = 400, users: int = 30, movies: int = 12, seed: int = 0) -> Ratings:
    """A random log whose ages are codes of MovieLens-1M and whose titles are not plain ASCII."""
    rng = np.random.default_rng(seed)
    ages = rng.choice([1, 18, 25, 35, 45, 50, 56], users)
    pairs = rng.choice(users * movies, min(rows, users * movies), replace=False)
    log = [
        (int(p // movies) + 1, int(p % movies) + 1, int(rng.integers(1, 6)), int(t))
        for p, t in zip(pairs, rng.integers(9 * 10**8, 10**9, len(pairs)), strict=True)
    ]
    people = {
        u + 1: (
            "MF"[rng.integers(2)],
            int(ages[u]),
            ["writer", "none", "doctor"][rng.integers(3)],
            f"{rng.integers(1, 99):05d}",
        )
        for u in range(users)
    }
    films = {
        m + 1: (
            f'"Cité" Part: {m + 1} (1995)',
            sorted(
                rng.choice(GENRE_FLAGS[1:], rng.integers(1, 4), replace=False).tolist(),
                key=GENRE_FLAGS.index,
            ),
        )
        for m in range(movies)
    }
    return Ratings(log, people, films)


def write(path: Path, lines: list[str], encoding: str = "utf8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))


def write_1m(folder: Path, log: Ratings) -> Path:
    """ratings.dat, users.dat, movies.dat: ``::`` between columns, latin-1, no header."""
    write(folder / "ratings.dat", ["::".join(map(str, row)) for row in log.rows])
    users = [f"{u}::{g}::{age}::{work}::{z}" for u, (g, age, work, z) in log.users.items()]
    write(folder / "users.dat", users)
    movies = [f"{m}::{title}::{'|'.join(genres)}" for m, (title, genres) in log.movies.items()]
    write(folder / "movies.dat", movies, "latin-1")
    return folder


def write_100k(folder: Path, log: Ratings) -> Path:
    """u.data (tabs), u.user and u.item (``|``, latin-1, 19 genre flags), no header."""
    write(folder / "u.data", ["\t".join(map(str, row)) for row in log.rows])
    users = [f"{u}|{age}|{g}|{work}|{z}" for u, (g, age, work, z) in log.users.items()]
    write(folder / "u.user", users)
    movies = [
        f"{m}|{title}|01-Jan-1995||http://us.imdb.com/M/title-exact?{m}|"
        + "|".join(str(int(genre in genres)) for genre in GENRE_FLAGS)
        for m, (title, genres) in log.movies.items()
    ]
    write(folder / "u.item", movies, "latin-1")
    return folder


def write_recbole(folder: Path, log: Ratings, name: str = "ml-100k") -> Path:
    """NAME.inter, NAME.user, NAME.item: tabs, typed header, UTF-8."""
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    write(folder / f"{name}.inter", [header, *("\t".join(map(str, row)) for row in log.rows)])
    header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"
    users = [f"{u}\t{age}\t{g}\t{work}\t{z}" for u, (g, age, work, z) in log.users.items()]
    write(folder / f"{name}.user", [header, *users])
    header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
    movies = [f"{m}\t{title}\t1995\t{' '.join(g)}" for m, (title, g) in log.movies.items()]
    write(folder / f"{name}.item", [header, *movies])
    return folder


def zipped(folder: Path, target: Path, prefix: str = "") -> Path:
    """The files of ``folder`` as a zip or wheel, each under ``prefix``."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.iterdir()):
            file.write(path, prefix + path.name)
    return target


def edit(path: Path, old: str, new: str, encoding: str = "utf8") -> None:
    """Replace the first ``old`` in a file; it must occur."""
    data = path.read_bytes()
    assert old.encode(encoding) in data, f"{old!r} is not in {path}"
    path.write_bytes(data.replace(old.encode(encoding), new.encode(encoding), 1))
