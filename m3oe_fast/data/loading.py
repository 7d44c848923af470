"""From options to an opened dataset: find the log, look it up, prepare it if needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from m3oe_fast.data import demo, movielens, recbole
from m3oe_fast.data.build import build
from m3oe_fast.data.dataset import Dataset, open_dataset
from m3oe_fast.data.options import DataOptions, SplitName
from m3oe_fast.data.rawlog import Source
from m3oe_fast.data.splits import SPLITS
from m3oe_fast.data.store import FORMAT, Damaged, publish
from m3oe_fast.errors import DataError

LOGS = "demo, recbole:PATH, movielens-100k, movielens-1m, prepared:FOLDER"


def load(
    name: str,
    data_path: str | None = None,
    *,
    split: SplitName = "random",
    split_seed: int = 0,
    cache_dir: str | None = None,
    domain_column: str | None = None,
    domain_bins: str | None = None,
    labels: str | None = None,
    drop_columns: str | None = None,
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
            cache_dir=cache_dir,
            domain_column=domain_column,
            domain_bins=domain_bins,
            labels=labels,
            drop_columns=drop_columns,
        )
    )


def load_options(options: DataOptions, out: Path | None = None) -> Dataset:
    """Open the log that ``options`` describe, preparing it on first use.

    Args:
        options: what to load.
        out: prepare into this folder instead of the cache.

    Raises:
        DataError: as ``load``.
    """
    kind, _, rest = options.data.partition(":")
    if kind == "prepared":
        return _open_prepared(Path(rest).expanduser(), options)
    if options.split not in SPLITS:
        raise DataError(f"--split {options.split!r} is unknown; choose one of {', '.join(SPLITS)}")
    source = find_source(options)
    identity = _identity(source, options)
    folder = out or _cache_entry(options, source.name, identity)
    dataset = _open_intact(folder)
    if dataset is None:
        log = source.read()
        publish(
            folder,
            lambda place: build(place, log, source.name, options.split, options.split_seed, identity),
        )
        dataset = _open_intact(folder)
    if dataset is None:
        raise DataError(f"{folder}: damaged right after it was written; check the disk")
    if dataset.identity != identity:
        raise DataError(
            f"{folder}: holds {dataset.name}, split {dataset.split}, or an older state of the log; "
            "remove it or choose another folder"
        )
    return dataset


def find_source(options: DataOptions) -> Source:
    """The log that ``options.data`` names, found but not read."""
    kind, _, rest = options.data.partition(":")
    if kind == "recbole":
        if not rest:
            raise DataError(f"--data {options.data}: of which path? name it as in recbole:PATH")
        if options.data_path is not None:
            raise DataError("--data_path does not go with recbole:PATH, which names the path itself; drop it")
        return recbole.find(rest, options.domain_column, options.domain_bins, options.labels, options.drop_columns)
    for name in ("domain_column", "domain_bins", "labels", "drop_columns"):
        if getattr(options, name) is not None:
            raise DataError(f"--{name} describes recbole: logs; {options.data} fixes its own, drop the option")
    if options.data == "demo":
        return demo.find()
    if options.data in movielens.LOGS:
        return movielens.find(options.data, options.data_path)
    raise DataError(f"--data {options.data!r} is unknown; choose one of {LOGS}")


def default_cache_dir() -> Path:
    """m3oe_fast in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m3oe_fast"


def _identity(source: Source, options: DataOptions) -> str:
    """Digest of everything the prepared rows depend on."""
    parts = [FORMAT, source.name, source.identity, options.split, options.split_seed]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def _cache_entry(options: DataOptions, name: str, identity: str) -> Path:
    parent = Path(options.cache_dir).expanduser() if options.cache_dir else default_cache_dir()
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    return parent / f"{safe}-{options.split}-{identity}"


def _open_intact(folder: Path) -> Dataset | None:
    try:
        return open_dataset(folder)
    except Damaged:
        return None


def _open_prepared(folder: Path, options: DataOptions) -> Dataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; write it with m3oe_fast.prepare --out")
    try:
        dataset = open_dataset(folder)
    except Damaged as error:
        raise DataError(f"{error}; write the folder again with m3oe_fast.prepare --out") from error
    if options.split not in (DataOptions.split, dataset.split):
        raise DataError(f"{folder}: prepared with split {dataset.split}, not {options.split}; drop --split")
    return dataset
