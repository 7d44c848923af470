"""`python -m bench.loop`: an epoch of a MovieLens-1M-sized log end to end, the trainer against a faithful eager loop.

The log is generated (`workload.make_batch`, shares and label rates of MovieLens-1M) and lies in memory for all. The
opponent is the published style: eager network (`published.py`), a `Dataset` that gives one row at a time, PyTorch's
`DataLoader` with its default collation, fused Adam, and predictions gathered in Python lists for the metrics. It is
measured with each of `--workers` and its best time counts. m3oe_fast is `Trainer.fit` with one epoch: training,
validation, its checkpoint in a temporary folder, and both final evaluations; of the opponent only training and one
validation are timed. Contenders run in interleaved order in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as RowDataset
from torchmetrics.functional.classification import binary_auroc

from bench import command, document, gate, timing, workload
from bench.published import PublishedM3oE
from m3oe_fast import M3oE, cli
from m3oe_fast.backends import CPU_PRECISIONS
from m3oe_fast.data import Dataset, Part, Schema
from m3oe_fast.training import Trainer, TrainOptions
from m3oe_fast.training.console import Display

TRAIN_SHARE, VAL_SHARE = 0.8, 0.1
GATE_ROWS = 512


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Gate the networks, then time the loops.

    Raises:
        GateError: the eager network and the kernels disagree.
    """
    _check_networks(options)
    log = make_log(options.rows)
    dataset = make_dataset(log)
    opponents = {f"workers {n}": _eager_epoch(log, options, n) for n in options.workers}
    own = {precision: _own_epoch(dataset, options, precision) for precision in options.precision}
    calls = opponents | own
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    samples: dict[str, list[timing.Sample]] = {name: [] for name in calls}
    for turn in range(options.rounds):
        names = list(calls) if turn % 2 else list(calls)[::-1]
        for name in names:
            command.say(f"round {turn + 1} of {options.rounds}: {name}")
            samples[name].append(timing.time_call(lambda name=name: results[name].append(calls[name]())))
    times = {name: timing.summarise(found) for name, found in samples.items()}
    best = min(opponents, key=lambda name: times[name].median)
    return document.header("loop", command.settings(options)) | {
        "rows": {part: len(getattr(dataset, part)) for part in ("train", "val", "test")},
        "opponent": best,
        "contenders": [
            {
                "name": name,
                "own": name in own,
                "seconds": times[name].quartiles(),
                "cpu_seconds": times[name].cpu,
                "speedup": times[best].median / times[name].median,
                **results[name][-1],
            }
            for name in calls
        ],
    }


def make_log(rows: int) -> workload.Batch:
    """A whole log of the published sizes, as one batch."""
    return workload.make_batch(workload.PUBLISHED, rows)


def make_dataset(log: workload.Batch) -> Dataset:
    """The log as prepared data in memory, cut by position."""
    config = workload.PUBLISHED
    fields = (*(f"field{f}" for f in range(len(config.vocab_sizes) - 1)), "domain")
    schema = Schema(fields, tuple(config.vocab_sizes), ("age",), ("0", "1", "2"), ("click", "like"))
    parts = dict(zip(("train", "val", "test"), _cut(log), strict=True))
    return Dataset(
        name="generated, as MovieLens-1M",
        split="official",
        split_seed=0,
        schema=schema,
        encoder=SimpleNamespace(to_dict=dict),
        **{name: Part(_columns(part, schema), schema, name) for name, part in parts.items()},
        best_auc=None,
        counts={},
        warnings=(),
        identity="generated",
        folder=Path("memory"),
    )


def _cut(log: workload.Batch) -> list[workload.Batch]:
    rows = len(log.domain)
    ends = [round(TRAIN_SHARE * rows), round((TRAIN_SHARE + VAL_SHARE) * rows)]
    columns = [torch.tensor_split(column, ends) for column in log]
    return [workload.Batch(*part) for part in zip(*columns, strict=True)]


