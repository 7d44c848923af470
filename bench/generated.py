"""A generated log of any length, as a folder of Parquet files: 8 id fields, 1 dense, 3 domains, 2 tasks.

    python -m bench.generated --rows 20000000 --out DIR

writes DIR/part-00000.parquet and so on, and DIR/schema.yaml for ``--data parquet:DIR --schema DIR/schema.yaml``. Rows
are made and written a block at a time, so memory stays bounded; the same arguments give the same rows, and a longer
log begins with the rows of a shorter one. Users and items have a long tail; labels follow from both, the domain and a
few crosses, so that a model finds something to learn.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench import command
from m3oe_fast import cli

DOMAINS, DOMAIN_SHARE = ("home", "search", "live"), (0.6, 0.3, 0.1)
CITIES, BRANDS, CATEGORIES, HOURS, DEVICES, TAGS = 400, 5_000, 60, 24, 4, 300
MAX_TAGS = 5
FIRST_SECOND, SECONDS = 1_700_000_000, 2  # a row every two seconds or so
BLOCK_ROWS, FILE_BLOCKS = 1 << 18, 8

SCHEMA = """\
ids: [user_id, item_id, city, brand, category, hour, device, position]
dense: [item_age_days]
{bags}domain: tab
labels: {{click: click, long_view: play_seconds>=30}}
timestamp: time
user: user_id
"""


def write(
    folder: Path,
    rows: int,
    *,
    seed: int = 0,
    users: int = 200_000,
    items: int = 50_000,
    bags: bool = True,
    block_rows: int = BLOCK_ROWS,
) -> Path:
    """Write the log and its schema.

    Args:
        folder: made if need be; files of an earlier log of the same name are overwritten.
        rows: at least 1.
        users, items: how many there are; the busiest come often, most seldom.
        bags: also a multi-hot column, tags.
        block_rows: rows of a row group.

    Returns:
        The schema's file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema = folder / "schema.yaml"
    schema.write_text(SCHEMA.format(bags="bags: [tags]\n" if bags else ""))
    blocks = _blocks(rows, seed, users, items, bags, block_rows)
    number = 0
    while (block := next(blocks, None)) is not None:
        with pq.ParquetWriter(folder / f"part-{number:05d}.parquet", block.schema) as writer:
            writer.write_table(block)
            for _ in range(FILE_BLOCKS - 1):
                if (block := next(blocks, None)) is None:
                    break
                writer.write_table(block)
        number += 1
    return schema


def _blocks(rows: int, seed: int, users: int, items: int, bags: bool, block_rows: int) -> Iterator[pa.Table]:
    for start in range(0, rows, block_rows):
        table = _block(np.random.default_rng([seed, start]), start, block_rows, users, items, bags)
        yield table.slice(0, min(block_rows, rows - start))


def _block(rng: np.random.Generator, start: int, rows: int, users: int, items: int, bags: bool) -> pa.Table:
    user, item = _long_tail(rng, users, rows), _long_tail(rng, items, rows)
    domain = rng.choice(len(DOMAINS), rows, p=DOMAIN_SHARE)
    time = FIRST_SECOND + SECONDS * (start + np.arange(rows)) + rng.integers(0, SECONDS, rows)
    category, city = _of(item, CATEGORIES, 1), _of(user, CITIES, 2)
    age = (item % 1000) / 10 + (time - FIRST_SECOND) / 86_400
    score = _normal(user, 3) + _normal(item, 4) + _normal(category * len(DOMAINS) + domain, 5)
    score += _normal(city * CATEGORIES + category, 6) + 0.5 * np.exp(-age / 30)
    click = rng.random(rows) < 1 / (1 + np.exp(1.0 - score))
    seconds = np.where(click, rng.exponential(20 + 10 * np.exp(0.5 * _normal(item, 7))), 0.0)
    columns = {
        "user_id": pa.array(user),
        "item_id": pa.array(item),
        "city": _names("city", city, CITIES),
        "brand": pa.array(_of(item, BRANDS, 8)),
        "category": _names("cat", category, CATEGORIES),
        "hour": pa.array((time // 3600 % HOURS).astype(np.int8)),
        "device": _names("device", _of(user, DEVICES, 9), DEVICES),
        "position": pa.array(rng.integers(0, 30, rows).astype(np.int16)),
        "item_age_days": pa.array(age.astype(np.float32)),
        "tab": pa.DictionaryArray.from_arrays(pa.array(domain.astype(np.int8)), pa.array(DOMAINS)).cast(pa.string()),
        "time": pa.array(time),
        "click": pa.array(click.astype(np.int8)),
        "play_seconds": pa.array(seconds.astype(np.float32)),
    }
    if bags:
        lengths = rng.integers(0, MAX_TAGS + 1, rows)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns["tags"] = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(_long_tail(rng, TAGS, int(offsets[-1])).astype(np.int32))
        )
    return pa.table(columns)


def _long_tail(rng: np.random.Generator, size: int, rows: int) -> np.ndarray:
    """int64 [rows] in 0..size-1: the r-th comes about 1 / (r + size/100) as often as the first."""
    tail = size / 100
    return np.minimum((tail * ((size / tail + 1) ** rng.random(rows) - 1)).astype(np.int64), size - 1)


def _of(key: np.ndarray, size: int, salt: int) -> np.ndarray:
    """A fixed property of each key, 0..size-1."""
    return (_mixed(key, salt) % np.uint64(size)).astype(np.int64)


def _normal(key: np.ndarray, salt: int) -> np.ndarray:
    """A fixed draw for each key, about normal with standard deviation 0.7."""
    uniform = (_mixed(key, salt) >> np.uint64(11)) * 2.0**-53
    return 0.4 * np.log((uniform + 1e-9) / (1 - uniform + 1e-9))


def _mixed(key: np.ndarray, salt: int) -> np.ndarray:
    z = key.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(salt * 0xD1B54A32D192ED03 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _names(prefix: str, codes: np.ndarray, size: int) -> pa.Array:
    names = pa.array([f"{prefix}{code}" for code in range(size)])
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), names).cast(pa.string())


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.generated", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=command.positive, required=True, help="rows of the log")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--users", type=command.positive, default=200_000)
    parser.add_argument("--items", type=command.positive, default=50_000)
    parser.add_argument("--no_bags", action="store_true", help="leave the multi-hot column out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    schema = write(
        options.out, options.rows, seed=options.seed, users=options.users, items=options.items, bags=not options.no_bags
    )
    print(f"python -m m3oe_fast.prepare parquet:{options.out} --schema {schema}")
    return 0


if __name__ == "__main__":
    cli.run(main)
