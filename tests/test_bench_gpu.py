"""`bench.gpu` where there is no GPU: opponents compute the same, the gate, the budget and the document are right.

m3oe_fast's place is taken by eager PyTorch, but for one run through Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Last, so that an installed m3oe_fast comes before the source folder.
sys.path.append(str(ROOT))

from bench import flops, gate, report, workload  # noqa: E402
from bench.contender import named_gradients  # noqa: E402
from bench.gpu import __main__ as command  # noqa: E402
from bench.gpu import batched, clock, contenders, device, feed, graphed, session, table, verify  # noqa: E402
from bench.gpu.budget import Budget  # noqa: E402
from bench.sorting import by_domain  # noqa: E402
from m3oe_fast import M3oE, M3oEConfig, folded  # noqa: E402
from m3oe_fast.errors import UserError  # noqa: E402

CPU = torch.device("cpu")
SMALL = M3oEConfig(
    vocab_sizes=(11, 3, 7),
    num_dense=2,
    num_domains=3,
    num_tasks=2,
    shared_experts=3,
    embed_dim=5,
    star_dim=13,
    hidden_dim=17,
    expert_dims=(9, 6),
    tower_dim=8,
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


class EagerOwn(contenders.Own):
    """m3oe_fast's part in eager PyTorch, at fp32 whatever the precision it is listed with."""

    def __init__(self, work: workload.Workload, precision: str) -> None:
        contenders.DeviceContender.__init__(self)
        self.name, self.precision = f"m3oe_fast, {precision}", precision
        self.model = M3oE(work.config, backend="reference")
        self.model.load_state_dict(work.model.state_dict())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def supply() -> feed.Supply:
    return feed.make_supply(SMALL, 101, CPU, (80, 15, 5), seed=0, cache_bytes=20_000)


@pytest.fixture(scope="module")
def oracles(supply: feed.Supply) -> verify.Oracles:
    return verify.make_oracles(supply, ("bf16", "tf32", "bf16x3"))


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Own", EagerOwn)


def test_batches_share_their_counts_and_lie_in_one_buffer_each(supply: feed.Supply) -> None:
    assert len(supply.feeds) == len(supply.ordered_feeds) == 12  # twice the cache, 3,636 bytes each
    for drawn, ordered in zip(supply.feeds, supply.ordered_feeds, strict=True):
        order, counts = by_domain(drawn.batch.domain, 3)
        assert counts == supply.counts
        assert (ordered.batch.domain.diff() >= 0).all()
        for given, expected in zip(ordered.batch, drawn.batch, strict=True):
            assert torch.equal(given, expected[order])
            assert given.untyped_storage().data_ptr() == ordered.buffer.untyped_storage().data_ptr()
            assert given.storage_offset() * given.element_size() % feed.ALIGNMENT == 0
    assert supply.counts[0] > supply.counts[1] > 0
    assert not torch.equal(supply.feeds[1].batch.ids, supply.feeds[2].batch.ids)
    copy = supply.feeds[1].clone()
    copy.buffer.copy_(supply.feeds[2].buffer)
    assert all(torch.equal(a, b) for a, b in zip(copy.batch, supply.feeds[2].batch, strict=True))
    assert not torch.equal(copy.batch.ids, supply.feeds[1].batch.ids)


def test_gate_batch_is_the_first_that_is_timed(supply: feed.Supply) -> None:
    for mine, given in ((supply.drawn, supply.feeds), (supply.ordered, supply.ordered_feeds)):
        assert all(torch.equal(a, b) for a, b in zip(mine.batch, given[0].batch, strict=True))
    assert torch.equal(supply.drawn.batch.domain[supply.order], supply.ordered.batch.domain)


