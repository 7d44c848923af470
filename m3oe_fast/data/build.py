"""A raw log -> the files of a prepared folder: split, fit the encoder, encode each part, count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from m3oe_fast import metrics
from m3oe_fast.data.encode import Encoder, fields_of
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.splits import Rows, split_rows
from m3oe_fast.data.store import DATASET, ENCODER, smallest_uint, write_json, write_part

MAX_WARNINGS = 10  # lines on domains with one class; a log with a thousand domains has thousands


def build(folder: Path, log: RawLog, name: str, split: str, split_seed: int, identity: str) -> None:
    """Write every file of the prepared log but the manifest into ``folder`` (existing, empty).

    Raises:
        DataError: the split is impossible (see ``split_rows``).
    """
    rows = split_rows(log, split, split_seed)
    encoder = Encoder.fit(log, rows.train)
    for part, numbers in zip(Rows._fields, rows, strict=True):
        write_part(folder / f"{part}.arrow", encode_rows(log, encoder, numbers))
    write_json(folder / ENCODER, encoder.to_dict())
    facts = {
        "name": name,
        "split": split,
        "split_seed": split_seed,
        "identity": identity,
        "best_auc": best_auc(log, rows.test),
        "counts": count_rows(log, rows),
        "warnings": [*log.warnings, *_shortened(one_class_warnings(log, rows))],
    }
    write_json(folder / DATASET, facts)


def encode_rows(log: RawLog, encoder: Encoder, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of a part's file (see ``store``) for the given row numbers."""
    schema = encoder.schema
    columns = {}
    for (name, column), size in zip(fields_of(log).items(), schema.vocab_sizes, strict=True):
        columns[f"id:{name}"] = encoder.encode(name, column.gather(rows)).astype(smallest_uint(size))
    dense = np.empty((len(rows), len(schema.dense)), np.float32)
    for place, name in enumerate(schema.dense):
        dense[:, place] = encoder.scale(name, log.dense[name][rows])
    columns["dense"] = dense
    columns["domain"] = log.domain[rows].astype(smallest_uint(max(len(schema.domains), 1)))
    columns["label"] = log.label[rows]
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
    """A line for each (part, domain) without rows or (part, domain, task) without both classes.

    Such a pair is no error: the loss leaves out pairs without labels, and an undefined AUC is null.
    """
    lines = []
    for part, numbers in zip(Rows._fields, rows, strict=True):
        domain, label = log.domain[numbers], log.label[numbers]
        for d, name in enumerate(log.domain_rule.names):
            own = label[domain == d]
            if len(own) == 0:
                lines.append(f"{part} has no rows of domain {name}")
                continue
            for task, column in zip(log.tasks, own.T, strict=True):
                ones, zeros = int((column == 1).sum()), int((column == 0).sum())
                if not ones or not zeros:
                    lines.append(
                        f"{part}, domain {name}, task {task}: {ones} positive and {zeros} negative "
                        "labels, so its AUC is undefined"
                    )
    return lines


def _shortened(lines: list[str]) -> list[str]:
    rest = len(lines) - MAX_WARNINGS
    return lines if rest <= 0 else [*lines[:MAX_WARNINGS], f"{rest} more domains or tasks like these"]


def _users(log: RawLog, rows: np.ndarray) -> np.ndarray | None:
    if log.user is None:
        return None
    codes = np.unique(log.user.codes[rows])
    return codes[codes >= 0]


def _size(users: np.ndarray | None) -> int | None:
    return None if users is None else len(users)
