"""`python -m bench.compare`: all contenders in one process, in interleaved rounds, after the
correctness gate.

Prints medians, the speed-up of m3oe_fast over each contender and every contender's share of the FMA
peak measured in the same run; `--json` keeps it all.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from bench import contenders, document, environment, flops, gate, machine, report, timing, workload
from bench.contender import Contender
from bench.eager import OwnContender
from bench.measures import MEASURES, calls
from m3oe_fast import cli


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a contender."""
    options = _parse(argv)
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


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for.

    Raises:
        GateError: a contender does not compute the network.
    """
    config = workload.PUBLISHED
    settings = {name: value for name, value in vars(options).items() if name != "json"}
    result = document.header("compare", settings) | {
        "config": config.to_dict(),
        "macs": {
            "forward_per_row": flops.forward_macs(config),
            "backward_per_row": flops.backward_macs(config),
            "fold_per_batch": flops.fold_macs(config),
        },
        "gate": [],
        "measurements": [],
    }
    for rows in options.batch:
        work = workload.make_workload(rows, config, options.backend, options.seed)
        field = [contenders.BUILDERS[key](work) for key in contenders.keys(options.compile_mode)]
        result["gate"].append(_pass_gate(field, work, options))
        for what in options.what:
            _say(f"{what}, B = {rows}: timing {options.rounds} rounds")
            result["measurements"].append(_measure(what, field, work, options))
    return result


def _pass_gate(field: list[Contender], work: workload.Workload, options: argparse.Namespace) -> dict[str, Any]:
    """The gate on one batch: of each contender the quantity closest to its allowed error."""
    rows, whats = len(work.batch.domain), tuple(options.what)
    _say(f"B = {rows}: running the float64 oracle")
    oracle = gate.make_oracle(work, gradients=bool({"train", "step"} & set(whats)))
    closest = []
    for contender in field:
        _say(f"B = {rows}: checking {contender.name}")
        worst = max(gate.check(contender, work, oracle, whats), key=lambda f: f.error / f.allowed)
        closest.append({"name": contender.name} | worst._asdict())
    return {"batch": rows, "closest": closest}


def _measure(what: str, field: list[Contender], work: workload.Workload, options: argparse.Namespace) -> dict[str, Any]:
    rows = len(work.batch.domain)
    labelled: dict[str, Any] = {}
    own = None
    for contender in field:
        for name, call in calls(what, contender, work).items():
            labelled[name] = call
            own = name if isinstance(contender, OwnContender) else own
    peaks = [machine.fma_peak(options.threads)]
    samples = timing.interleave(labelled, options.rounds, options.warmup)
    peaks.append(machine.fma_peak(options.threads))
    # The higher one: the machine was at least that fast, and no share of it is overstated.
    peak = None if None in peaks else max(peaks)

    summaries = {name: timing.summarise(taken) for name, taken in samples.items()}
    work_flops = flops.row_flops(work.config, what) * rows
    return {
        "what": what,
        "batch": rows,
        "flops_per_row": flops.row_flops(work.config, what),
        "fma_peak_gflops": peak,
        "contenders": [
            {
                "name": name,
                "own": name == own,
                "seconds": {"median": s.median, "q1": s.q1, "q3": s.q3, "min": s.least},
                "cpu_seconds": s.cpu,
                "minor_faults": s.faults,
                "rows_per_second": rows / s.median,
                "gflops": work_flops / s.median / 1e9,
                "share_of_peak": None if peak is None else work_flops / s.median / 1e9 / peak,
                "speedup_of_own": s.median / summaries[own].median,
            }
            for name, s in summaries.items()
        ],
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[4096, 40960], metavar="B", help="batch sizes")
    add("--what", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=15, help="timed calls per contender")
    add("--warmup", type=int, default=3, help="untimed calls per contender")
    add("--backend", default="auto", help="backend of m3oe_fast")
    add(
        "--compile-mode",
        nargs="*",
        choices=contenders.COMPILE_MODES,
        default=["default"],
        help="torch.compile modes, one contender each; none leaves torch.compile out",
    )
    add("--allocator", choices=environment.ALLOCATORS, default="tuned")
    add("--seed", type=int, default=0)
    add("--json", metavar="PATH", help="keep the result here")
    return parser.parse_args(argv)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
