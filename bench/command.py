"""What the commands of this folder share: their options, and the way from arguments to a printed and kept result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import document, environment, gate, report
from m3oe_fast.data import Dataset, load
from m3oe_fast.data.splits import SPLITS

# Where something lies on this machine says nothing about a measurement.
_PATHS = ("json", "data_path", "cache_dir")


def execute(options: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Measure, print the tables and keep the document; returns the exit status, 1 if the gate refuses a contender."""
    environment.ensure(options.allocator)
    torch.set_num_threads(options.threads)
    try:
        result = run(options)
    except gate.GateError as refusal:
        print(f"refused: {refusal}", file=sys.stderr)
        return 1
    print(report.render(result))
    if options.json:
        document.write(options.json, result)
    return 0


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a document keeps them, without paths."""
    return {name: value for name, value in vars(options).items() if name not in _PATHS}


def say(line: str) -> None:
    """Tell about the progress."""
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """An option's value: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_shared(
    parser: argparse.ArgumentParser,
    *,
    rounds: int | None,
    rounds_help: str = "timed calls per contender",
    backend: str = "auto",
    seed: int | None = 0,
    allocators: Sequence[str] = environment.ALLOCATORS,
    allocator: str = "tuned",
) -> None:
    """The options that every command has; with None for `rounds` or `seed` all but that one."""
    add = parser.add_argument
    add("--backend", default=backend, help="backend of m3oe_fast")
    if rounds is not None:
        add("--rounds", type=positive, default=rounds, help=rounds_help)
    if seed is not None:
        add("--seed", type=int, default=seed)
    add("--threads", type=positive, default=2)
    add("--allocator", choices=allocators, default=allocator)
    add("--json", metavar="PATH", help="keep the result here")


def add_data(parser: argparse.ArgumentParser, *, one_split: bool = True) -> None:
    """The options of a command that trains: what `load_data` reads, and for how long; `one_split` False: all but the
    split."""
    add = parser.add_argument
    add("--data", default="movielens-100k", help="as for python -m m3oe_fast.train")
    add("--data_path", help="file or folder of the log")
    add("--cache_dir", help="where prepared data lie (default: the user's cache folder)")
    if one_split:
        add("--split", choices=SPLITS, default="random")
    add("--split_seed", type=int, default=0)
    add("--batch_size", type=positive, default=4096)
    add("--epochs", type=positive, default=5, help="epochs behind an AUC, at most")


def load_data(options: argparse.Namespace) -> Dataset:
    """The prepared data that these options name.

    Raises:
        UserError: the data cannot be read.
    """
    return load(
        options.data,
        options.data_path,
        split=options.split,
        split_seed=options.split_seed,
        cache_dir=options.cache_dir,
    )
