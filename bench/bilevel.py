"""`python -m bench.bilevel`: what training the fusion weights does to accuracy, and what it costs.

The package's own trainer on the same data with every mode of `--bilevel`, several seeds each: mean test AUC against
that of fixed fusion weights, seconds of a run, and where the fusion weights end. The modes take turns, so that other
load on the machine meets all of them. Batches are smaller than the trainer's and outer steps more frequent and longer,
since with its defaults a log of this size has a handful of outer steps, which move nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from bench import command, document, epoch
from bench.seeds import aucs_by_seed
from m3oe_fast import cli
from m3oe_fast.data import Dataset
from m3oe_fast.training import TrainOptions
from m3oe_fast.training.options import Bilevel

FIXED = "off"
"""The mode that the others are compared with: fusion weights that stay as they start."""

MODES: tuple[str, ...] = get_args(Bilevel)

_TRAINING = {
    "fusion_lr": float,
    "outer_every": command.positive,
    "outer_fraction": float,
    "neumann_terms": command.positive,
    "unroll_rate": float,
}
"""Options of training that the modes read, and how to read them."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train with every mode and seed.

    Raises:
        UserError: the data cannot be read, or the backend cannot run.
        DataError: a test AUC is undefined.
    """
    dataset = command.load_data(options)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in options.modes}
    for turn, seed in enumerate(options.seeds):
        for mode in options.modes[:: -1 if turn % 2 else 1]:
            command.say(f"seed {seed}, {mode}: at most {options.epochs} epochs")
            runs[mode].append(_train(dataset, mode, seed, options))
    return document.header("bilevel", command.settings(options)) | {
        "data": dataset.name,
        "rows": {part: len(getattr(dataset, part)) for part in ("train", "val", "test")},
        "modes": compared(runs),
    }


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Per mode mean and sample standard deviation over the seeds, and how they lie against fixed fusion weights.

    Raises:
        DataError: a test AUC is undefined.
    """
    aucs = aucs_by_seed(runs)
    return [
        {
            "mode": mode,
            "mean": statistics.mean(aucs[mode]),
            "std": statistics.stdev(aucs[mode]),
            "min": min(aucs[mode]),
            "max": max(aucs[mode]),
            "better_seeds": sum(own > fixed for own, fixed in zip(aucs[mode], aucs[FIXED], strict=True)),
            "difference": statistics.mean(aucs[mode]) - statistics.mean(aucs[FIXED]),
            "epoch_seconds": statistics.median(seconds for run in found for seconds in run["epoch_seconds"]),
            "fit_seconds": statistics.median(run["fit_seconds"] for run in found),
            "fusion": {
                name: statistics.mean(run["fusion"][name] for run in found) for name in sorted(found[0]["fusion"])
            },
            "runs": list(found),
        }
        for mode, found in runs.items()
    ]


def _train(dataset: Dataset, mode: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    train = TrainOptions(
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=seed,
        bilevel=mode,
        **{name: getattr(options, name) for name in _TRAINING},
    )
    done = epoch.fit(dataset, options.backend, train)
    return {
        "seed": seed,
        "epochs": len(done.result.history),
        "best_epoch": done.result.best_epoch,
        "test_auc": done.result.test.to_dict()["auc"]["mean"],
        "test_logloss": done.result.test.to_dict()["logloss"]["mean"],
        "fit_seconds": done.sample.wall,
        "epoch_seconds": done.epoch_seconds,
        "fusion": done.result.metrics["fusion"],
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.bilevel", description=__doc__)
    add = parser.add_argument
    add("--modes", nargs="+", choices=MODES, default=list(MODES), help=f"{FIXED} must be one of them")
    add("--seeds", type=int, nargs="+", default=[2022, 2023, 2024, 2025, 2026])
    for name, kind in _TRAINING.items():
        add(f"--{name}", type=kind, default=getattr(TrainOptions(), name), help="as for python -m m3oe_fast.train")
    command.add_data(parser)
    command.add_shared(parser, rounds=None, backend="cpu", seed=None)
    parser.set_defaults(batch_size=1024, epochs=10, fusion_lr=1e-2, outer_every=10)
    options = parser.parse_args(argv)
    if FIXED not in options.modes or len(set(options.modes)) < len(options.modes):
        parser.error(f"--modes must be all different and have {FIXED}, which the others are compared with")
    if len(set(options.seeds)) < max(2, len(options.seeds)):
        parser.error("--seeds must be two or more, all different")
    return options


if __name__ == "__main__":
    cli.run(main)
