"""`python -m bench.kill`: kill -9 at random moments of a training run, resume, and compare the final weights.

One run of `python -m m3oe_fast.train` is left alone. Every other run of the same options is killed with SIGKILL after a
random time, drawn evenly from the length of the first (again if it has ended by then), and started again with
`--resume last` until it ends; a run may be killed several times. Equal are all weights, bit for bit, of
`checkpoints/best` and `checkpoints/last`, the state of the optimizers, and the rows of metrics.csv and fusion.csv less
their seconds.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import command, document
from m3oe_fast import checkpoint, cli

TIMES = ("seconds", "validation_seconds", "samples_per_second")


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if a resumed run ended otherwise."""
    options = _parse(argv)
    found: list[dict[str, Any]] = []

    def run(options: argparse.Namespace) -> dict[str, Any]:
        result = measure(options)
        found.extend(result["trials"])
        return result

    status = command.execute(options, run)
    return status or int(not all(trial["identical"] for trial in found))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run once, then kill and resume `--trials` times."""
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        whole = root / "whole"
        _finish(_start(root / "first", options, resume=False))  # which also prepares the log
        started = time.perf_counter()
        _finish(_start(whole, options, resume=False))
        length = time.perf_counter() - started
        wanted = state_of(whole)
        trials = []
        for number in range(options.trials):
            folder = root / f"trial-{number}"
            killed = [_kill(folder, options, draw.uniform(0.0, length), first=True)]
            while killed[-1]["ended_before"]:
                shutil.rmtree(folder)
                killed = [_kill(folder, options, draw.uniform(0.0, length), first=True)]
            killed += [_kill(folder, options, draw.uniform(0.0, length), first=False) for _ in range(options.kills - 1)]
            _finish(_start(folder, options, resume=True))
            different = differences(wanted, state_of(folder))
            command.say(f"trial {number + 1} of {options.trials}: killed {killed}, {different or 'identical'}")
            trials.append({"killed": killed, "identical": not different, "different": different})
    return document.header("kill", command.settings(options)) | {"run_seconds": length, "trials": trials}


def state_of(run: Path) -> dict[str, Any]:
    """What must be the same, by name."""
    state: dict[str, Any] = {}
    for name in ("best", "last"):
        content = checkpoint.read(run / "checkpoints" / name)
        state |= {f"{name} {weight}": tensor for weight, tensor in content["weights"].items()}
        trainer = content["trainer"]
        for kind in ("network_optimizer", "fusion_optimizer"):
            for place, tensors in trainer[kind]["state"].items():
                state |= {f"{name} {kind} {place} {key}": value for key, value in tensors.items()}
    for file in ("metrics.csv", "fusion.csv"):
        with (run / file).open(newline="", encoding="utf-8") as stream:
            for number, row in enumerate(csv.DictReader(stream)):
                state |= {f"{file} {number} {key}": value for key, value in row.items() if key not in TIMES}
    return state


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of what differs, at most five."""
    names = [
        name
        for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not _same(one[name], other[name])
    ]
    return names[:5]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return one == other


def _kill(folder: Path, options: argparse.Namespace, moment: float, first: bool) -> dict[str, Any]:
    """Start or resume a run and kill it after `moment` seconds, unless it has ended by then."""
    process = _start(folder, options, resume=not first)
    try:
        process.wait(timeout=moment)
        return {"after": moment, "ended_before": True}
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return {"after": moment, "ended_before": False}


def _start(folder: Path, options: argparse.Namespace, resume: bool) -> subprocess.Popen:
    call = [sys.executable, "-m", "m3oe_fast.train", "--out", str(folder), "--epochs", str(options.epochs)]
    call += ["--batch_size", str(options.batch_size), "--checkpoint_every", str(options.checkpoint_every)]
    call += ["--bilevel", options.bilevel, "--outer_every", "10", "--keep_last", "2", "--patience", "0"]
    return subprocess.Popen([*call, *(["--resume", "last"] if resume else [])], stdout=subprocess.DEVNULL)


def _finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise SystemExit(f"a training run ended with exit status {process.returncode}")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kill", description=__doc__)
    add = parser.add_argument
    add("--trials", type=command.positive, default=20)
    add("--kills", type=command.positive, default=1, help="kills of each trial")
    add("--epochs", type=command.positive, default=4)
    add("--batch_size", type=command.positive, default=4096)
    add("--checkpoint_every", type=int, default=7)
    add("--bilevel", default="alternating")
    command.add_shared(parser, rounds=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
