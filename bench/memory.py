"""`python -m bench.memory`: how much memory a training step needs on top of parameters, gradients, optimizer state and
batch.

Every contender runs in a fresh process with the allocator as it is: resident memory right before its first steps on the
whole batch, and the highest during them. What it has computed must then pass the correctness gate.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import child, command, contenders, document, gate, workload
from bench.compiled import CompiledContender
from bench.contender import Contender
from m3oe_fast import cli
from m3oe_fast.errors import UserError

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARMUP_ROWS = 8
SAMPLE_SECONDS = 0.0005


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a contender."""
    options = _parse(argv)
    if not STATUS.exists():
        raise UserError(f"bench.memory reads {STATUS}, which this system does not have")
    if options.only is None:
        return command.execute(options, lambda options: run(argv, options))
    return command.execute(options, run_one)


def run(argv: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Measure every contender in a process of its own.

    Raises:
        GateError: a contender does not compute the network.
    """
    rows: list[dict[str, Any]] = []
    for key in contenders.keys(options.compile_mode):
        command.say(f"starting a process for {key}")
        rows += child.run("bench.memory", [*argv, "--only", key])["contenders"]
    own = next(row["extra_bytes"] for row in rows if row["own"])
    for row in rows:
        row["extra_of_own"] = row["extra_bytes"] / own if own else None
    return _document(options, rows)


def run_one(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender in this process.

    Raises:
        GateError: it does not compute the network.
    """
    work = workload.make_workload(options.batch, workload.PUBLISHED, options.backend, options.seed)
    contender = contenders.build(options.only, work)
    row = _measure(contender, work, options)
    command.say(f"checking {contender.name}")
    gate.check(contender, work, gate.make_oracle(work, gradients=True), ("step",))
    return _document(options, [row])


def peak_memory(call: Callable[[], object]) -> tuple[int, int, str]:
    """Resident bytes before a call, the most during it, and how that was found.

    "watermark" is the kernel's own, "sampled" a thread that looks every half millisecond, where the kernel does not
    let a process reset its watermark.
    """
    _trim()
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return *_sampled(call), "sampled"
    before = resident("VmRSS")
    call()
    return before, max(resident("VmHWM"), before), "watermark"


def _measure(contender: Contender, work: workload.Workload, options: argparse.Namespace) -> dict[str, Any]:
    adam = contender.adam()
    step = contender.stepper(work.batch, adam)
    if isinstance(contender, CompiledContender):
        # Compiled for this batch only; the compiler leaves much behind and its graphs keep nothing between calls.
        step()
    else:
        # Libraries initialise themselves, gradients appear. Rows this few leave the contender's own caches small.
        contender.train(workload.Batch(*(tensor[:WARMUP_ROWS] for tensor in work.batch)))
    adam.step()

    def steps() -> None:
        for _ in range(options.rounds):
            step()

    before, peak, how = peak_memory(steps)
    parameters = sum(p.numel() * p.element_size() for p in contender.parameters())
    return {
        "name": contender.name,
        "own": contender.own,
        "state_bytes": 4 * parameters,
        "base_bytes": before,
        "peak_bytes": peak,
        "extra_bytes": peak - before,
        "how": how,
    }


def _document(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return document.header("memory", command.settings(options)) | {
        "config": workload.PUBLISHED.to_dict(),
        "batch": options.batch,
        "contenders": rows,
    }


def _trim() -> None:
    """Give memory that is free inside the C library back to the kernel, so that using it again shows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(field: str) -> int:
    """A figure of this process in bytes: VmRSS, what is resident, or VmHWM, the most that was."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise UserError(f"{STATUS} has no {field}")
    return 1024 * int(found[1])


def _sampled(call: Callable[[], object]) -> tuple[int, int]:
    before = peak = resident("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, resident("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return before, max(peak, resident("VmRSS"))


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    add = parser.add_argument
    add("--batch", type=command.positive, default=40960, metavar="B", help="rows of a step")
    add("--only", choices=list(contenders.BUILDERS), help="measure this contender in this very process")
    contenders.add_compile_mode(parser)
    command.add_shared(parser, rounds=3, rounds_help="steps", allocator="default")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