@pytest.mark.parametrize("fused_mix", [False, True])
def test_batched_network_is_the_folded_one(fused_mix: bool, supply: feed.Supply) -> None:
    model = M3oE(SMALL, backend="reference").double()
    model.load_state_dict(supply.ordered.model.state_dict())
    batch = supply.ordered.batch
    results = []
    for ours in (True, False):
        model.zero_grad()
        weights = folded.fold(dict(model.named_parameters()), SMALL)
        if ours:
            x = batched.embed(model, batch.ids, batch.dense.double())
            assert x.shape[1] % batched.WIDTH_MULTIPLE == 0
            prepared = batched.prepare(weights)
            assert len(batched.flat(prepared)) == 17 + 4  # one deeper layer
            prepared = batched.unflat(batched.flat(prepared))
            logits = batched.network(x, supply.counts, prepared, fused_mix)
        else:
            logits = folded.network(model.embed(batch.ids, batch.dense.double()), supply.counts, weights)
        logits.square().sum().backward()
        results.append((logits.detach(), named_gradients(model)))
    (logits, gradients), (expected, exact) = results
    assert gate.relative_error(logits, expected) < 1e-13
    assert max(gate.relative_error(gradients[name], exact[name]) for name in exact) < 1e-11


def test_batched_network_refuses_what_it_does_not_compute() -> None:
    for change in ({"gate_detach": False}, {"star_activation": "linear"}, {"shared_experts": 0}):
        with pytest.raises(ValueError, match="detached gates"):
            batched.check(dataclasses.replace(SMALL, **change))


@pytest.mark.parametrize("precision", session.PRECISIONS)
@pytest.mark.parametrize("kind", ["published", None, "compiled"])
def test_opponents_pass_the_gate(
    kind: str | None, precision: str, supply: feed.Supply, oracles: verify.Oracles
) -> None:
    if kind == "published":
        contender = contenders.Published(supply.drawn, precision)
    else:
        contender = contenders.Batched(supply, precision, kind)
    recorded = verify.record(contender, verify.check(contender, supply, oracles))
    bounds = {"bf16": (1e-4, 5e-2)}.get(precision, (0, 1e-5))
    assert bounds[0] <= recorded["logit_error"] < bounds[1]
    json.dumps(recorded, allow_nan=False)
    before = [parameter.clone() for parameter in contender.parameters()]
    contender.step(contenders.Batch(*(supply.ordered if contender.takes_ordered else supply.drawn).batch))
    assert all(torch.equal(a, b) for a, b in zip(before, contender.parameters(), strict=True))


@pytest.mark.parametrize("wrong", ["logits", "gradient", "nan", "bits"])
def test_gate_refuses(wrong: str, supply: feed.Supply, oracles: verify.Oracles) -> None:
    class Wrong(EagerOwn):
        calls = 0

        def forward(self, batch):
            self.calls += 1
            logits = super().forward(batch)
            if wrong == "bits":
                return logits + 1e-7 * self.calls
            return logits * {"logits": 1 + 1e-4, "nan": math.nan}.get(wrong, 1.0)

        def gradients(self):
            factor = 1 + 1e-3 * (wrong == "gradient")
            return {name: gradient * factor for name, gradient in super().gradients().items()}

    message = {"bits": "differs between two runs", "gradient": "gradient of"}.get(wrong, "logits from ids")
    with pytest.raises(gate.GateError, match=message):
        verify.check(Wrong(supply.drawn, "fp32"), supply, oracles)


def test_opponents_have_a_looser_gate_than_m3oe_fast(supply: feed.Supply, oracles: verify.Oracles) -> None:
    class Rough(contenders.Published):
        def forward(self, batch):
            return super().forward(batch) * (1 + 3 * oracles.drawn.units["fp32"]["logits"] + 1e-6)

    assert verify.check(Rough(supply.drawn, "fp32"), supply, oracles)
    own = type("RoughOwn", (Rough,), {"own": True})
    with pytest.raises(gate.GateError, match="logits from ids"):
        verify.check(own(supply.drawn, "fp32"), supply, oracles)


