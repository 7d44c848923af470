"""MovieLens-1M and -100K as the M3oE paper has them: domains by age, tasks click and like.

click = rating>3, like = rating>4. Id fields user_id, movie_id, gender, occupation, zip, genre (the
first one) and domain; dense: age. Domains are age <25, 25-34 and >=35, for the age codes of 1M the
paper's {1,18}, {25}, {35,45,50,56}. Read from the folder or zip of GroupLens (1M: ``ratings.dat``,
``users.dat``, ``movies.dat``, separated by ``::``, latin-1; 100K: ``u.data``, ``u.user``,
``u.item``), 100K also as RecBole atomic files. Formats: the README files in the zips. The licence
forbids passing the files on; ``m3oe_fast.prepare --download`` fetches them from GroupLens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from m3oe_fast.data import recbole
from m3oe_fast.data.archive import Archive
from m3oe_fast.data.catalogue import CATALOGUE
from m3oe_fast.data.columns import Tokens, first_token
from m3oe_fast.data.delimited import NUMBER, TOKEN, Layout, Table, read_delimited, require_finite
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.join import join_rows
from m3oe_fast.data.labels import parse_labels
from m3oe_fast.data.published_counts import Counts, Published
from m3oe_fast.data.rawlog import RawLog, Source
from m3oe_fast.errors import DataError

LABELS = "click=rating>3,like=rating>4"
DOMAINS = DomainRule("age", edges=(25.0, 35.0))
SEPARATORS = {"genre": "| "}  # of genres: GroupLens writes bars, RecBole blanks, and no genre holds either
ALIASES = {"movie_id": ("item_id",), "zip": ("zip_code",), "genre": ("genres", "class")}
GENRES = [
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
]  # the flags of u.item, in order


@dataclass(frozen=True)
class Tables:
    """A MovieLens log under common names.

    Attributes:
        ratings: tokens user_id, movie_id; numbers rating, timestamp.
        users: tokens user_id, gender, occupation, zip; number age.
        movies: tokens movie_id, genre.
    """

    ratings: Table
    users: Table
    movies: Table


def find(name: str, data_path: str) -> Source:
    """The log ``name`` of ``LOGS`` in the zip, folder or wheel at ``data_path``.

    Raises:
        DataError: the files are not there.
    """
    log = LOGS[name]
    archive = Archive(data_path)
    files, read = log.files, log.read
    if log.atomic_files and any(archive.find(file) for file in log.atomic_files):
        files, read = log.atomic_files, _read_atomic
    found = {file: archive.find(file) for file in files}
    lacking = ", ".join(file for file, member in found.items() if member is None)
    if lacking:
        published = CATALOGUE[name]
        raise DataError(f"{archive.path}: lacks {lacking}; fetch {published.file_names} from {published.page}")
    members = [member for member in found.values() if member is not None]
    identity = {"content": archive.digest(members)}
    return Source(name, identity, lambda: assemble(name, read(archive, members)), log.published)


def assemble(name: str, tables: Tables) -> RawLog:
    """Join the three tables.

    Raises:
        DataError: a rating without its user or movie, or a number that is missing.
    """
    ratings, users, movies = tables.ratings, tables.users, tables.movies
    for table, column in ((ratings, "rating"), (ratings, "timestamp"), (users, "age")):
        require_finite(table, column, table.numbers[column], "fetch the files again")
    user_rows = _match(ratings, users, "user_id")
    movie_rows = _match(ratings, movies, "movie_id")
    age = users.numbers["age"][user_rows]
    domain = DOMAINS.of_numbers(age)
    rules = parse_labels(LABELS)
    rating = ratings.numbers["rating"]
    label = [rule.apply(rating, ratings.where, ratings.line) for rule in rules]
    return RawLog(
        where=ratings.where,
        fields={
            "user_id": ratings.tokens["user_id"],
            "movie_id": ratings.tokens["movie_id"],
            **{field: users.tokens[field].gather(user_rows) for field in ("gender", "occupation", "zip")},
            "genre": movies.tokens["genre"].gather(movie_rows),
        },
        dense={"age": age},
        domain=domain,
        domain_rule=DOMAINS,
        label=np.stack(label, axis=1),
        label_rules=rules,
        user=ratings.tokens["user_id"],
        time=ratings.numbers["timestamp"],
        warnings=_count_warning(name, domain),
        separators=SEPARATORS,
        aliases=ALIASES,
    )


def _match(ratings: Table, side: Table, key: str) -> np.ndarray:
    rows = join_rows(ratings, side, key)
    wrong = np.flatnonzero(rows < 0)
    if len(wrong):
        column = ratings.tokens[key]
        code = column.codes[wrong[0]]
        value = repr(column.values[code]) if code >= 0 else "an empty id"
        raise DataError(f"{ratings.at(int(wrong[0]), key)}: {value} is not in {side.where}; fetch the files again")
    return rows


def _count_warning(name: str, domain: np.ndarray) -> tuple[str, ...]:
    wanted = LOGS[name].domain_rows
    found = tuple(np.bincount(domain, minlength=len(wanted)).tolist())
    if found == wanted:
        return ()
    return (
        f"{name} has {_listed(found)} rows in its domains, where the complete log has "
        f"{_listed(wanted)} ({sum(wanted):,} in all): results do not compare with published ones",
    )


def _listed(counts: tuple[int, ...]) -> str:
    return " / ".join(f"{count:,}" for count in counts)


def _read_1m(archive: Archive, members: list[str]) -> Tables:
    ratings, users, movies = members
    return Tables(
        _double_colon(
            archive,
            ratings,
            {"user_id": TOKEN, "movie_id": TOKEN, "rating": NUMBER, "timestamp": NUMBER},
        ),
        _double_colon(
            archive,
            users,
            {"user_id": TOKEN, "gender": TOKEN, "age": NUMBER, "occupation": TOKEN, "zip": TOKEN},
        ),
        _first_genre(_double_colon(archive, movies, {"movie_id": TOKEN, "title": TOKEN, "genre": TOKEN})),
    )


def _double_colon(archive: Archive, member: str, types: dict[str, pa.DataType]) -> Table:
    """A ``::``-separated table; Arrow takes one character, and no field holds a tab."""
    data = archive.read(member).to_pybytes()
    if b"::" not in data.partition(b"\n")[0]:
        raise DataError(f"{archive.where(member)}, row 1: no '::' between columns; fetch the file again")
    layout = Layout(tuple(types), encoding="latin-1")
    return read_delimited(pa.py_buffer(data.replace(b"::", b"\t")), archive.where(member), layout, types)


def _first_genre(movies: Table) -> Table:
    genre = movies.tokens["genre"]
    movies.tokens["genre"] = genre.renamed([first_token(text, SEPARATORS["genre"]) for text in genre.values])
    return movies


def _read_100k(archive: Archive, members: list[str]) -> Tables:
    ratings, users, movies = members
    rating_types = {"user_id": TOKEN, "movie_id": TOKEN, "rating": NUMBER, "timestamp": NUMBER}
    user_types = {
        "user_id": TOKEN,
        "age": NUMBER,
        "gender": TOKEN,
        "occupation": TOKEN,
        "zip": TOKEN,
    }
    return Tables(
        _table(archive, ratings, "\t", rating_types),
        _table(archive, users, "|", user_types),
        _flagged_genre(_table(archive, movies, "|", _item_types())),
    )


def _table(archive: Archive, member: str, delimiter: str, types: dict[str, pa.DataType]) -> Table:
    layout = Layout(tuple(types), delimiter, encoding="latin-1")
    return read_delimited(archive.read(member), archive.where(member), layout, types)


def _item_types() -> dict[str, pa.DataType]:
    texts = dict.fromkeys(("movie_id", "title", "release", "video_release", "url"), TOKEN)
    return {**texts, **dict.fromkeys(GENRES, NUMBER)}


def _flagged_genre(movies: Table) -> Table:
    flags = np.stack([movies.numbers[genre] == 1 for genre in GENRES], axis=1)
    code = np.where(flags.any(axis=1), flags.argmax(axis=1), -1)
    movies.tokens["genre"] = Tokens.merged(code, list(GENRES))
    return movies


def _read_atomic(archive: Archive, members: list[str]) -> Tables:
    ratings, users, movies = (recbole.read_atomic(archive, member) for member in members)
    return Tables(
        _renamed(ratings, {"user_id": "user_id", "item_id": "movie_id"}, ("rating", "timestamp")),
        _renamed(
            users,
            {
                "user_id": "user_id",
                "gender": "gender",
                "occupation": "occupation",
                "zip_code": "zip",
            },
            ("age",),
        ),
        _renamed(movies, {"item_id": "movie_id", "class": "genre"}, ()),
    )


def _renamed(table: Table, tokens: dict[str, str], numbers: tuple[str, ...]) -> Table:
    """The columns under our names; a number may stand as token or float in the file."""
    for name in [*tokens, *numbers]:
        if name not in table.tokens and name not in table.numbers:
            raise DataError(f"{table.where}: has no column {name}; fetch the file again")
    return replace(
        table,
        tokens={ours: table.tokens[theirs] for theirs, ours in tokens.items()},
        numbers={
            name: table.numbers[name] if name in table.numbers else table.tokens[name].numbers() for name in numbers
        },
    )


PAPER = Published(
    "the M3oE paper (Table 1)",
    Counts(
        (210_747, 395_556, 393_906),
        {"user_id": (1_325, 2_096, 2_619), "movie_id": (3_429, 3_508, 3_595)},
    ),
    remedy="fetch the complete log again",
)


@dataclass(frozen=True)
class Log:
    """What tells the two logs apart.

    Attributes:
        files: ratings, users, movies in the publisher's format.
        read: reads them.
        domain_rows: rows of each domain in the complete log.
        atomic_files: the same three as RecBole publishes them, if we know them.
        published: what the paper counts in the domains.
    """

    files: tuple[str, str, str]
    read: Callable[[Archive, list[str]], Tables]
    domain_rows: tuple[int, int, int]
    atomic_files: tuple[str, ...] = ()
    published: Published | None = None


LOGS = {
    "movielens-100k": Log(
        ("u.data", "u.user", "u.item"),
        _read_100k,
        (26_551, 35_444, 38_005),
        ("ml-100k.inter", "ml-100k.user", "ml-100k.item"),
    ),
    "movielens-1m": Log(
        ("ratings.dat", "users.dat", "movies.dat"),
        _read_1m,
        PAPER.counts.rows,
        published=PAPER,
    ),
}
