"""`python -m bench.compare`: all contenders in one process, in interleaved rounds, after the
correctness gate.

Prints medians, the speed-up of m3oe_fast over each contender, every contender's error and its share
of the FMA peak measured in the same run; `--json` keeps it all.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import child, command, contenders, document, environment, flops, gate, machine, merge, timing, workload
from bench.contender import Contender
from bench.measures import MEASURES, calls
from m3oe_fast import cli
from m3oe_fast.backends import CPU_PRECISIONS


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a contender."""
    options = _parse(argv)
    if options.allocator == environment.BOTH:
        return command.execute(options, lambda options: run_both(argv, options))
    return command.execute(options, run)


def run_both(argv: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The whole comparison once with each allocator setting, each in a process of its own.

    Raises:
        GateError: a contender does not compute the network.
    """
    runs = {}
    for allocator in environment.ALLOCATORS:
        command.say(f"allocator {allocator}")
        runs[allocator] = child.run("bench.compare", [*argv, "--allocator", allocator])
    return merge.merge(document.header("compare", command.settings(options)), runs)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for.

    Raises:
        GateError: a contender does not compute the network.
    """
    config = workload.PUBLISHED
    result = document.header("compare", command.settings(options)) | {
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
        command.say(f"B = {rows}: running the float64 oracle")
        oracle = gate.make_oracle(work, bool(gate.TRAINING & set(options.what)), options.precision)
        for precision in options.precision:
            section = {"precision": precision, "allocator": options.allocator}
            gated, measured = _section(section, work, oracle, options)
            result["gate"].append(gated)
            result["measurements"] += measured
    return result


def _section(
    section: dict[str, Any], work: workload.Workload, oracle: gate.Oracle, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the gate found, and all measurements of one batch at one precision of m3oe_fast."""
    where = f"{section['precision']}, B = {len(work.batch.domain)}"
    field = [contenders.build(key, work, section["precision"]) for key in contenders.keys(options.compile_mode)]
    findings = {}
    for contender in field:
        command.say(f"{where}: checking {contender.name}")
        findings[contender] = gate.check(contender, work, oracle, options.what)
    measured = []
    for what in options.what:
        command.say(f"{where}, {what}: timing {options.rounds} rounds")
        measured.append(section | _measure(what, findings, work, options))
    return section | _gated(findings, len(work.batch.domain)), measured


def _gated(findings: dict[Contender, list[gate.Finding]], rows: int) -> dict[str, Any]:
    """Of each contender the quantity closest to its allowed error."""
    closest = []
    for contender, found in findings.items():
        worst = max(found, key=lambda f: f.error / f.allowed)
        closest.append({"name": contender.name} | worst._asdict())
    return {"batch": rows, "closest": closest}


def _measure(
    what: str,
    findings: dict[Contender, list[gate.Finding]],
    work: workload.Workload,
    options: argparse.Namespace,
) -> dict[str, Any]:
    rows = len(work.batch.domain)
    named, contender_of = {}, {}
    for contender in findings:
        for name, call in calls(what, contender, work).items():
            named[name], contender_of[name] = call, contender
    samples, peak = machine.under_peak(
        options.threads, lambda: timing.interleave(named, options.rounds, options.warmup)
    )
    summaries = {name: timing.summarise(taken) for name, taken in samples.items()}
    own = next(summaries[name] for name, contender in contender_of.items() if contender.own)
    work_flops = flops.row_flops(work.config, what) * rows
    return {
        "what": what,
        "batch": rows,
        "flops_per_row": flops.row_flops(work.config, what),
        "fma_peak_gflops": peak,
        "contenders": [
            {
                "name": name,
                "own": contender_of[name].own,
                "precision": contender_of[name].precision,
                "logit_error": gate.logit_error(findings[contender_of[name]], what),
                "seconds": s.quartiles(),
                "cpu_seconds": s.cpu,
                "minor_faults": s.faults,
                "rows_per_second": rows / s.median,
                "gflops": work_flops / s.median / 1e9,
                "share_of_peak": None if peak is None else work_flops / s.median / 1e9 / peak,
                "speedup_of_own": s.median / own.median,
            }
            for name, s in summaries.items()
        ],
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    add = parser.add_argument
    add("--batch", type=command.positive, nargs="+", default=[4096, 40960], metavar="B", help="batch sizes")
    add("--what", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure")
    add("--precision", nargs="+", choices=CPU_PRECISIONS, default=["fp32"], help="of m3oe_fast, a section for each")
    add("--warmup", type=int, default=3, help="untimed calls per contender")
    contenders.add_compile_mode(parser)
    command.add_shared(parser, rounds=15, allocators=(*environment.ALLOCATORS, environment.BOTH))
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
