"""Ali-CCP files as the publisher writes them, of any size, with what they hold for tests to compare."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

USER = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
ITEM = ("205", "206", "207", "216", "508", "509", "702", "853")
PAST = ("109_14", "110_14", "127_14", "150_14")
DOMAINS = (9351665, 9351666, 9351667)

Feature = tuple[str, int, str]


@dataclass
class Part:
    """What a pair of files holds: for each key, and for each skeleton row, its features in order."""

    common: dict[str, list[Feature]]
    rows: list[tuple[int, int, str, list[Feature]]]  # click, purchase, key, features


def make_part(rows: int, users: int, seed: int, past: int = 12) -> Part:
    """A random part: a past of 0 to ``past`` values in each bag, some fields absent, some bought without a click."""
    rng = np.random.default_rng(seed)
    keys = [f"{key:016x}" for key in rng.choice(2**60, users, replace=False)]
    common: dict[str, list[Feature]] = {}
    for key in keys:
        features = [(name, int(rng.integers(40)) + 100 * place, "1.0") for place, name in enumerate(USER)]
        for place, name in enumerate(PAST):
            for code in rng.choice(60, rng.integers(0, past + 1), replace=False):
                features.append((name, 3_000_000 + 1000 * place + int(code), repr(round(float(rng.exponential()), 5))))
        common[key] = features[: len(USER) - 1] if rng.random() < 0.05 else features
    log = []
    for _ in range(rows):
        click = int(rng.random() < 0.3)
        features = [("301", DOMAINS[rng.choice(3, p=[0.4, 0.1, 0.5])], "1.0")]
        for place, name in enumerate(ITEM):
            if rng.random() < 0.95:
                weight = repr(round(float(rng.exponential()), 5)) if place >= 4 else "1.0"
                features.append((name, 4_000_000 + 10_000 * place + int(rng.integers(50)), weight))
        for code in rng.choice(30, rng.integers(0, 6), replace=False):
            features.append(("210", 9_000_000 + int(code), "1.0"))
        log.append((click, int(rng.random() < (0.3 if click else 0.02)), keys[rng.integers(users)], features))
    return Part(common, log)


def written(features: list[Feature]) -> str:
    """n and the features, as the last two columns."""
    return f"{len(features)}," + "\x01".join(f"{name}\x02{code}\x03{value}" for name, code, value in features)


def write_part(folder: Path, name: str, part: Part) -> None:
    """The two files of one part."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{key},{written(features)}\n" for key, features in part.common.items()]
    (folder / f"common_features_{name}.csv").write_text("".join(lines))
    rows = enumerate(part.rows, start=1)
    lines = [f"{number},{click},{buy},{key},{written(features)}\n" for number, (click, buy, key, features) in rows]
    (folder / f"sample_skeleton_{name}.csv").write_text("".join(lines))


def write_archive(path: Path, folder: Path, name: str) -> None:
    """The two files of one part as the publisher packs them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for file in (f"common_features_{name}.csv", f"sample_skeleton_{name}.csv"):
            archive.add(folder / file, arcname=file)
