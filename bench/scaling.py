"""`python -m bench.scaling`: does a training step of m3oe_fast keep its speed with many domains and tasks?

The number of experts grows with both, so the work of a row does too; what counts is GFLOP/s. Work that a step does
once, whatever its batch (fold, packing, reduction of gradients, Adam), grows with the parameters and is shown apart: a
step on two rows per domain is taken for it. All sizes are timed in the same interleaved rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch

from bench import command, document, flops, gate, machine, timing, workload
from bench.eager import OwnContender
from m3oe_fast import M3oE, M3oEConfig, cli, folded

# Rows the gate looks at; enough of every domain that one far from the kinks of all ReLUs can replace the others.
GATE_ROWS, GATE_ROWS_PER_DOMAIN = 512, 8
SMALL_ROWS_PER_DOMAIN = 2


class Size(NamedTuple):
    """Numbers of domains and tasks."""

    domains: int
    tasks: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """From an option's value, "50x4" for 50 domains and 4 tasks."""
        try:
            domains, tasks = map(command.positive, text.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected DOMAINSxTASKS, for example 50x4, got {text!r}") from None
        return cls(domains, tasks)

    def config(self) -> M3oEConfig:
        """The published sizes with these numbers."""
        return dataclasses.replace(workload.PUBLISHED, num_domains=self.domains, num_tasks=self.tasks)


GRID = (*(Size(d, t) for t in (2, 4) for d in (3, 10, 50, 200)), Size(3, 8))


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a size."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure all sizes.

    Raises:
        GateError: m3oe_fast does not compute the network at one of the sizes.
    """
    named: dict[str, Callable[[], object]] = {}
    for size in options.grid:
        named |= {f"{size} {part}": call for part, call in _calls(_gated(size, options), options).items()}
    command.say(f"timing {options.rounds} rounds of {len(named)} calls")
    samples, peak = machine.under_peak(
        options.threads, lambda: timing.interleave(named, options.rounds, warmup=options.warmup)
    )
    summaries = {name: timing.summarise(taken) for name, taken in samples.items()}
    sizes = [_row(size, summaries, options.batch) for size in options.grid]
    settings = command.settings(options) | {"grid": [f"{size.domains}x{size.tasks}" for size in options.grid]}
    return document.header("scaling", settings) | {
        "config": workload.PUBLISHED.to_dict(),
        "batch": options.batch,
        "fma_peak_gflops": peak,
        "sizes": sizes,
        "ratios": ratios(sizes),
    }


def ratios(sizes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """GFLOP/s of every size over that of the fewest domains with as many tasks."""
    found = []
    for size in sizes:
        base = min((s for s in sizes if s["tasks"] == size["tasks"]), key=lambda s: s["domains"])
        if base is not size:
            found.append(
                {
                    "domains": size["domains"],
                    "tasks": size["tasks"],
                    "against": base["domains"],
                    "raw": size["gflops"] / base["gflops"],
                    "net": size["net_gflops"] / base["net_gflops"],
                }
            )
    return found


def make_batch(config: M3oEConfig, rows: int, seed: int) -> workload.Batch:
    """A batch with equal shares of all domains, as even as the number of rows allows."""
    rates = list(islice(cycle(workload.LABEL_RATES), config.num_tasks))
    batch = workload.make_batch(config, rows, seed, [1] * config.num_domains, rates)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    return batch._replace(domain=torch.arange(rows)[order] % config.num_domains)


def _gated(size: Size, options: argparse.Namespace) -> M3oE:
    """A model of this size that has passed the gate."""
    command.say(f"D = {size.domains}, T = {size.tasks}: running the float64 oracle")
    config = size.config()
    model = workload.make_model(config, options.backend, options.seed)
    rows = max(GATE_ROWS, GATE_ROWS_PER_DOMAIN * size.domains)
    batch = workload.avoid_kinks(model, make_batch(config, rows, options.seed))
    work = workload.with_batch(model, batch)
    gate.check(OwnContender(work), work, gate.make_routed_oracle(work, gradients=True), ("step",))
    return model


def _calls(model: M3oE, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A step, and what it does once whatever its batch."""
    config = model.config

    def contender(rows: int) -> tuple[OwnContender, workload.Batch]:
        work = workload.with_batch(model, make_batch(config, rows, options.seed))
        return OwnContender(work), work.batch

    own, batch = contender(options.batch)
    small, small_batch = contender(SMALL_ROWS_PER_DOMAIN * config.num_domains)
    small.train(small_batch)
    parameters = dict(small.model.named_parameters())
    star_fold = folded.star_fold
    if small.model.backend_name == "cpu":
        from m3oe_fast.ops import star_fold

    def fold() -> None:
        weights = folded.fold(parameters, config, star_fold)
        made = (weights.star_weight, weights.star_bias, weights.table)
        torch.autograd.grad(made, list(parameters.values()), [torch.ones_like(m) for m in made], allow_unused=True)

    return {
        "step": own.stepper(batch, own.adam()),
        "adam": small.adam().step,
        "fold": fold,
        # Last: it takes the gradients away that Adam needs, and leaves new ones.
        "small_step": small.stepper(small_batch, small.adam()),
    }


def _row(size: Size, summaries: dict[str, timing.Summary], rows: int) -> dict[str, Any]:
    config = size.config()
    parts = {part: summaries[f"{size} {part}"] for part in ("step", "small_step", "fold", "adam")}
    row_flops = flops.row_flops(config, "step")
    step = parts["step"].median
    net = step - parts["small_step"].median
    net_rows = rows - SMALL_ROWS_PER_DOMAIN * size.domains
    return {
        "domains": size.domains,
        "tasks": size.tasks,
        "experts": config.num_experts,
        "parameters": sum(p.numel() for p in M3oE(config, backend="reference").parameters()),
        "flops_per_row": row_flops,
        "seconds": {part: summary.quartiles() for part, summary in parts.items()},
        "rows_per_second": rows / step,
        "gflops": row_flops * rows / step / 1e9,
        "net_seconds": net,
        "net_gflops": row_flops * net_rows / net / 1e9,
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    add = parser.add_argument
    add("--grid", type=Size.parse, nargs="+", default=list(GRID), metavar="DxT", help="numbers of domains and tasks")
    add("--batch", type=command.positive, default=40960, metavar="B", help="rows of a step")
    add("--warmup", type=int, default=2, help="untimed calls of each kind")
    command.add_shared(parser, rounds=10, rounds_help="timed calls of each kind")
    options = parser.parse_args(argv)
    options.grid = list(dict.fromkeys(options.grid))
    fewest = 2 * SMALL_ROWS_PER_DOMAIN * max(size.domains for size in options.grid)
    if options.batch < fewest:
        parser.error(f"--batch must be at least {fewest}: a step on two rows per domain is taken off it")
    return options


if __name__ == "__main__":
    cli.run(main)
