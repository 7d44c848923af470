"""`python -m bench.ablations`: what each part of M3oE is worth on a log, over several seeds.

The paper's Table 3, the number of shared experts and the learning rate (Figure 4), and the ways to train the fusion
weights, by the package's own trainer: mean test AUC of the best epoch by validation, against the full model with the
same seed. A seed decides first weights and the order of the rows, so it moves all variants alike.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bench import command, document
from bench.seeds import aucs_by_seed
from m3oe_fast import cli
from m3oe_fast.data import Dataset
from m3oe_fast.models import MODELS
from m3oe_fast.models.options import ModelOptions
from m3oe_fast.training import Trainer, TrainOptions
from m3oe_fast.training.console import Display

FULL = "M3oE"
_TRAINING = ("bilevel", "lr", "outer_fraction")

ABLATIONS: dict[str, dict[str, Any]] = {
    FULL: {},
    "without AutoML (fixed fusion weights)": {"bilevel": "off"},
    "without shared experts": {"shared_experts": 0},
    "without domain experts": {"domain_experts": False},
    "without task experts": {"task_experts": False},
    "without domain and task experts": {"domain_experts": False, "task_experts": False},
    "fully gated modules": {"modules": "gated"},
    "concatenated modules": {"modules": "concatenated"},
    "fusion weights trained with the network": {"bilevel": "joint"},
    "fusion weights trained as published": {"bilevel": "published"},
    "gates send gradients": {"gate_detach": False},
    "star term linear, as printed": {"star_activation": "linear"},
    **{f"K = {k}": {"shared_experts": k} for k in (1, 2, 3, 5, 6)},
    **{f"lr {lr:g}": {"lr": lr} for lr in (1e-4, 1e-3, 1e-2)},
}
"""By name, what differs from the full model: K = 4, lr 3e-3 unless the line says otherwise."""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train every variant with every seed.

    Raises:
        UserError: the data cannot be read, or the backend cannot run.
        DataError: a test AUC is undefined.
    """
    dataset = command.load_data(options)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.variants}
    for seed in options.seeds:
        for name in options.variants:
            runs[name].append(_train(dataset, ABLATIONS[name], seed, options))
            command.say(f"seed {seed}, {name}: {runs[name][-1]['test_auc']:.4f}")
    return document.header("ablations", command.settings(options)) | {
        "data": dataset.name,
        "rows": {part: len(getattr(dataset, part)) for part in ("train", "val", "test")},
        "variants": compared(runs),
    }


def compared(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Per variant mean and sample standard deviation over the seeds, and of its paired difference from the full model.

    Raises:
        DataError: a test AUC is undefined.
    """
    aucs = aucs_by_seed(runs)
    rows = []
    for name, found in runs.items():
        differences = [own - full for own, full in zip(aucs[name], aucs[FULL], strict=True)]
        rows.append(
            {
                "name": name,
                "mean": statistics.mean(aucs[name]),
                "std": statistics.stdev(aucs[name]),
                "difference": statistics.mean(differences),
                "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
                "better_seeds": sum(difference > 0 for difference in differences),
                "parameters": found[0]["parameters"],
                "runs": list(found),
            }
        )
    return rows


def _train(dataset: Dataset, changed: Mapping[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    training = {"lr": options.lr} | {name: value for name, value in changed.items() if name in _TRAINING}
    sizes = {name: value for name, value in changed.items() if name not in _TRAINING}
    config = ModelOptions(**sizes).config(dataset.schema)
    torch.manual_seed(seed)
    model = MODELS["m3oe"](config, backend=options.backend if config.fused else "auto")
    train = TrainOptions(epochs=options.epochs, batch_size=options.batch_size, seed=seed, **training)
    result = Trainer(model, dataset, train, display=Display()).fit()
    return {
        "seed": seed,
        "epochs": len(result.history),
        "best_epoch": result.best_epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "val_auc": result.val.to_dict()["auc"]["mean"],
        "test_auc": result.test.to_dict()["auc"]["mean"],
        "test_logloss": result.test.to_dict()["logloss"]["mean"],
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.ablations", description=__doc__)
    add = parser.add_argument
    add(
        "--variants",
        nargs="+",
        choices=list(ABLATIONS),
        default=list(ABLATIONS),
        metavar="NAME",
        help="as in the table",
    )
    add("--seeds", type=int, nargs="+", default=[2022, 2023, 2024, 2025, 2026])
    add("--lr", type=float, default=3e-3, help="learning rate of the network")
    command.add_data(parser)
    command.add_shared(parser, rounds=None, backend="cpu", seed=None)
    parser.set_defaults(epochs=20)
    options = parser.parse_args(argv)
    if FULL not in options.variants:
        parser.error(f"--variants must have {FULL}, which the others are compared with")
    if len(set(options.seeds)) < max(2, len(options.seeds)):
        parser.error("--seeds must be two or more, all different")
    return options


if __name__ == "__main__":
    cli.run(main)
