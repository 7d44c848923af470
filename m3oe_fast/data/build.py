"""A raw log -> the files of a prepared folder: split, fit the encoder, encode each part, count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3oe_fast import metrics
from m3oe_fast.data.encode import Encoder, fields_of
from m3oe_fast.data.pair_counts import PairCounts
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.splits import Rows, split_rows
from m3oe_fast.data.store import DATASET, ENCODER, Columns, PartWriter, smallest_uint, write_json


def build(folder: Path, log: RawLog, name: str, split: str, split_seed: int, identity: str) -> None:
    """Write every file of the prepared log but the manifest into ``folder`` (existing, empty).

    Raises:
        DataError: the split is impossible (see ``split_rows``).
    """
    rows = split_rows(log, split, split_seed)
    encoder = Encoder.fit(log, rows.train)
    for part, numbers in zip(Rows._fields, rows, strict=True):
        with PartWriter(folder / f"{part}.arrow") as writer:
            writer.append(encode_rows(log, encoder, numbers))
    write_json(folder / ENCODER, encoder.to_dict())
    facts = {
        "name": name,
        "split": split,
        "split_seed": split_seed,
        "identity": identity,
        "best_auc": best_auc(log, rows.test),
        "counts": count_rows(log, rows),
        "warnings": [*log.warnings, *one_class_warnings(log, rows)],
    }
    write_json(folder / DATASET, facts)


def encode_rows(log: RawLog, encoder: Encoder, rows: np.ndarray) -> Columns:
    """The columns of a part's file (see ``store``) for the given row numbers."""
    schema = encoder.schema
    columns: Columns = {}
    for (name, column), size in zip(fields_of(log).items(), schema.vocab_sizes, strict=True):
        columns[f"id:{name}"] = encoder.encode(name, column.gather(rows)).astype(smallest_uint(size))
    dense = np.empty((len(rows), len(schema.dense)), np.float32)
    for place, name in enumerate(schema.dense):
        dense[:, place] = encoder.scale(name, log.dense[name][rows])
    columns["dense"] = dense
    columns["domain"] = log.domain[rows].astype(smallest_uint(max(len(schema.domains), 1)))
    columns["label"] = log.label[rows]
    if log.user is not None:
        columns["user"] = log.user.codes[rows].astype(np.int64)
    return columns


def best_auc(log: RawLog, test: np.ndarray) -> dict[str, float | None] | None:
    """Test AUC of the true probabilities, which no model can hope to exceed; None if unknown."""
    if log.probability is None:
        return None
    domains, tasks = log.domain_rule.names, log.tasks
    scores = metrics.evaluate(log.probability[test], log.domain[test], log.label[test], domains, tasks)
    return scores.to_dict()["auc"]


def count_rows(log: RawLog, rows: Rows) -> dict[str, Any]:
    """Rows and users of each part and domain (see ``Dataset.counts``)."""
    known = _users(log, rows.train)
    counts = {}
    for part, numbers in zip(Rows._fields, rows, strict=True):
        domain = log.domain[numbers]
        users = _users(log, numbers)
        counts[part] = {
            "rows": len(numbers),
            "users": _size(users),
            "new_users": None if users is None else len(np.setdiff1d(users, known)),
            "domains": {
                name: {
                    "rows": int((domain == d).sum()),
                    "users": _size(_users(log, numbers[domain == d])),
                }
                for d, name in enumerate(log.domain_rule.names)
            },
        }
    return counts


def one_class_warnings(log: RawLog, rows: Rows) -> list[str]:
    """A line for each part and domain of which little can be said (see ``PairCounts.warnings``)."""
    counts = PairCounts(log.domain_rule.names, log.tasks)
    for part, numbers in enumerate(rows):
        counts.add(np.full(len(numbers), part), log.domain[numbers], log.label[numbers])
    return counts.warnings()


def _users(log: RawLog, rows: np.ndarray) -> np.ndarray | None:
    if log.user is None:
        return None
    codes = np.unique(log.user.codes[rows])
    return codes[codes >= 0]


def _size(users: np.ndarray | None) -> int | None:
    return None if users is None else len(users)
