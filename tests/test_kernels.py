"""Every Triton kernel compiled for GPUs that are not here: it compiles, uses their matrix units, and keeps its budget.

Budgets are in kernel_budgets.json, what `python -m bench.kernels` reports with the Triton version named there; a kernel
that takes more registers, stack (spills) or shared memory fails until the file says so. To renew it:
`python -m tests.test_kernels`.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from m3oe_fast import kernels

BUDGETS = Path(__file__).parent / "kernel_budgets.json"
# Compute capability, precision, sizes of bench.kernels. sm_89 has less shared memory than the others.
TARGETS = [
    *((90, precision, "published") for precision in ("bf16", "bf16x3", "tf32", "fp32")),
    (80, "bf16", "published"),
    (89, "bf16", "published"),
    (90, "bf16", "odd"),
]
PRODUCTS = ("network_fwd_kernel", "network_bwd_kernel", "weight_gradient_kernel")

pytestmark = pytest.mark.skipif(
    not kernels.installed() or kernels.interpreted(), reason="needs Triton, and TRITON_INTERPRET unset"
)


def name_of(target: tuple[int, str, str]) -> str:
    return f"sm_{target[0]} {target[1]} {target[2]}"


def compile_all(target: tuple[int, str, str]) -> list[dict[str, Any]]:
    """In a process of its own: there Triton is told of a GPU that is not here."""
    capability, precision, config = target
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        options = ["--capability", str(capability), "--precision", precision, "--config", config, "--json", str(path)]
        command = [sys.executable, "-m", "bench.kernels", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=BUDGETS.parent.parent)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(path.read_text())


@pytest.fixture(scope="module")
def reports():
    """Compiled two at a time, while tests of the first already run."""
    with ThreadPoolExecutor(2) as pool:
        yield {target: pool.submit(compile_all, target) for target in TARGETS}


@pytest.mark.parametrize("target", TARGETS, ids=name_of)
def test_compiles_onto_matrix_units_within_its_budget(target, reports: dict[Any, Future]):
    from bench.kernels import SHARED

    found = {report["kernel"]: report for report in reports[target].result()}
    capability, precision, _ = target
    for report in (found[kernel] for kernel in PRODUCTS if precision != "fp32"):
        assert report["wgmma"] or report["mma"], report
        # wgmma wants 64 rows; only tiles of bf16 are that tall in the backward pass.
        assert report["wgmma"] or target != (90, "bf16", "published"), report
    assert all(report["shared"] <= SHARED[capability] for report in found.values())
    budgets = json.loads(BUDGETS.read_text())
    if importlib.metadata.version("triton") != budgets["triton"]:
        pytest.skip(f"budgets are of Triton {budgets['triton']}")
    allowed = {report["kernel"]: report for report in budgets[name_of(target)]}
    assert allowed.keys() == found.keys()
    over = [
        f"{kernel} takes {report[what]} {what}, its budget is {allowed[kernel][what]}"
        for kernel, report in found.items()
        for what in ("registers", "stack", "shared")
        if report[what] > allowed[kernel][what]
    ]
    assert not over


def renew() -> None:
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(map(name_of, TARGETS), pool.map(compile_all, TARGETS), strict=True))
    content = {"triton": importlib.metadata.version("triton"), **found}
    BUDGETS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    renew()
