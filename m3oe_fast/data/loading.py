"""From options to an opened dataset: find the log, look it up, prepare it if needed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from m3oe_fast.data import ali_ccp, catalogue, census_income, demo, kuairand, movielens, recbole, tabular
from m3oe_fast.data.archive import kind_of
from m3oe_fast.data.build import build
from m3oe_fast.data.dataset import Dataset, open_dataset
from m3oe_fast.data.options import DataOptions, Exposure, Protocol, SplitName
from m3oe_fast.data.published_counts import Counts, Published
from m3oe_fast.data.rawlog import Source
from m3oe_fast.data.splits import SPLITS
from m3oe_fast.data.store import FORMAT, Damaged, publish
from m3oe_fast.data.stream_build import build_stream
from m3oe_fast.data.tabular import TabularLog
from m3oe_fast.errors import DataError

MAX_NAME = 80  # characters of a log's name in its folder's name, which a file system limits to 255
_DESCRIBE_KUAIRAND = ("tabs", "exposure")
_DESCRIBE_RECBOLE = ("domain_column", "domain_bins", "labels", "drop_columns")
LOGS = (
    "demo, recbole:PATH, parquet:PATH, csv:PATH, movielens-100k, "
    "movielens-1m, kuairand-pure, kuairand-1k, ali-ccp, census-income, prepared:FOLDER"
)


def load(
    name: str,
    data_path: str | None = None,
    *,
    split: SplitName = "random",
    split_seed: int = 0,
    schema: str | None = None,
    cache_dir: str | None = None,
    domain_column: str | None = None,
    domain_bins: str | None = None,
    labels: str | None = None,
    drop_columns: str | None = None,
    tabs: str | None = None,
    exposure: Exposure | None = None,
    protocol: Protocol | None = None,
) -> Dataset:
    """Open a log, preparing it on first use; the arguments are the fields of ``DataOptions``.

    Raises:
        DataError: one line that names file, row and field, and the remedy.
    """
    return load_options(
        DataOptions(
            data=name,
            data_path=data_path,
            split=split,
            split_seed=split_seed,
            schema=schema,
            cache_dir=cache_dir,
            domain_column=domain_column,
            domain_bins=domain_bins,
            labels=labels,
            drop_columns=drop_columns,
            tabs=tabs,
            exposure=exposure,
            protocol=protocol,
        )
    )


def load_options(options: DataOptions, out: Path | None = None) -> Dataset:
    """Open the log that ``options`` describe, preparing it on first use.

    Args:
        options: what to load.
        out: prepare into this folder instead of the cache.

    ``prepared:FOLDER`` brings its own split: read it from the dataset, not from ``options``.

    Raises:
        DataError: as ``load``.
    """
    kind, _, rest = options.data.partition(":")
    if kind == "prepared":
        if out is not None:
            raise DataError(f"--out {out}: {options.data} is prepared already; copy the folder, or name its log")
        return _open_prepared(Path(os.path.expanduser(rest)), options)
    if options.split not in SPLITS:
        raise DataError(f"--split {options.split!r} is unknown; choose one of {', '.join(SPLITS)}")
    source = find_source(options)
    published = _published(source, options)
    identity = _identity(source, options, published)
    folder = out or _cache_entry(options, source.name, identity)
    dataset = _open_intact(folder)
    if dataset is None:
        publish(folder, _builder(source, options, identity, published))
        dataset = _open_intact(folder)
    if dataset is None:
        raise DataError(f"{folder}: damaged right after it was written; check the disk")
    if dataset.identity != identity:
        raise DataError(
            f"{folder}: holds {dataset.name}, split {dataset.split}, or an older state of the log; "
            "remove it or choose another folder"
        )
    return dataset


def find_source(options: DataOptions) -> Source | TabularLog:
    """The log that ``options.data`` names, found but not read."""
    kind, _, rest = options.data.partition(":")
    if kind in ("recbole", "parquet", "csv"):
        if not rest:
            raise DataError(f"--data {options.data}: of which path? name it as in {kind}:PATH")
        if options.data_path is not None:
            raise DataError(f"--data_path does not go with {kind}:PATH, which names the path itself; drop it")
    if kind != "recbole":
        whose = "--schema describes its columns" if kind in ("parquet", "csv") else f"{options.data} fixes its own"
        _refuse(options, _DESCRIBE_RECBOLE, f"describes recbole: logs; {whose}, drop the option")
    if options.data not in kuairand.SUFFIXES:
        _refuse(options, _DESCRIBE_KUAIRAND, "describes kuairand-pure and kuairand-1k; drop the option")
    if kind in ("parquet", "csv"):
        return tabular.find(kind, rest, options.schema)
    _refuse(options, ("schema",), f"describes parquet: and csv: logs; {options.data} fixes its own, drop the option")
    if kind == "recbole":
        return recbole.find(rest, options.domain_column, options.domain_bins, options.labels, options.drop_columns)
    if options.data == "demo":
        if options.data_path is not None:
            raise DataError("--data_path does not go with demo, which is generated; drop it")
        return demo.find()
    if options.data in kuairand.SUFFIXES:
        place = catalogue.find_files(options.data, options.data_path, cache_dir(options))
        return kuairand.find(options.data, place, options.tabs, options.exposure, cache_dir(options))
    if options.data in movielens.LOGS:
        return movielens.find(options.data, catalogue.find_files(options.data, options.data_path, cache_dir(options)))
    if options.data == ali_ccp.NAME:
        cache = cache_dir(options)
        return ali_ccp.find(catalogue.find_files(options.data, options.data_path, cache), cache)
    if options.data == census_income.NAME:
        return census_income.find(catalogue.find_files(options.data, options.data_path, cache_dir(options)))
    raise DataError(f"--data {options.data!r} is unknown; choose one of {LOGS}; m3oe_fast.prepare list tells of each")


def default_cache_dir() -> Path:
    """m3oe_fast in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3oe_fast"


