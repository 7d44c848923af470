"""A small log with every kind of column, as a pandas frame and as Parquet and CSV files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = """\
ids:
  - user_id
  - {name: item, min_count: 3}
  - {name: query, encoding: hash, buckets: 50}
dense: [price]
bags:
  - {name: genres, separator: "|"}
  - {name: words, pooling: sum, encoding: hash, buckets: 20, separator: " "}
domain: tab
labels: {click: click, long_view: seconds>=30}
timestamp: time
user: user_id
weight: weight
"""


def make_frame(rows: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Ids with gaps and of several types, missing labels and texts, times out of order with ties."""
    rng = np.random.default_rng(seed)
    user = pd.array(rng.integers(0, 60, rows), "Int64")
    user[rng.random(rows) < 0.02] = pd.NA
    item = np.array([f"i{code}" for code in np.minimum(rng.geometric(0.02, rows), 250)], object)
    item[rng.random(rows) < 0.05] = None
    words = ["red", "green", "blue", "été"]
    genres = [rng.choice(["War", "Drama", "5.0", "5"], rng.integers(0, 4)).tolist() for _ in range(rows)]
    click = rng.integers(0, 2, rows).astype(float)
    click[rng.random(rows) < 0.1] = np.nan
    seconds = rng.exponential(30, rows)
    seconds[np.isnan(click)] = np.nan
    return pd.DataFrame(
        {
            "user_id": user,
            "item": item,
            "query": rng.integers(0, 500, rows),
            "price": rng.normal(10, 3, rows),
            "genres": ["|".join(values) for values in genres],
            "words": [" ".join(rng.choice(words, rng.integers(0, 3))) for _ in range(rows)],
            "tab": rng.choice(["home", "live", "shop"], rows),
            "click": click,
            "seconds": seconds,
            "time": rng.integers(0, rows // 3, rows),
            "weight": rng.exponential(1, rows).astype(np.float32),
            "unused": "x",
        }
    )


def as_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """The same rows with genres as lists; SCHEMA fits them as well."""
    return frame.assign(genres=[[text for text in texts.split("|") if text] for texts in frame["genres"]])


def write_parquet(folder: Path, frame: pd.DataFrame, files: int = 3, group_rows: int = 100) -> Path:
    """``files`` files with row groups of ``group_rows`` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(frame)), files)):
        table = pa.Table.from_pandas(frame.iloc[rows], preserve_index=False)
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=group_rows)
    return folder


def write_csv(folder: Path, frame: pd.DataFrame, files: int = 3) -> Path:
    """``files`` files, each with a header."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(frame)), files)):
        frame.iloc[rows].to_csv(folder / f"part-{number}.csv", index=False)
    return folder


def write_schema(path: Path, text: str = SCHEMA) -> str:
    """The schema's file, as --schema takes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)
