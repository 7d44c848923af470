"""`python -m bench.metrics`: CPU seconds to measure a million scored rows, against the lists of eager code.

Rows have 3 domains, 2 tasks and a user. m3oe_fast is `Meter`, fed in batches of an evaluation: AUC, logloss,
calibration and GAUC of every pair and every task. The opponent gathers Python lists per pair, as research code does,
and measures them with torchmetrics (AUC) and NumPy (logloss, and GAUC by a loop over the users); calibration and the
tasks as a whole it leaves out. Process CPU time on one thread. Both must agree before anything is printed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import binary_auroc

from bench import command, document, gate, timing
from m3oe_fast import cli, metrics
from m3oe_fast.training.evaluation import EVALUATION_ROWS

DOMAINS, TASKS = ("0", "1", "2"), ("click", "like")
SHARES = (0.21, 0.40, 0.39)

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the results, then time both.

    Raises:
        GateError: they disagree.
    """
    columns = make_rows(options.rows, options.users, options.seed)
    calls: dict[str, Callable[[], dict[str, dict[str, float]]]] = {
        "lists": lambda: listed(columns),
        "m3oe_fast": lambda: measured(columns),
    }
    _check(calls["lists"](), calls["m3oe_fast"]())
    times = {
        name: timing.summarise(samples) for name, samples in timing.interleave(calls, options.rounds, warmup=0).items()
    }
    return document.header("metrics", command.settings(options)) | {
        "contenders": [
            {"name": name, "seconds": found.quartiles(), "cpu_seconds": found.cpu} for name, found in times.items()
        ],
        "speedup": times["lists"].cpu / times["m3oe_fast"].cpu,
    }


def make_rows(rows: int, users: int, seed: int) -> Columns:
    """Logits [N,T], domain [N], label [N,T] and user [N]; labels follow from the logits."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((rows, len(TASKS))).astype(np.float32)
    label = (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    return logits, rng.choice(len(DOMAINS), rows, p=SHARES), label, rng.integers(0, users, rows)


def measured(columns: Columns) -> dict[str, dict[str, float]]:
    """By `Meter`, in batches."""
    meter = metrics.Meter(DOMAINS, TASKS)
    for start in range(0, len(columns[1]), EVALUATION_ROWS):
        meter.update(*(column[start : start + EVALUATION_ROWS] for column in columns))
    return meter.compute().to_dict()


def listed(columns: Columns) -> dict[str, dict[str, float]]:
    """By Python lists, one pair after the other."""
    logits, domain, label, user = columns
    lists = {(d, t): ([], [], []) for d in range(len(DOMAINS)) for t in range(len(TASKS))}
    for start in range(0, len(domain), EVALUATION_ROWS):
        part = slice(start, start + EVALUATION_ROWS)
        for (d, t), (scores, labels, users) in lists.items():
            own = domain[part] == d
            scores.extend(logits[part][own, t].tolist())
            labels.extend(label[part][own, t].tolist())
            users.extend(user[part][own].tolist())
    found: dict[str, dict[str, float]] = {"auc": {}, "logloss": {}, "gauc": {}}
    for (d, t), of_pair in lists.items():
        name = f"{DOMAINS[d]}/{TASKS[t]}"
        scores, labels, users = map(np.array, of_pair)
        probability = 1 / (1 + np.exp(-scores))
        target = torch.from_numpy(labels.astype(np.int64))
        found["auc"][name] = binary_auroc(torch.from_numpy(probability), target, validate_args=False).item()
        found["logloss"][name] = float(-np.log(np.where(labels == 1, probability, 1 - probability)).mean())
        found["gauc"][name] = _looped(scores, labels, users)
    return found


def _looped(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    order = np.argsort(users, kind="stable")
    ends = np.flatnonzero(np.diff(users[order])) + 1
    total = weight = 0.0
    for rows in np.split(order, ends):
        own, positive = scores[rows], labels[rows] == 1
        positives = int(positive.sum())
        if 0 < positives < len(own):
            rank = np.argsort(np.argsort(own)) + 1
            ordered = rank[positive].sum() - positives * (positives + 1) / 2
            total += len(own) * ordered / (positives * (len(own) - positives))
            weight += len(own)
    return total / weight


def _check(lists: dict[str, dict[str, float]], own: dict[str, dict[str, float]]) -> None:
    for metric, values in lists.items():
        for name, value in values.items():
            if abs(own[metric][name] - value) > 1e-5:
                raise gate.GateError(f"{metric} of {name} is {own[metric][name]:.7f}, lists say {value:.7f}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.metrics", description=__doc__)
    add = parser.add_argument
    add("--rows", type=command.positive, default=1_000_000)
    add("--users", type=command.positive, default=50_000)
    command.add_shared(parser, rounds=5, rounds_help="timed calls of each")
    parser.set_defaults(threads=1)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
