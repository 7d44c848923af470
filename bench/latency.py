"""`python -m bench.latency`: how long one call of `predict` takes on small batches, after the correctness gate.

Probabilities from ids without gradients, everything between arguments and result included. Rounds are interleaved,
each a burst of calls that are timed one by one: medians, and the 99th percentile that a server's users notice.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from bench import command, contenders, document, gate, timing, workload
from bench.contender import Contender
from bench.measures import calls
from m3oe_fast import cli

MEASURES = ("predict", "network")


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a contender."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all batch sizes.

    Raises:
        GateError: a contender does not compute the network.
    """
    result = document.header("latency", command.settings(options))
    result |= {"config": workload.PUBLISHED.to_dict(), "measurements": []}
    for rows in options.batch:
        work = workload.make_workload(rows, workload.PUBLISHED, options.backend, options.seed)
        oracle = gate.make_oracle(work, gradients=False)
        field = [contenders.build(key, work) for key in contenders.keys(options.compile_mode)]
        errors = {}
        for contender in field:
            command.say(f"B = {rows}: checking {contender.name}")
            errors[contender] = _error(gate.check(contender, work, oracle, MEASURES))
        command.say(f"B = {rows}: timing {options.rounds} rounds of {options.calls} calls")
        result["measurements"].append(_measure(errors, work, options))
    return result


def percentile(values: list[float], percent: int) -> float:
    """The value that `percent` of 100 stay below."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else values[0]


def _error(findings: list[gate.Finding]) -> float:
    return next(finding.error for finding in findings if finding.quantity == "probabilities")


def _measure(errors: dict[Contender, float], work: workload.Workload, options: argparse.Namespace) -> dict[str, Any]:
    named = {name: call for contender in errors for name, call in calls("predict", contender, work).items()}
    own = next(contender for contender in errors if contender.own)
    # What is left of m3oe_fast without embedding, fold and sigmoid: the op from x, its argument checks included.
    part = f"{own.name}: the op alone, from x"
    named[part] = calls("network", own, work)[own.name]
    # One round ahead of the timed ones pays for what a first call does.
    samples = timing.interleave(named, options.rounds, warmup=options.calls, burst=options.calls)
    rows = {name: _row(name, taken) for name, taken in samples.items()}
    for contender, error in errors.items():
        seconds, of_own = rows[contender.name]["seconds"], rows[own.name]["seconds"]
        rows[contender.name] |= {"own": contender.own, "error": error}
        if not contender.own:
            rows[contender.name] |= {
                "speedup_of_own": seconds["median"] / of_own["median"],
                "p99_speedup_of_own": seconds["p99"] / of_own["p99"],
            }
    return {
        "what": "predict",
        "batch": len(work.batch.domain),
        "calls": options.rounds * options.calls,
        "op_share_of_own": rows[part]["seconds"]["median"] / rows[own.name]["seconds"]["median"],
        "contenders": list(rows.values()),
    }


def _row(name: str, taken: list[timing.Sample]) -> dict[str, Any]:
    summary = timing.summarise(taken)
    seconds = summary.quartiles() | {"p99": percentile([sample.wall for sample in taken], 99)}
    return {"name": name, "own": False, "seconds": seconds, "cpu_seconds": summary.cpu}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    add = parser.add_argument
    add("--batch", type=command.positive, nargs="+", default=[1, 64, 512], metavar="B", help="batch sizes")
    add("--calls", type=command.positive, default=20, help="calls in a row, per contender and round")
    contenders.add_compile_mode(parser)
    command.add_shared(parser, rounds=50, rounds_help="timed bursts of calls per contender")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
