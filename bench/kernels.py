"""`python -m bench.kernels`: what the compiler makes of every Triton kernel, without a GPU.

Compiles for a target exactly what a forward pass and a training step of the published sizes launch there, and lists
registers and stack (spills) of a thread, shared memory of a program, and matrix instructions: `wgmma` (Hopper), `mma`.
`--json` keeps it; tests compare it with the budgets in tests/kernel_budgets.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from m3oe_fast.kernels import launch

from m3oe_fast import M3oE, M3oEConfig, backends, folded
from m3oe_fast.errors import BackendError

VOCAB = (6041, 3707, 3, 22, 8, 3500, 19)
PUBLISHED = M3oEConfig(vocab_sizes=VOCAB, num_dense=1, num_domains=3, num_tasks=2, shared_experts=4)
# What padding, masks, depth and many pairs need is in here: nothing is a power of two.
ODD = dataclasses.replace(
    PUBLISHED, num_domains=20, num_tasks=5, hidden_dim=200, expert_dims=(120, 40), tower_dim=33, gate_detach=False
)
WIDE = dataclasses.replace(PUBLISHED, hidden_dim=1024, expert_dims=(512, 256), tower_dim=300)
CONFIGS = {"published": PUBLISHED, "odd": ODD, "wide": WIDE}
ROWS = 4096
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory that a program may have, by compute capability (CUDA C++ programming guide)."""
PROCESSORS = {80: 108, 89: 142, 90: 132}


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one kernel: registers and stack bytes of a thread, shared bytes of a program, matrix instructions."""

    kernel: str
    warps: int
    rows: int | None
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int


class _Target:
    """Stands in for a GPU driver where Triton asks which GPU it compiles for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launches(config: M3oEConfig, precision: str, capability: int) -> list[launch.Launch]:
    """What predictions and a training step of ROWS rows launch, the first of each kernel."""
    from m3oe_fast.kernels import ops, tuning

    model = M3oE(config, backend="reference")
    with torch.no_grad():
        weights = [w.detach() for w in folded.fold(dict(model.named_parameters()), config).flat()]
    tuning.device = lambda _: tuning.Device(PROCESSORS[capability], SHARED[capability])
    ids = torch.zeros(ROWS, len(config.vocab_sizes), dtype=torch.int64)
    inputs = (torch.zeros(ROWS, config.num_dense), ids, model.embedding.detach(), config.vocab_sizes)
    domain = torch.zeros(ROWS, dtype=torch.int64)
    pairs = (config.num_domains, config.num_tasks)
    found: list[launch.Launch] = []
    with launch.observed(found.append):
        ops.network_fwd(*inputs, domain, weights, None, None, False, precision, False)
        targets = (torch.zeros(ROWS, pairs[1]), None, torch.ones(pairs))
        detach = config.gate_detach
        ops.network_loss(*inputs, domain, *targets, weights, None, False, detach, precision, True, "dense", True)
        star = [model.star_weight.detach(), model.star_shared_weight.detach(), model.star_out_weight.detach()]
        ops.fold.star_fold(*star)
        ops.fold.star_fold_bwd(weights[0], *star)
    return list({one.kernel.__name__: one for one in reversed(found)}.values())[::-1]


def compile_for(capability: int, found: Iterable[launch.Launch]) -> list[Report]:
    """Compile every launch for a compute capability (80, 89, 90)."""
    from triton.runtime.driver import driver

    driver.set_active(_Target(capability))
    return [_compiled(one) for one in found]


def _compiled(one: launch.Launch) -> Report:
    binary = one.kernel.run(*one.arguments, grid=one.grid, warmup=True, **one.options)
    registers, stack = _resources(binary.asm["cubin"])
    return Report(
        kernel=one.kernel.__name__,
        warps=one.options["num_warps"],
        rows=one.options.get("M"),
        registers=registers,
        stack=stack,
        shared=binary.metadata.shared,
        wgmma=binary.asm["ptx"].count("wgmma.mma_async"),
        mma=binary.asm["ptx"].count("mma.sync"),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, as the assembler reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _table(reports: Iterable[Report]) -> str:
    lines = [f"{'kernel':30} warps  rows  registers  stack  shared KB  wgmma   mma"]
    for r in reports:
        sizes = f"{r.warps:5}  {r.rows or '':>4}  {r.registers:9}  {r.stack:5}  {r.shared / 1024:9.0f}"
        lines.append(f"{r.kernel:30} {sizes}  {r.wgmma:5}  {r.mma:4}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, choices=sorted(SHARED), default=90, help="compute capability x 10")
    parser.add_argument("--precision", choices=backends.PRECISIONS, default="bf16")
    parser.add_argument("--config", choices=sorted(CONFIGS), default="published", help="sizes of the network")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    options = parser.parse_args(argv)
    if not launch.installed() or launch.interpreted():
        raise BackendError("compiling the kernels needs Triton, and TRITON_INTERPRET unset")
    found = launches(CONFIGS[options.config], options.precision, options.capability)
    reports = compile_for(options.capability, found)
    print(_table(reports))
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(r) for r in reports], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    from m3oe_fast import cli

    sys.exit(cli.run(main))