def cache_dir(options: DataOptions) -> Path:
    """The folder for prepared logs and downloaded archives: ``--cache_dir`` or the default."""
    return Path(os.path.expanduser(options.cache_dir)) if options.cache_dir else default_cache_dir()


def _published(source: Source | TabularLog, options: DataOptions) -> Published | None:
    """The counts that ``--protocol`` asks to compare with."""
    if options.protocol is None:
        return None
    if options.protocol != "paper":
        raise DataError(f"--protocol {options.protocol!r} is unknown; write paper, or drop the option")
    if source.published is None:
        raise DataError(f"--protocol paper: the paper has no counts of {options.data}; drop the option")
    return source.published


def _builder(
    source: Source | TabularLog, options: DataOptions, identity: str, published: Published | None
) -> Callable[[Path], None]:
    """What fills the prepared folder. Only a log that streams is read later, while it is written."""
    if isinstance(source, TabularLog):
        return lambda place: build_stream(place, source, options.split, options.split_seed, identity, published)
    log = source.read()
    if published is not None:
        columns = {name: log.fields[name].codes for name in published.counts.distinct}
        counts = Counts.of(log.domain, len(log.domain_rule.names), columns)
        log = dataclasses.replace(log, warnings=(*log.warnings, *published.check(log.where, counts)))
    return lambda place: build(place, log, source.name, options.split, options.split_seed, identity)


def _refuse(options: DataOptions, names: tuple[str, ...], fault: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise DataError(f"--{name} {fault}")


def _identity(source: Source | TabularLog, options: DataOptions, published: Published | None) -> str:
    """Digest of everything the prepared rows depend on, and of the counts that they were compared with."""
    parts = [FORMAT, source.name, source.identity, options.split, options.split_seed]
    if published is not None:
        parts.append(dataclasses.asdict(published.counts))
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _cache_entry(options: DataOptions, name: str, identity: str) -> Path:
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:MAX_NAME]
    return cache_dir(options) / f"{safe}-{options.split}-{identity}"


def _open_intact(folder: Path) -> Dataset | None:
    try:
        return open_dataset(folder)
    except Damaged:
        return None


def _open_prepared(folder: Path, options: DataOptions) -> Dataset:
    names = ("data_path", "schema", "protocol", *_DESCRIBE_KUAIRAND, *_DESCRIBE_RECBOLE)
    _refuse(options, names, f"does not go with {options.data}, whose rows are fixed; drop the option")
    if kind_of(folder) != "folder":
        raise DataError(f"{folder}: no such folder; write it with m3oe_fast.prepare --out")
    try:
        dataset = open_dataset(folder)
    except Damaged as error:
        raise DataError(f"{error}; write the folder again with m3oe_fast.prepare --out") from error
    if options.split not in (DataOptions.split, dataset.split):
        raise DataError(f"{folder}: prepared with split {dataset.split}, not {options.split}; drop --split")
    if options.split_seed not in (DataOptions.split_seed, dataset.split_seed):
        raise DataError(
            f"{folder}: prepared with split seed {dataset.split_seed}, not {options.split_seed}; drop --split_seed"
        )
    return dataset
