"""pytest options and fixtures of the pytest-benchmark suites: every test runs for every contender
and batch size.

Before its first timing each contender passes the correctness gate for what is measured; if it does
not, its benchmark fails.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import torch

from bench import contenders, environment, gate, workload
from bench.contender import Contender
from bench.measures import calls


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("m3oe_fast bench")
    group.addoption("--bench-batch", default="4096,40960", help="batch sizes, comma-separated")
    group.addoption("--bench-threads", type=int, default=2)
    group.addoption("--bench-rounds", type=int, default=15)
    group.addoption("--bench-backend", default="auto", help="backend of m3oe_fast")
    group.addoption(
        "--bench-compile-mode",
        default="default",
        help="torch.compile modes, comma-separated; may be empty",
    )
    group.addoption("--bench-allocator", choices=environment.ALLOCATORS, default="tuned")


def pytest_configure(config: pytest.Config) -> None:
    allocator = config.getoption("--bench-allocator")
    if environment.wanted(allocator, os.environ) != dict(os.environ):
        # The new process must write to the terminal, not into the files that capture put in its
        # place.
        if capture := config.pluginmanager.getplugin("capturemanager"):
            capture.stop_global_capturing()
        environment.ensure(allocator)
    torch.set_num_threads(config.getoption("--bench-threads"))


def pytest_report_header(config: pytest.Config) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in environment.record().items())
    return f"bench: {torch.get_num_threads()} threads, {settings}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    modes = [mode for mode in metafunc.config.getoption("--bench-compile-mode").split(",") if mode]
    sizes = [int(size) for size in metafunc.config.getoption("--bench-batch").split(",")]
    metafunc.parametrize("work", sizes, indirect=True, ids=lambda size: f"B{size}", scope="session")
    metafunc.parametrize("contender", contenders.keys(modes), indirect=True, scope="session")


@pytest.fixture(scope="session")
def work(request: pytest.FixtureRequest) -> workload.Workload:
    """The workload of one batch size."""
    return workload.make_workload(request.param, backend=request.config.getoption("--bench-backend"))


@pytest.fixture(scope="session")
def oracle(work: workload.Workload) -> Callable[[bool], gate.Oracle]:
    """The float64 results for this batch, made when first asked for; the argument says whether
    gradients are needed.
    """
    return functools.cache(lambda gradients: gate.make_oracle(work, gradients))


@pytest.fixture(scope="session")
def contender(request: pytest.FixtureRequest, work: workload.Workload) -> Contender:
    """One contender with the weights of the workload."""
    return contenders.BUILDERS[request.param](work)


@pytest.fixture
def measure(
    request: pytest.FixtureRequest,
    benchmark: Callable,
    work: workload.Workload,
    oracle: Callable[[bool], gate.Oracle],
    contender: Contender,
) -> Callable[[str], None]:
    """Call with the name of a measurement: passes the gate, then times it."""

    def run(what: str) -> None:
        try:
            gate.check(contender, work, oracle(what in ("train", "step")), (what,))
        except gate.GateError as refusal:
            pytest.fail(f"refused: {refusal}", pytrace=False)
        name, call = next(iter(calls(what, contender, work).items()))
        benchmark.group = f"{what}, B = {len(work.batch.domain)}"
        benchmark.name = name
        rounds = request.config.getoption("--bench-rounds")
        benchmark.pedantic(call, rounds=rounds, warmup_rounds=3, iterations=1)

    return run
