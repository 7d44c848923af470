"""`python -m bench.stream`: a log read from disk through a window, against the same log shuffled as a whole in memory.

A log is generated (`generated.py`: 8 id fields, 1 dense, 3 domains, 2 tasks), prepared, and its training part read
twice in batches: once to check that both ways give the same rows, once for the clock. With `--train` an epoch of the
trainer is timed as well, without its validation. Every measurement runs in a fresh process, the two ways in turn, and
its peak is that of the whole process. All files lie in a temporary folder, unless `--data_path` names a prepared one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import child, command, document, epoch, gate, generated, memory
from m3oe_fast import cli
from m3oe_fast.data import DataOptions, Dataset, load_options
from m3oe_fast.data.reader import Reader
from m3oe_fast.training import TrainOptions
from m3oe_fast.training.trainer import WINDOW_ROWS

WAYS = ("windows", "memory")
PREPARE, READ, TRAIN = "prepare", "read", "train"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the two ways do not read the same rows."""
    options = _parse(argv)
    if options.only is None:
        return command.execute(options, lambda options: run(argv, options))
    return command.execute(options, run_one)


def run(argv: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Generate and prepare the log, and measure everything, each in a process of its own.

    Raises:
        GateError: the two ways do not read the same rows.
    """
    with tempfile.TemporaryDirectory() as place:
        found = []
        if options.data_path is None:
            command.say(f"generating {options.rows:,} rows")
            generated.write(Path(place) / "log", options.rows, bags=False)
            options.data_path = place
            found.append(_measure(argv, options, PREPARE))
            options.data_path = str(Path(place) / "prepared")
        tasks = [f"{what} {way}" for what in ((READ, TRAIN) if options.train else (READ,)) for way in WAYS]
        for turn in range(options.rounds):
            found += [_measure(argv, options, task) for task in tasks[:: 1 if turn % 2 else -1]]
        if len({row["checksum"] for row in found if row["what"] == READ}) > 1:
            raise gate.GateError("windows and memory do not read the same rows")
        size = os.path.getsize(Path(options.data_path) / "train.arrow")
    rows = [_summary(task, [row for row in found if row["task"] == task]) for task in dict.fromkeys([PREPARE, *tasks])]
    return _document(options, [row for row in rows if row is not None]) | {
        "train_rows": next(row["rows"] for row in found if row["what"] == READ),
        "train_bytes": size,
    }


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one thing in this process."""
    what, _, way = options.only.partition(" ")
    started = time.perf_counter()
    if what == PREPARE:
        rows = prepare(Path(options.data_path))
        taken = {"rows": rows, "rows_per_second": rows / (time.perf_counter() - started)}
    else:
        dataset = load_options(DataOptions(data=f"prepared:{options.data_path}"))
        window = options.window if way == "windows" else len(dataset.train)
        taken = (read if what == READ else train)(dataset, window, options)
    measured = {"task": options.only, "what": what, "way": way, **taken, "peak_bytes": memory.resident("VmHWM")}
    return _document(options, [measured])


def prepare(place: Path) -> int:
    """Prepare the log of `place`/log into `place`/prepared; returns its rows."""
    log = place / "log"
    wanted = DataOptions(data=f"parquet:{log}", schema=str(log / "schema.yaml"))
    dataset = load_options(wanted, out=place / "prepared")
    return sum(len(part) for part in (dataset.train, dataset.val, dataset.test))


def read(dataset: Dataset, window: int, options: argparse.Namespace) -> dict[str, Any]:
    """Two epochs of batches that nobody uses; the second is timed."""
    reader = Reader(dataset.train, options.batch_size, options.seed, window=window)
    checksum = 0
    for batch in reader.epoch(0):
        checksum += int(batch.ids.sum()) + 3 * int(batch.domain.sum()) + 7 * int(batch.label.nansum())
    started = time.perf_counter()
    rows = sum(len(batch.domain) for batch in reader.epoch(1))
    return {"rows": rows, "rows_per_second": rows / (time.perf_counter() - started), "checksum": checksum}


def train(dataset: Dataset, window: int, options: argparse.Namespace) -> dict[str, Any]:
    """An epoch of the trainer."""
    wanted = TrainOptions(epochs=1, batch_size=options.batch_size, seed=options.seed, shuffle_window=window)
    (done,) = epoch.fit(dataset, options.backend, wanted).result.history
    return {"rows": done.samples, "rows_per_second": done.samples / (done.seconds - done.validation_seconds)}


def _measure(argv: list[str], options: argparse.Namespace, task: str) -> dict[str, Any]:
    command.say(f"starting a process: {task}")
    arguments = [*argv, "--data_path", options.data_path, "--only", task]
    return child.run("bench.stream", arguments)["measurements"][0]


def _summary(task: str, rounds: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The rounds of one task as a row; None where it was not measured."""
    if not rounds:
        return None
    speeds = [row["rows_per_second"] for row in rounds]
    return rounds[0] | {
        "rows_per_second": statistics.median(speeds),
        "all_rows_per_second": speeds,
        "peak_bytes": max(row["peak_bytes"] for row in rounds),
    }


def _document(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return document.header("stream", command.settings(options)) | {"measurements": rows}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.stream", description=__doc__)
    add = parser.add_argument
    add("--rows", type=command.positive, default=20_000_000, help="of the log; eight tenths are trained on")
    add("--data_path", metavar="DIR", help="read this prepared log instead of generating one")
    add("--window", type=command.positive, default=WINDOW_ROWS, help="rows shuffled together")
    add("--batch_size", type=command.positive, default=4096)
    add("--train", action="store_true", help="also an epoch of the trainer")
    tasks = [PREPARE, *(f"{what} {way}" for what in (READ, TRAIN) for way in WAYS)]
    add("--only", choices=tasks, help="measure this in this very process; --data_path says where")
    command.add_shared(parser, rounds=3, rounds_help="processes for each measurement", backend="cpu", seed=2022)
    options = parser.parse_args(argv)
    if options.only is not None and options.data_path is None:
        parser.error("--only needs --data_path")
    return options


if __name__ == "__main__":
    cli.run(main)
