"""`python -m bench.reproduction`: M3oE trained as published, on the splits that the published figures may stand for.

Learning rate 1e-2, one shared expert, published initialisation, at most 50 epochs, patience 10: the hyper-parameters of
the published program for MovieLens. It has 20 steps an epoch (batches of 40,960 of 800,167 rows), and so have batches
of 4,096 of MovieLens-100K. The fusion weights train in two ways:

    published   one step an epoch at 1e-3, on a training batch: what the paper describes
    joint       in every step, at the network's rate: what the published program in effect does, whose main optimizer
                holds them too

The splits mean something else on another log: the published program cuts by position a file that is grouped by user.
How many users of the test rows are new is part of the result.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bench import command, document
from m3oe_fast import M3oE, cli
from m3oe_fast.data import Dataset, load
from m3oe_fast.data.splits import SPLITS
from m3oe_fast.errors import DataError
from m3oe_fast.models.options import ModelOptions
from m3oe_fast.training import Trainer, TrainOptions
from m3oe_fast.training.console import Display

WAYS = ("published", "joint")
"""Modes of ``bilevel``."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train on every split, in every way, from every seed.

    Raises:
        UserError: the data cannot be read, or the backend cannot run.
        DataError: a test AUC is undefined.
    """
    return document.header("reproduction", command.settings(options)) | {
        "data": options.data,
        "splits": [_on_split(split, options) for split in options.splits],
    }


def _on_split(split: str, options: argparse.Namespace) -> dict[str, Any]:
    dataset = load(
        options.data, options.data_path, split=split, split_seed=options.split_seed, cache_dir=options.cache_dir
    )
    ways = []
    for way in options.ways:
        runs = []
        for seed in options.seeds:
            command.say(f"split {split}, {way}, seed {seed}: at most {options.epochs} epochs")
            runs.append(_train(dataset, way, seed, options))
        ways.append({"way": way, **summary(runs), "runs": runs})
    counts = {
        part: {name: count[name] for name in ("rows", "users", "new_users")} for part, count in dataset.counts.items()
    }
    return {"split": split, "counts": counts, "ways": ways}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over the seeds: of the mean test AUC, of each pair's and of the logloss.

    Raises:
        DataError: a test AUC is undefined.
    """
    for run in runs:
        for pair, value in run["test_auc"].items():
            if value is None and pair != "mean":
                raise DataError(f"the test rows leave the AUC of {pair} undefined: every pair needs both labels")
    aucs = [run["test_auc"]["mean"] for run in runs]
    return {
        "auc": {pair: statistics.mean(run["test_auc"][pair] for run in runs) for pair in runs[0]["test_auc"]},
        "std": statistics.stdev(aucs),
        "logloss": statistics.mean(run["test_logloss"]["mean"] for run in runs),
        "fusion": {name: statistics.mean(run["fusion"][name] for run in runs) for name in runs[0]["fusion"]},
    }


def _train(dataset: Dataset, way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    train = TrainOptions(
        epochs=options.epochs,
        patience=options.patience,
        batch_size=options.batch_size,
        lr=options.lr,
        fusion_lr=options.lr if way == "joint" else options.fusion_lr,
        bilevel=way,
        seed=seed,
    )
    torch.manual_seed(seed)
    model = M3oE(ModelOptions(shared_experts=options.shared_experts).config(dataset.schema), backend=options.backend)
    result = Trainer(model, dataset, train, display=Display()).fit()
    test = result.test.to_dict()
    return {
        "seed": seed,
        "epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "val_auc": result.val.mean_auc,
        "test_auc": test["auc"],
        "test_logloss": test["logloss"],
        "fusion": result.metrics["fusion"],
        "seconds": sum(epoch.seconds for epoch in result.history),
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.reproduction", description=__doc__)
    add = parser.add_argument
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    add("--seeds", type=int, nargs="+", default=[2022, 2023, 2024, 2025, 2026])
    add("--splits", nargs="+", choices=SPLITS, default=["official", "random", "user"])
    add("--shared_experts", type=command.positive, default=1)
    add("--lr", type=float, default=1e-2)
    add("--fusion_lr", type=float, default=1e-3, help="of the way published; joint has --lr")
    add("--patience", type=command.positive, default=10)
    command.add_data(parser, one_split=False)
    command.add_shared(parser, rounds=None, backend="cpu", seed=None)
    parser.set_defaults(epochs=50)
    options = parser.parse_args(argv)
    for name in ("ways", "splits"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            parser.error(f"--{name} must be all different")
    if len(set(options.seeds)) < max(2, len(options.seeds)):
        parser.error("--seeds must be two or more, all different")
    return options


if __name__ == "__main__":
    cli.run(main)