def test_clock_interleaves_and_rotates() -> None:
    seen: dict[str, list[int]] = {"a": [], "b": []}
    timed = clock.interleave({name: calls.append for name, calls in seen.items()}, 3, CPU)
    for name, calls in seen.items():
        assert calls == list(range(len(calls)))
        assert len(calls) == 2 + 3 * timed[name].burst and len(timed[name].samples) == 3
        quartiles = timed[name].quartiles()
        assert 0 < quartiles["min"] <= quartiles["q1"] <= quartiles["median"] <= quartiles["q3"]
    assert clock.burst_of(1.0) == 1 and clock.burst_of(1e-3) == 5 and clock.burst_of(0.0) == clock.LONGEST_BURST
    assert clock.Timed((2.0,), 1).quartiles() == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0}


def test_budget() -> None:
    now = [5.0]
    budget = Budget(10.0, clock=lambda: now[0])
    now[0] = 12.0
    assert budget.used() == 7.0 and budget.allows() and budget.allows(2.9) and not budget.allows(3.0)


def test_jobs_go_from_cheap_to_dear() -> None:
    todo = session.jobs(session.STAGES, ("uniform",), (8, 4), ("bf16", "fp32"))
    assert len(todo) == 12
    assert [job.stage for job in todo[::4]] == ["plain", "compiled", "max-autotune"]
    assert todo[1] == session.Job("plain", "uniform", 8, "fp32")


def test_entrants_of_every_stage(supply: feed.Supply) -> None:
    def names(stage: str, precision: str, graphs: bool = True) -> list[str]:
        return [e.name for e in session.entrants(session.Job(stage, "uniform", 8, precision), supply, graphs)]

    opponents = {"eager, published style", "eager, batched + folded", "eager, batched + folded, CUDA graph"}
    assert {*names("plain", "bf16")} == {"m3oe_fast, bf16", "m3oe_fast, bf16, CUDA graph"} | opponents
    assert {*names("plain", "fp32")} - {*names("plain", "fp32", graphs=False)} == {
        "m3oe_fast, fp32, CUDA graph",
        "m3oe_fast, bf16x3, CUDA graph",
        "eager, batched + folded, CUDA graph",
    }
    # The tables look contenders up by these names.
    listed = {f"{name}{g}" for name in table.OPPONENTS.values() for g in ("", table.GRAPH)}
    every = {name for stage in session.STAGES for name in names(stage, "tf32")}
    assert listed - every == {"eager, published style, CUDA graph"}
    assert every - listed == {"m3oe_fast, tf32", "m3oe_fast, tf32, CUDA graph"}


