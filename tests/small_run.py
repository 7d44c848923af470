"""A small RecBole log with three domains by age and two tasks, and options that train on it in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

SMALL = [
    "--backend=reference",
    "--embed_dim=4",
    "--star_dim=8",
    "--hidden_dim=8",
    "--expert_dims=4",
    "--tower_dim=4",
    "--shared_experts=2",
    "--batch_size=128",
    "--lr=0.01",
    "--patience=0",
    "--outer_every=3",
]

USERS, ITEMS = 40, 30


def write_small_log(folder: Path, cache: Path) -> list[str]:
    """Write the log into ``folder``, which must not exist; returns the options that name it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = 1500
    age = rng.integers(15, 60, USERS)
    user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
    rating = np.clip(np.round(1 + item / 6 + rng.normal(0, 1, rows)), 1, 5).astype(int)
    lines = [f"{u}\t{i}\t{r}\t{t}" for t, (u, i, r) in enumerate(zip(user, item, rating, strict=True))]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (folder / "small.inter").write_text("\n".join([head, *lines]) + "\n")
    lines = [f"{u}\t{a}" for u, a in enumerate(age)]
    (folder / "small.user").write_text("\n".join(["user_id:token\tage:float", *lines]) + "\n")
    return [
        f"--data=recbole:{folder}",
        "--domain_column=age",
        "--domain_bins=25,35",
        "--labels=click=rating>3,like=rating>4",
        f"--cache_dir={cache}",
    ]


def raw_rows(rows: int, seed: int = 0) -> pd.DataFrame:
    """Raw rows of the log, some users and items unknown to it."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "user_id": rng.integers(0, USERS + 5, rows),
            "item_id": rng.integers(0, ITEMS + 5, rows).astype(str),
            "age": rng.integers(15, 60, rows).astype(float),
            "timestamp": rng.uniform(0, 1500, rows),
            "note": [f"row {row}" for row in range(rows)],
        }
    )
