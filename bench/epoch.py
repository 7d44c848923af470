"""`python -m bench.epoch`: epochs of the real trainer, m3oe_fast against the eager reference on the
same prepared data.

Two questions: how long one epoch takes end to end, backends in interleaved order; and whether both
reach the same test AUC from the same seed. Everything but the backend is the same: data, first
weights, row order, options.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from bench import command, document, timing
from m3oe_fast import M3oE, cli
from m3oe_fast.data import Dataset
from m3oe_fast.models.options import ModelOptions
from m3oe_fast.training import Result, Trainer, TrainOptions
from m3oe_fast.training.console import Display


class Fit(NamedTuple):
    """A finished training run: the times of the whole call, the wall seconds of its epochs, its
    result, the precision it has really computed in.
    """

    sample: timing.Sample
    epoch_seconds: list[float]
    result: Result
    computes: str


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train with both backends and gather times and AUCs.

    Raises:
        UserError: the data cannot be read, or a backend cannot run.
    """
    dataset = command.load_data(options)
    backends = [options.opponent, options.backend]
    once = TrainOptions(epochs=1, batch_size=options.batch_size, seed=options.seed)
    several = TrainOptions(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)

    command.say(f"accuracy: at most {options.epochs} epochs with each backend")
    accurate = {name: fit(dataset, name, several) for name in backends}
    fits: dict[str, list[Fit]] = {name: [] for name in backends}
    for turn in range(options.rounds):
        command.say(f"one epoch with each backend, round {turn + 1} of {options.rounds}")
        for name in backends[:: 1 if turn % 2 else -1]:
            fits[name].append(fit(dataset, name, once))

    rows = [_row(name, fits[name], accurate[name].result) for name in backends]
    opponent, own = rows
    aucs = [row["accuracy"]["test_auc"]["mean"] for row in rows]
    return document.header("epoch", command.settings(options)) | {
        "data": dataset.name,
        "rows": {part: len(getattr(dataset, part)) for part in ("train", "val", "test")},
        "own": options.backend,
        "backends": rows,
        "speedup": {
            "fit": opponent["fit_seconds"]["median"] / own["fit_seconds"]["median"],
            "epoch": opponent["epoch_seconds"]["median"] / own["epoch_seconds"]["median"],
        },
        "auc_difference": None if None in aucs else aucs[1] - aucs[0],
    }


def fit(dataset: Dataset, backend: str, options: TrainOptions, precision: str = "fp32") -> Fit:
    """Train a new model from the seed, in memory. Making model and trainer is not timed, all of
    `Trainer.fit` is.
    """
    schema = dataset.schema
    torch.manual_seed(options.seed)
    config = ModelOptions().config(schema)
    model = M3oE(config, backend=backend, precision=precision)
    trainer = Trainer(model, dataset, options, display=Display())
    results: list[Result] = []
    sample = timing.time_call(lambda: results.append(trainer.fit()))
    return Fit(sample, [epoch.seconds for epoch in results[0].history], results[0], model.compute_precision)


def _row(backend: str, fits: list[Fit], accurate: Result) -> dict[str, Any]:
    whole = timing.summarise([one.sample for one in fits])
    epoch = timing.summarise([timing.Sample(seconds, 0.0, 0) for one in fits for seconds in one.epoch_seconds])
    return {
        "backend": backend,
        "fit_seconds": whole.quartiles(),
        "cpu_seconds": whole.cpu,
        "epoch_seconds": epoch.quartiles(),
        "accuracy": {
            "ended": accurate.ended,
            "epochs": len(accurate.history),
            "best_epoch": accurate.best_epoch,
            "test_auc": accurate.test.to_dict()["auc"],
            "test_logloss": accurate.test.to_dict()["logloss"],
            "fusion": accurate.metrics["fusion"],
        },
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.epoch", description=__doc__)
    parser.add_argument("--opponent", default="reference", help="the backend it is compared with")
    command.add_data(parser)
    command.add_shared(parser, rounds=5, rounds_help="timed one-epoch runs with each backend", backend="cpu", seed=2022)
    options = parser.parse_args(argv)
    if options.backend == options.opponent:
        parser.error("--backend and --opponent must differ")
    return options


if __name__ == "__main__":
    cli.run(main)