def test_graph_of_m3oe_fast_keeps_two_models(supply: feed.Supply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Own", EagerOwn)
    entered = {e.name: e for e in session.entrants(session.Job("plain", "uniform", 8, "bf16"), supply, True)}
    own = entered["m3oe_fast, bf16, CUDA graph"].make()
    assert isinstance(own, graphed.Graphed) and own.own and own.precision == "bf16" and own.launch == "graph"
    assert own.forward_of is not own.step_of and not own.takes_ordered
    opponent = entered["eager, batched + folded, CUDA graph"].make()
    assert opponent.forward_of is opponent.step_of and opponent.takes_ordered
    own.feed(supply.feeds[3])
    assert torch.equal(own._static.batch.ids, supply.feeds[3].batch.ids)


class FakeGraph:
    """What is captured has run once; its outputs stay as they are."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.mark.parametrize("own", [True, False])
def test_graphs_pass_the_gate(
    own: bool, supply: feed.Supply, oracles: verify.Oracles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warmed_up(call) -> None:
        for _ in range(graphed.WARM_UP_CALLS):
            call()

    monkeypatch.setattr(graphed, "_warmed_up", warmed_up)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    if own:
        contender = session._graphed(EagerOwn(supply.drawn, "fp32"), EagerOwn(supply.drawn, "fp32"), supply)
    else:
        opponent = contenders.Batched(supply, "bf16")
        contender = session._graphed(opponent, opponent, supply)
    assert verify.check(contender, supply, oracles)
    assert session._facts(contender, supply) == {"step_extra_bytes": None}
    assert contender.notes == ({"triton_launches_forward": 0, "triton_launches_step": 0} if own else {})
    for what in session.WHAT:
        call = session.call_of(what, contender, supply)
        call(3)
        given = (supply.feeds if own else supply.ordered_feeds)[3]
        assert torch.equal(contender._static.buffer, given.buffer)
    assert contender._forward[0].replays == contender._step[0].replays >= 2


def test_speedups_are_over_the_same_launch_and_the_best() -> None:
    def row(own: bool, launch: str, median: float, precision: str = "bf16") -> dict:
        return {"own": own, "launch": launch, "precision": precision, "seconds": {"median": median}}

    rows = [row(True, "eager", 4.0), row(True, "graph", 1.0), row(False, "eager", 8.0), row(False, "graph", 3.0)]
    session.add_speedups(rows, "bf16")
    assert [r["speedup_of_own"] for r in rows] == [1.0, 1.0, 2.0, 3.0]
    assert [r["speedup_of_best_own"] for r in rows] == [4.0, 1.0, 8.0, 3.0]
    session.add_speedups(rows, "fp32")
    assert all(r["speedup_of_own"] is None and r["speedup_of_best_own"] is None for r in rows)


def test_memory_and_ceilings_off_a_gpu() -> None:
    with device.PeakMemory(CPU) as memory:
        torch.empty(1000)
    assert memory.extra is None
    found = device.ceilings(CPU)
    assert set(found) == {"copy_bytes_per_second", *(f"{p}_flops_per_second" for p in session.PRECISIONS)}
    assert all(rate > 0 for rate in found.values())
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("dry")
def test_dry_run_keeps_and_prints_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "deep" / "gpu.json"
    stages = ["--stage", "plain", "compiled", "--precision", "tf32", "fp32", "--commit", "0123456789abcdef"]
    argv = ["--device", "cpu", "--batch", "32", "--rounds", "2", *stages, "--budget_s", "1e4", "--json", str(path)]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert "vs published" in printed and "vs compiled" in printed and printed.endswith("about a GPU.\n")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["kind"] == "gpu" and kept["device"]["type"] == "cpu" and "json" not in kept["settings"]
    assert len(kept["measurements"]) == 2 * 2 * 2 and kept["seconds_used"] > 0
    assert not (kept["refused"] or kept["failed"] or kept["left_out"])
    for measured in kept["measurements"]:
        assert sum(measured["rows_per_domain"]) == measured["batch"] == 32
        ceiling = kept["ceilings"]["bf16_flops_per_second"]
        for row in measured["contenders"]:
            rate = 32 * flops.row_flops(command.DRY, measured["what"]) / row["seconds"]["median"]
            assert row["share_of_bf16_ceiling"] == pytest.approx(rate / ceiling)
            assert row["logit_error"] < 1e-5 and row["speedup_of_own"] > 0
            assert set(row["notes"]) >= ({"triton_launches_step"} if row["own"] else set())
    assert {row["name"] for row in kept["gate"]} >= {"m3oe_fast, bf16x3", "torch.compile, batched + folded"}
    assert not list(path.parent.glob(".*"))
    rendered = report.render(kept)
    assert "Dry run" in rendered and "Training step, B = 32, fp32, uniform, compiled" in rendered


@pytest.mark.usefixtures("dry")
def test_refused_and_failed_contenders_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(EagerOwn):
        def forward(self, batch):
            return super().forward(batch) + 1e-3

    def explode(*_: object) -> contenders.DeviceContender:
        raise RuntimeError("no compiler found\nand much more")

    monkeypatch.setattr(session, "Own", Wrong)
    monkeypatch.setattr(session, "Published", explode)
    path = tmp_path / "gpu.json"
    only = ["--stage", "plain", "--precision", "tf32", "--what", "forward"]
    assert command.main(["--device", "cpu", "--batch", "32", "--rounds", "1", *only, "--json", str(path)]) == 1
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert "logits from ids is off by" in kept["refused"][0]["reason"]
    assert kept["failed"][0]["error"] == "RuntimeError: no compiler found" and not kept["failed"][0]["own"]
    (measured,) = kept["measurements"]
    assert [row["name"] for row in measured["contenders"]] == ["eager, batched + folded"]
    assert measured["contenders"][0]["speedup_of_own"] is None
    printed = capsys.readouterr().out
    assert "refused: m3oe_fast, tf32" in printed and "failed: eager, published style" in printed
    assert "no compiler found" in report.render(kept)


@pytest.mark.usefixtures("dry")
def test_opponents_failure_is_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "Batched", lambda *_: 1 // 0)
    only = ["--stage", "plain", "--precision", "fp32", "--what", "forward"]
    assert command.main(["--device", "cpu", "--batch", "32", "--rounds", "1", *only]) == 0


@pytest.mark.usefixtures("dry")
def test_a_used_up_budget_leaves_out_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    argv = ["--device", "cpu", "--batch", "32", "--rounds", "1", "--budget_s", "39", "--precision", "fp32"]
    assert command.main([*argv, "--what", "forward", "--json", str(path)]) == 0
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert [m["stage"] for m in kept["measurements"]] == ["plain"]
    # A compiler may need all that is left, so it is not started.
    assert [left["stage"] for left in kept["left_out"]] == ["compiled", "max-autotune"]
    assert capsys.readouterr().out.count("left out, the budget was used up: all (fp32, B = 32, uniform, ") == 2


@pytest.mark.usefixtures("dry")
def test_a_lost_device_ends_the_run_but_keeps_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(session, "Published", lambda *_: 1 // 0)
    monkeypatch.setattr(device, "synchronize", lost)
    path = tmp_path / "gpu.json"
    argv = ["--device", "cpu", "--batch", "32", "--rounds", "1", "--stage", "plain", "--json", str(path)]
    assert command.main(argv) == 1
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert "illegal memory access" in kept["device_lost"] and len(kept["left_out"]) == 2


def test_conditions_name_the_gpu() -> None:
    place = {"type": "cuda", "name": "NVIDIA X", "capability": "9.0", "multiprocessors": 132, "driver": "1.2"}
    ceilings = {"copy_bytes_per_second": 3e12} | {f"{p}_flops_per_second": 7e14 for p in session.PRECISIONS}
    text = table.conditions(
        {
            "device": place | {"cuda": "13.0", "triton": "3.6.0"},
            "versions": {"torch": "2.11.0", "m3oe_fast": "0.1.0"},
            "commit": {"hash": None, "modified": None},
            "ceilings": ceilings,
            "date": "2026-01-02T03:04:05",
        }
    )
    assert "NVIDIA X (capability 9.0, 132 multiprocessors, driver 1.2)" in text
    assert "copy 3.00 TB/s, products bf16 700, tf32 700, fp32 700 TFLOP/s; 2026-01-02." in text


def test_stated_commit_is_used_only_without_git() -> None:
    assert command._commit({"hash": None, "modified": None}, "abc")["hash"] == "abc"
    assert command._commit({"hash": "def", "modified": False}, "abc")["hash"] == "def"
    assert command._commit({"hash": None, "modified": None}, None)["hash"] is None


@needs_no_gpu
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="needs an NVIDIA GPU"):
        device.find("cuda")
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: bench.gpu needs an NVIDIA GPU")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_m3oe_fast_itself_through_the_interpreter(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    only = ["--stage", "plain", "--precision", "bf16", "--what", "forward", "--batch", "16", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--device", "cpu", *only, "--json", str(path)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(path.read_text(encoding="utf-8"))
    for measured in kept["measurements"]:
        own = measured["contenders"][0]
        assert own["name"] == "m3oe_fast, bf16" and 1e-5 < own["logit_error"] < 5e-2
        assert own["notes"]["triton_launches_step"] > own["notes"]["triton_launches_forward"] > 0
