"""The options that name a log and its split: one frozen dataclass for every command and for Python.

``m3oe_fast.cli`` puts the fields of such a dataclass, with their help texts, on a command's line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SplitName = Literal["random", "temporal", "user", "official"]
Exposure = Literal["standard", "random"]
Protocol = Literal["paper"]


def option(default: Any, help: str) -> Any:
    """A dataclass field that carries the help text of its command-line option."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataOptions:
    """Which log to read, what its domains and labels are, and how its rows are split.

    ``domain_column``, ``domain_bins``, ``labels`` and ``drop_columns`` describe ``recbole:`` logs, ``schema``
    describes ``parquet:`` and ``csv:`` logs; the other logs fix their own, and naming one for them is an error.
    """

    data: str = option(
        "demo",
        "The log: demo (generated), recbole:PATH (folder, wheel or zip with RecBole atomic files; "
        "recbole:PATH#NAME picks one of several), parquet:PATH or csv:PATH (a file, or a folder of them in order of "
        "their names; see --schema), movielens-100k, movielens-1m, kuairand-pure, kuairand-1k, ali-ccp, census-income, "
        "or prepared:FOLDER (written earlier by m3oe_fast.prepare --out; it brings its own split and columns).",
    )
    data_path: str | None = option(
        None,
        "Where the files of a public data set are: their folder, or the publisher's archive (MovieLens: zip or wheel, "
        "KuaiRand: tar.gz). Only read.",
    )
    split: SplitName = option(
        "random",
        "How rows go to train, val and test, 8:1:1: random rows; temporal (oldest rows train); "
        "user (no user in two parts); official (by position in the file; ali-ccp, census-income: the given test file "
        "halved into val and test).",
    )
    split_seed: int = option(0, "Seed of the draws of a split, apart from the training seed.")
    schema: str | None = option(
        None,
        "parquet, csv: a YAML file that says what the columns are for. Keys: ids, dense, bags (features), domain, "
        "labels (task: rule), timestamp, user, weight, and the defaults min_count, encoding, buckets; docs/data.md has "
        "an example.",
    )
    tabs: str | None = option(
        None, "kuairand: the tabs that are the domains, in order (default 0,1,4); rows of other tabs are left out."
    )
    exposure: Exposure | None = option(
        None,
        "kuairand: only the logs of what the recommender showed (standard), or of videos shown at random (default: "
        "all three logs, as in the paper).",
    )
    protocol: Protocol | None = option(
        None,
        "movielens-1m, kuairand-pure: refuse a log whose domains have other numbers of rows than in the M3oE paper.",
    )
    cache_dir: str | None = option(
        None,
        "Where prepared logs and downloaded archives are kept (default: m3oe_fast in the user's cache folder).",
    )
    domain_column: str | None = option(
        None,
        "recbole: the column whose values, or bins, are the domains (default: one domain, all).",
    )
    domain_bins: str | None = option(
        None, "recbole: increasing edges that cut a numeric column; 25,35 is <25, 25-34 and >=35."
    )
    labels: str | None = option(
        None,
        "recbole: the tasks, each NAME=COLUMN OPERATOR NUMBER, or NAME=COLUMN for a 0/1 column; "
        "for example click=rating>3,like=rating>4. A column used here is never a feature.",
    )
    drop_columns: str | None = option(
        None,
        "recbole: columns that must not become features, for example those known only afterwards.",
    )
