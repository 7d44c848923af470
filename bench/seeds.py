"""`python -m bench.seeds`: what reduced precision does to accuracy, against what the seed does.

The package's own trainer, several seeds in every precision: mean test AUC, and whether the mean of a reduced precision
differs from that of fp32 by less than one standard deviation over the seeds of fp32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bench import command, document, epoch
from m3oe_fast import cli
from m3oe_fast.backends import CPU_PRECISIONS
from m3oe_fast.data import Dataset
from m3oe_fast.errors import DataError
from m3oe_fast.training import TrainOptions


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train with every precision and seed.

    Raises:
        UserError: the data cannot be read, or a precision cannot run.
    """
    dataset = command.load_data(options)
    runs = {precision: [] for precision in options.precision}
    for seed in options.seeds:
        for precision in options.precision:
            command.say(f"seed {seed}, {precision}: at most {options.epochs} epochs")
            runs[precision].append(_train(dataset, precision, seed, options))
    return document.header("seeds", command.settings(options)) | {
        "data": dataset.name,
        "rows": {part: len(getattr(dataset, part)) for part in ("train", "val", "test")},
        "precisions": compared(runs),
    }


def aucs_by_seed(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[float]]:
    """The mean test AUC of every run, in the order of its seed.

    Raises:
        DataError: one is undefined.
    """
    aucs = {name: [run["test_auc"] for run in found] for name, found in runs.items()}
    if any(None in found for found in aucs.values()):
        raise DataError("the test rows leave an AUC undefined: every pair needs both labels")
    return aucs


def compared(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation per precision, and how they lie against fp32.

    Raises:
        DataError: a test AUC is undefined.
    """
    aucs = aucs_by_seed(runs)
    mean, spread = statistics.mean(aucs["fp32"]), statistics.stdev(aucs["fp32"])
    return [
        {
            "precision": precision,
            "computes": found[0]["computes"],
            "mean": statistics.mean(aucs[precision]),
            "std": statistics.stdev(aucs[precision]),
            "min": min(aucs[precision]),
            "max": max(aucs[precision]),
            "difference": statistics.mean(aucs[precision]) - mean,
            "within_spread": abs(statistics.mean(aucs[precision]) - mean) <= spread,
            "runs": found,
        }
        for precision, found in runs.items()
    ]


def _train(dataset: Dataset, precision: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    train = TrainOptions(epochs=options.epochs, batch_size=options.batch_size, seed=seed)
    done = epoch.fit(dataset, options.backend, train, precision)
    return {
        "seed": seed,
        "computes": done.computes,
        "epochs": len(done.result.history),
        "best_epoch": done.result.best_epoch,
        "test_auc": done.result.test.to_dict()["auc"]["mean"],
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.seeds", description=__doc__)
    add = parser.add_argument
    add("--precision", nargs="+", choices=CPU_PRECISIONS, default=list(CPU_PRECISIONS), help="fp32 must be one of them")
    add("--seeds", type=int, nargs="+", default=[2022, 2023, 2024, 2025, 2026])
    command.add_data(parser)
    command.add_shared(parser, rounds=None, backend="cpu", seed=None)
    options = parser.parse_args(argv)
    if "fp32" not in options.precision:
        parser.error("--precision must have fp32, which the others are compared with")
    if len(set(options.seeds)) < max(2, len(options.seeds)):
        parser.error("--seeds must be two or more, all different")
    return options


if __name__ == "__main__":
    cli.run(main)
