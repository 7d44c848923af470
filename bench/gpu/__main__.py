"""`python -m bench.gpu`: m3oe_fast on one NVIDIA GPU against PyTorch at equal precision, gate first.

Measures the machine's ceilings, holds every contender to the float64 oracle, then times forward passes and training
steps by device events in interleaved rounds. `--json` keeps everything, rewritten after each measurement.
"""

from __future__ import annotations

import argparse
from typing import Any

from bench import command, document, flops, workload
from bench.gpu import device, feed, session, table
from bench.gpu.budget import Budget
from m3oe_fast import M3oEConfig, cli

# For `--device cpu`: Triton's interpreter is some ten thousand times slower than a GPU.
DRY = M3oEConfig(
    vocab_sizes=(5, 3),
    num_dense=1,
    num_domains=3,
    num_tasks=2,
    shared_experts=1,
    embed_dim=4,
    star_dim=16,
    hidden_dim=16,
    expert_dims=(16,),
    tower_dim=16,
)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refused a contender or m3oe_fast did not run."""
    options = _parse(argv)
    budget = Budget(options.budget_s)
    target = device.find(options.device)
    config = workload.PUBLISHED if target.type == "cuda" else DRY
    content = document.header("gpu", command.settings(options)) | _frame(config) | {"device": device.describe(target)}
    content["commit"] = _commit(content["commit"], options.commit)
    command.say("measuring the ceilings")
    content["ceilings"] = device.ceilings(target)
    run = session.Session(content, config, target, budget, options.json)
    run.save()
    mixes = ("uniform", "skewed") if options.skew else ("uniform",)
    todo = session.jobs(tuple(options.stage), mixes, tuple(options.batch), tuple(options.precision))
    run.run(todo, tuple(options.what), options.rounds, options.seed)
    print("\n".join([*table.summary(content), "", table.conditions(content)]))
    return 0 if run.succeeded else 1


def _frame(config: M3oEConfig) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "macs": {
            "forward_per_row": flops.forward_macs(config),
            "backward_per_row": flops.backward_macs(config),
            "fold_per_batch": flops.fold_macs(config),
        },
    }


def _commit(found: dict[str, Any], stated: str | None) -> dict[str, Any]:
    """The commit, as git has it or, in a copy without git, as the caller states it."""
    return found if found["hash"] or not stated else {"hash": stated, "modified": None, "stated": True}


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    add = parser.add_argument
    batches = [40960, 4096, 16384, 65536]
    add("--batch", type=command.positive, nargs="+", default=batches, metavar="B", help="batch sizes, dearest first")
    add("--precision", nargs="+", choices=session.PRECISIONS, default=list(session.PRECISIONS))
    add("--stage", nargs="+", choices=session.STAGES, default=list(session.STAGES), help="in this order")
    add("--what", nargs="+", choices=session.WHAT, default=list(session.WHAT))
    add("--skew", action="store_true", help=f"also rows per domain as {feed.MIXES['skewed']}")
    add("--rounds", type=command.positive, default=20, help="samples per contender")
    add("--budget_s", type=float, default=500.0, help="seconds after which nothing new is started")
    add("--seed", type=int, default=0)
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run on a tiny network, for tests")
    add("--commit", metavar="HASH", help="what to record where this folder is not under git")
    add("--json", metavar="PATH", help="keep the result here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