def _columns(part: workload.Batch, schema: Schema) -> dict[str, np.ndarray]:
    ids = part.ids.numpy()
    smallest = [np.min_scalar_type(size - 1) for size in schema.vocab_sizes]
    columns = {f"id:{name}": ids[:, f].astype(smallest[f]) for f, name in enumerate(schema.fields)}
    domain = part.domain.numpy().astype(np.uint8)
    return columns | {"dense": part.dense.numpy(), "domain": domain, "label": part.label.numpy()}


class _Rows(RowDataset):
    """One row at a time, as the published code hands them on."""

    def __init__(self, part: workload.Batch) -> None:
        self._columns = [column.numpy() for column in part]

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return tuple(column[row] for column in self._columns)


def _eager_epoch(log: workload.Batch, options: argparse.Namespace, workers: int) -> Callable[[], dict[str, Any]]:
    train, val, _ = (_Rows(part) for part in _cut(log))

    def epoch() -> dict[str, Any]:
        torch.manual_seed(options.seed)
        network = PublishedM3oE(M3oE(workload.PUBLISHED, backend="reference"))
        adam = torch.optim.Adam(network.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
        loader = DataLoader(train, options.batch_size, shuffle=True, num_workers=workers)
        for batch in loader:
            adam.zero_grad()
            network.loss(*batch).backward()
            adam.step()
        return {"val_auc": _listed_auc(network, DataLoader(val, options.batch_size, num_workers=workers))}

    return epoch


@torch.no_grad()
def _listed_auc(network: PublishedM3oE, loader: DataLoader) -> float:
    """Mean AUC over the pairs, from Python lists."""
    config = workload.PUBLISHED
    scores: dict[tuple[int, int], list[float]] = {}
    labels: dict[tuple[int, int], list[int]] = {}
    for ids, dense, domain, label in loader:
        probability = torch.sigmoid(network(ids, dense, domain))
        for d in range(config.num_domains):
            own = domain == d
            for t in range(config.num_tasks):
                scores.setdefault((d, t), []).extend(probability[own, t].tolist())
                labels.setdefault((d, t), []).extend(label[own, t].int().tolist())
    aucs = [binary_auroc(torch.tensor(scores[pair]), torch.tensor(labels[pair])).item() for pair in scores]
    return float(np.mean(aucs))


def _own_epoch(dataset: Dataset, options: argparse.Namespace, precision: str) -> Callable[[], dict[str, Any]]:
    train = TrainOptions(epochs=1, batch_size=options.batch_size, seed=options.seed, profile=True)

    def epoch() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(options.seed)
            model = M3oE(workload.PUBLISHED, backend=options.backend, precision=precision)
            trainer = Trainer(model, dataset, train, out=Path(folder) / "run", display=Display())
            result = trainer.fit()
            seconds = result.history[0].seconds
            profile = trainer.clock.report(seconds)
        return {
            "val_auc": result.val.mean_auc,
            "computes": model.compute_precision,
            "epoch_seconds": seconds,
            "validation_share": result.history[0].validation_seconds / seconds,
            "profile": profile,
        }

    return epoch


def _check_networks(options: argparse.Namespace) -> None:
    """Both networks give the same logits from the same weights."""
    work = workload.make_workload(GATE_ROWS, backend=options.backend)
    with torch.no_grad():
        eager = PublishedM3oE(work.model)(*work.batch[:3])
        own = work.model.eval()(*work.batch[:3])
    if not torch.allclose(eager, own, rtol=1e-3, atol=1e-4):
        raise gate.GateError(f"the networks differ by {(eager - own).abs().max():.2e}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.loop", description=__doc__)
    add = parser.add_argument
    add("--rows", type=command.positive, default=1_000_209, help="of the log; eight tenths are trained on")
    add("--batch_size", type=command.positive, default=4096)
    add("--precision", nargs="+", choices=CPU_PRECISIONS, default=["fp32", "bf16"])
    add("--workers", nargs="+", type=int, default=[0, 2], help="worker processes of the opponent's loader")
    command.add_shared(parser, rounds=3, rounds_help="timed epochs of each contender", backend="cpu", seed=2022)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
