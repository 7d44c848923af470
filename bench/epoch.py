"""`python -m bench.epoch`: epochs of the real trainer, m3oe_fast against the eager reference on the
same prepared data.

Two questions: how long one epoch takes end to end, backends in interleaved order; and whether both
reach the same test AUC from the same seed. Everything but the backend is the same: data, first
weights, row order, options.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch

from bench import document, environment, report, timing
from m3oe_fast import M3oE, M3oEConfig, cli
from m3oe_fast.data import Dataset, load
from m3oe_fast.data.splits import SPLITS
from m3oe_fast.training import Result, Trainer, TrainOptions
from m3oe_fast.training.console import Display


class Fit(NamedTuple):
    """A finished training run: the times of the whole call, the wall seconds of its epochs, its
    result.
    """

    sample: timing.Sample
    epoch_seconds: list[float]
    result: Result


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    options = _parse(argv)
    environment.ensure(options.allocator)
    torch.set_num_threads(options.threads)
    result = run(options)
    print(report.render(result))
    if options.json:
        document.write(options.json, result)
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train with both backends and gather times and AUCs.

    Raises:
        UserError: the data cannot be read, or a backend cannot run.
    """
    dataset = load(
        options.data,
        options.data_path,
        split=options.split,
        split_seed=options.split_seed,
        cache_dir=options.cache_dir,
    )
    backends = [options.opponent, options.backend]
    once = TrainOptions(epochs=1, batch_size=options.batch_size, seed=options.seed)
    several = TrainOptions(epochs=options.epochs, batch_size=options.batch_size, seed=options.seed)

    _say(f"accuracy: at most {options.epochs} epochs with each backend")
    accurate = {name: fit(dataset, name, several) for name in backends}
    fits: dict[str, list[Fit]] = {name: [] for name in backends}
    for turn in range(options.rounds):
        _say(f"one epoch with each backend, round {turn + 1} of {options.rounds}")
        for name in backends[:: 1 if turn % 2 else -1]:
            fits[name].append(fit(dataset, name, once))

    rows = [_row(name, fits[name], accurate[name].result) for name in backends]
    opponent, own = rows
    aucs = [row["accuracy"]["test_auc"]["mean"] for row in rows]
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "data_path", "cache_dir")}
    return document.header("epoch", settings) | {
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


def fit(dataset: Dataset, backend: str, options: TrainOptions) -> Fit:
    """Train a new model from the seed, in memory. Making model and trainer is not timed, all of
    `Trainer.fit` is.
    """
    schema = dataset.schema
    torch.manual_seed(options.seed)
    config = M3oEConfig(schema.vocab_sizes, len(schema.dense), len(schema.domains), len(schema.tasks))
    trainer = Trainer(M3oE(config, backend=backend), dataset, options, display=Display())
    results: list[Result] = []
    sample = timing.time_call(lambda: results.append(trainer.fit()))
    return Fit(sample, [epoch.seconds for epoch in results[0].history], results[0])


def _row(backend: str, fits: list[Fit], accurate: Result) -> dict[str, Any]:
    whole = timing.summarise([one.sample for one in fits])
    epoch = timing.summarise([timing.Sample(seconds, 0.0, 0) for one in fits for seconds in one.epoch_seconds])
    return {
        "backend": backend,
        "fit_seconds": _quartiles(whole),
        "cpu_seconds": whole.cpu,
        "epoch_seconds": _quartiles(epoch),
        "accuracy": {
            "ended": accurate.ended,
            "epochs": len(accurate.history),
            "best_epoch": accurate.best_epoch,
            "test_auc": accurate.test.to_dict()["auc"],
            "test_logloss": accurate.test.to_dict()["logloss"],
            "fusion": accurate.metrics["fusion"],
        },
    }


def _quartiles(summary: timing.Summary) -> dict[str, float]:
    return {"median": summary.median, "q1": summary.q1, "q3": summary.q3, "min": summary.least}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.epoch", description=__doc__)
    add = parser.add_argument
    add("--data", default="movielens-100k", help="as for python -m m3oe_fast.train")
    add("--data_path", help="file or folder of the log")
    add("--cache_dir", help="where prepared data lie (default: the user's cache folder)")
    add("--split", choices=SPLITS, default="random")
    add("--split_seed", type=int, default=0)
    add("--backend", default="cpu", help="backend of m3oe_fast")
    add("--opponent", default="reference", help="the backend it is compared with")
    add("--batch_size", type=int, default=4096)
    add("--epochs", type=int, default=5, help="epochs of the accuracy comparison, at most")
    add("--rounds", type=int, default=5, help="timed one-epoch runs with each backend")
    add("--seed", type=int, default=2022)
    add("--threads", type=int, default=2)
    add("--allocator", choices=environment.ALLOCATORS, default="tuned")
    add("--json", metavar="PATH", help="keep the result here")
    options = parser.parse_args(argv)
    if options.backend == options.opponent:
        parser.error("--backend and --opponent must differ")
    return options


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
