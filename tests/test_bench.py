"""The benchmarks' own tests: contenders compute the same, the gate refuses wrong ones, counts and
tables are right.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Last, so that an installed m3oe_fast comes before the source folder.
sys.path.append(str(ROOT))

from bench import (  # noqa: E402
    bilevel,
    child,
    command,
    compare,
    contenders,
    document,
    environment,
    epoch,
    flops,
    gate,
    kill,
    latency,
    loop,
    machine,
    memory,
    merge,
    metrics,
    plot,
    report,
    scaling,
    seeds,
    timing,
    workload,
)
from bench.autocast import AutocastContender  # noqa: E402
from bench.compiled import CompiledContender  # noqa: E402
from bench.contender import Contender  # noqa: E402
from bench.eager import FoldedContender, OwnContender, PublishedContender  # noqa: E402
from bench.measures import MEASURES, calls  # noqa: E402
from bench.sorting import by_domain, sorted_loss, unsort  # noqa: E402
from m3oe_fast import M3oE, M3oEConfig, backends, reference, rounding  # noqa: E402
from m3oe_fast.config import FUSION_NAMES  # noqa: E402
from m3oe_fast.data import load  # noqa: E402
from m3oe_fast.errors import DataError, UserError  # noqa: E402

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
COMPARE = ("--backend", "reference", "--compile-mode", "--threads", "1")
EAGER = (PublishedContender, FoldedContender, OwnContender)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small() -> workload.Workload:
    work = workload.make_workload(101, SMALL, backend="reference")
    work.batch.label[::7, 1] = float("nan")
    return work


@pytest.fixture(scope="module")
def oracle(small: workload.Workload) -> gate.Oracle:
    return gate.make_oracle(small, gradients=True)


@pytest.mark.parametrize("make", EAGER)
def test_contender_passes_gate(make: type[Contender], small: workload.Workload, oracle: gate.Oracle) -> None:
    findings = gate.check(make(small), small, oracle, MEASURES)
    names = {name for name, _ in small.model.named_parameters()}
    assert {f.quantity for f in findings} == {
        "logits from ids",
        "logits from x",
        *(f"gradient of {name}" for name in (names - set(FUSION_NAMES)) | {"fusion logits"}),
    }


def test_compiled_graphs_are_whole_and_pass_gate(small: workload.Workload, oracle: gate.Oracle) -> None:
    contender = CompiledContender(small, backend="eager")
    assert gate.check(contender, small, oracle, MEASURES)
    other = workload.make_batch(SMALL, 101, seed=5)
    with pytest.raises(ValueError, match="rows per domain"):
        contender.loss(other)


@pytest.mark.parametrize("quantity", ["forward", "network", "gradient", "nan"])
def test_gate_refuses_wrong_contender(quantity: str, small: workload.Workload, oracle: gate.Oracle) -> None:
    class Wrong(FoldedContender):
        def forward(self, batch):
            logits = super().forward(batch)
            if quantity == "forward":
                logits[17, 1] += 1e-3
            return logits * float("nan") if quantity == "nan" else logits

        def network(self, x, domain):
            logits = super().network(x, domain)
            return logits.roll(1, 0) if quantity == "network" else logits

        def gradients(self):
            found = super().gradients()
            if quantity == "gradient":
                found["tower_bias"][1, 0] = 0
            return found

    where = {
        "forward": "logits from ids",
        "network": "logits from x",
        "gradient": "tower_bias",
        "nan": "logits",
    }
    with pytest.raises(gate.GateError, match=where[quantity]):
        gate.check(Wrong(small), small, oracle, MEASURES)


def test_compare_stops_at_red_gate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Wrong(FoldedContender):
        def forward(self, batch):
            return super().forward(batch) + 1

    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    monkeypatch.setattr(workload, "PUBLISHED", SMALL)
    monkeypatch.setitem(compare.contenders.BUILDERS, "folded", Wrong)
    assert compare.main([*COMPARE, "--batch", "40", "--what", "forward"]) == 1
    captured = capsys.readouterr()
    assert "refused: eager, batched + folded" in captured.err
    assert captured.out == ""


def test_compare_document_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    monkeypatch.setattr(workload, "PUBLISHED", SMALL)
    path = tmp_path / "results" / "small.json"
    rounds = ["--batch", "40", "64", "--rounds", "2", "--warmup", "1"]
    assert compare.main([*COMPARE, *rounds, "--json", str(path)]) == 0
    assert [p.name for p in path.parent.iterdir()] == ["small.json"]
    kept = json.loads(path.read_text())
    assert [(m["what"], m["batch"]) for m in kept["measurements"]] == [
        (what, batch) for batch in (40, 64) for what in MEASURES
    ]
    for measured in kept["measurements"]:
        own = [row for row in measured["contenders"] if row["own"]]
        assert [row["speedup_of_own"] for row in own] == [1.0]
        for row in measured["contenders"]:
            assert row["speedup_of_own"] == row["seconds"]["median"] / own[0]["seconds"]["median"]
    printed = capsys.readouterr().out
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert "Training step" in printed and "default Adam" in printed
    kept["measurements"][0] |= {"fma_peak_gflops": 100.0}
    kept["measurements"][0]["contenders"][0]["share_of_peak"] = 1.2
    assert report.render(kept).count("disturbed this run") == printed.count("disturbed this run") + 1


def test_published_sizes_count_as_derived_by_hand() -> None:
    config = workload.PUBLISHED
    assert config.input_dim == 113
    # Star and skip 2 x 113 x 256, experts 9 x 256 x 64, gates 2 x 256 x 4, fusion 2 x 9 x 64,
    # towers 2 x 65 x 64.
    assert flops.forward_macs(config) == 57_856 + 147_456 + 2_048 + 1_152 + 8_320 == 216_832
    # Weight gradients cost the forward pass less the fusion; input gradients leave out the detached
    # gates.
    assert flops.backward_macs(config) == 215_680 + 158_080 + 57_856
    attached = dataclasses.replace(config, gate_detach=False)
    assert flops.backward_macs(attached) - flops.backward_macs(config) == 2_048
    assert flops.fold_macs(config) == 3 * 113 * 512 * 257
    assert flops.row_flops(config, "forward") == 2 * 216_832
    assert flops.row_flops(config, "step") == 2 * (216_832 + 431_616)


def test_batch_has_the_published_proportions() -> None:
    batch = workload.make_batch(workload.PUBLISHED, 20_000)
    shares = torch.bincount(batch.domain).double() / 20_000
    expected = torch.tensor(workload.DOMAIN_ROWS).double() / sum(workload.DOMAIN_ROWS)
    assert torch.allclose(shares, expected, atol=0.015)
    assert torch.allclose(batch.label.mean(0), torch.tensor(workload.LABEL_RATES), atol=0.015)
    assert (batch.ids.amax(0) < torch.tensor(workload.PUBLISHED.vocab_sizes)).all()


@pytest.mark.parametrize("num_domains", [1, 3, 200])
def test_sorting_and_loss(num_domains: int) -> None:
    g = torch.Generator().manual_seed(0)
    domain = torch.randint(0, num_domains, (300,), generator=g)
    logits, label = (
        torch.randn(300, 2, generator=g),
        torch.randint(0, 2, (300, 2), generator=g).float(),
    )
    label[domain == 0, 1] = float("nan")
    order, counts = by_domain(domain, num_domains)
    assert (domain[order].diff() >= 0).all() and sum(counts) == 300 and len(counts) == num_domains
    assert torch.equal(unsort(logits[order], order), logits)
    expected = reference.pair_losses(logits, domain, label, num_domains).sum()
    torch.testing.assert_close(sorted_loss(logits[order], label[order], counts), expected)


def step_all(work: workload.Workload) -> list[list[torch.Tensor]]:
    moved = []
    for make in EAGER:
        contender = make(work)
        for call in calls("step", contender, work).values():
            call()
        moved.append([p.detach().clone() for p in contender.parameters()])
    return moved


def test_timed_steps_leave_weights_alone(small: workload.Workload) -> None:
    before = [p.detach() for p in small.model.parameters()]
    for after in step_all(small)[1:]:
        assert all(map(torch.equal, before, after))


def test_steps_of_all_contenders_lower_the_loss(small: workload.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.contender.LEARNING_RATE", 1e-3)
    for make in EAGER:
        contender = make(small)
        before = contender.loss(small.batch).item()
        for call in calls("step", contender, small).values():
            call()
        assert contender.loss(small.batch).item() < before


def test_no_relu_of_the_batch_is_near_its_kink(small: workload.Workload) -> None:
    raw = workload.make_batch(SMALL, 2000)
    assert (workload._kink_distance(small.model, raw) < workload.KINK_MARGIN).any()
    wide = workload.avoid_kinks(small.model, raw)
    assert (workload._kink_distance(small.model, wide) >= workload.KINK_MARGIN).all()
    assert torch.equal(wide.domain, raw.domain) and torch.equal(wide.label, raw.label)


def test_interleave_rotates_and_counts() -> None:
    seen: list[str] = []
    named = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples = timing.interleave(named, rounds=3, warmup=1)
    assert seen == list("abc" + "abc" + "bca" + "cab")
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_summary_of_known_samples() -> None:
    taken = [timing.Sample(wall, 2 * wall, int(wall)) for wall in (5.0, 1.0, 3.0, 2.0, 4.0)]
    assert timing.summarise(taken) == timing.Summary(median=3, q1=2, q3=4, least=1, cpu=6, faults=3)
    assert timing.summarise(taken[:1]).q1 == 5


def test_environment() -> None:
    tuned = environment.wanted("tuned", {"HOME": "/x", "MALLOC_TRIM_THRESHOLD_": "7"})
    assert tuned["MALLOC_TRIM_THRESHOLD_"] == "7" and tuned["OMP_WAIT_POLICY"] == "PASSIVE"
    assert int(tuned["MALLOC_MMAP_THRESHOLD_"]) >= 1 << 32
    assert environment.wanted("tuned", tuned) == tuned
    assert environment.wanted("default", tuned) == {"HOME": "/x", "OMP_WAIT_POLICY": "PASSIVE"}


def test_document_has_no_names_of_people_or_hosts() -> None:
    header = document.header("compare", {})
    assert header["machine"]["cores"] >= 1 and header["versions"]["torch"] == torch.__version__
    text = json.dumps(header)
    assert str(ROOT) not in text and os.uname().nodename not in text


def test_the_readme_shows_the_kept_results() -> None:
    kept = json.loads((ROOT / "bench" / "results" / "compare.json").read_text(encoding="utf-8"))
    assert report.summary(kept) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_epoch_report_renders_undefined_auc() -> None:
    def row(backend: str, seconds: float) -> dict:
        quartiles = {"median": seconds, "q1": seconds, "q3": seconds, "min": seconds}
        accuracy = {"epochs": 5, "best_epoch": 4, "test_auc": {"mean": 0.75, "a/click": None}}
        times = {"fit_seconds": quartiles, "epoch_seconds": quartiles, "cpu_seconds": seconds}
        return {"backend": backend, "accuracy": accuracy, **times}

    settings = {"split": "random", "threads": 2, "rounds": 5, "allocator": "tuned"}
    text = report.render(
        document.header("epoch", settings)
        | {
            "data": "movielens-100k",
            "rows": {"train": 80_000},
            "own": "cpu",
            "backends": [row("reference", 4.0), row("cpu", 1.0)],
            "speedup": {"fit": 4.0, "epoch": 4.0},
            "auc_difference": -0.00012,
        }
    )
    assert "4.00x" in text and "-0.00012" in text and "0.75000" in text
    assert "| a/click  |         - |   - |" in text


def test_epoch_and_seeds_train_through_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.mkdir()
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5, (400, 3), generator=g).tolist()
    lines = [f"{u}\t{i}\t{20 + 10 * d}\t{(u + i + d) % 5 + 1}" for u, i, d in rows]
    (log / "log.inter").write_text("user_id:token\titem_id:token\tage:float\trating:float\n" + "\n".join(lines) + "\n")
    dataset = load(
        f"recbole:{log}",
        cache_dir=str(tmp_path / "cache"),
        domain_column="age",
        domain_bins="35",
        labels="click=rating>3",
    )
    options = epoch.TrainOptions(epochs=1, batch_size=64)
    done = epoch.fit(dataset, "reference", options)
    assert done.sample.wall >= sum(done.epoch_seconds) > 0
    assert done.result.best_epoch == 1 and done.computes == "fp32"

    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    monkeypatch.setattr(command, "load_data", lambda options: dataset)
    path = tmp_path / "seeds.json"
    short = ["--precision", "fp32", "--seeds", "1", "2", "--epochs", "1", "--batch_size", "64"]
    assert seeds.main([*short, "--backend", "reference", "--threads", "1", "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["precisions"]
    assert [run["seed"] for run in row["runs"]] == [1, 2] and row["within_spread"] and row["difference"] == 0
    assert "mean test AUC" in capsys.readouterr().out

    path = tmp_path / "bilevel.json"
    short = [
        "--modes",
        "off",
        "unrolled",
        "--seeds",
        "1",
        "2",
        "--epochs",
        "1",
        "--batch_size",
        "64",
        "--outer_every",
        "2",
    ]
    assert bilevel.main([*short, "--backend", "reference", "--threads", "1", "--json", str(path)]) == 0
    fixed, moved = json.loads(path.read_text())["modes"]
    assert fixed["difference"] == fixed["better_seeds"] == 0 and fixed["fusion"] != moved["fusion"]
    assert "| unrolled |" in capsys.readouterr().out


class RoundedContender(FoldedContender):
    """m3oe_fast as it would be at a reduced precision: folded, every product with rounded operands."""

    own = True

    def __init__(self, work: workload.Workload, precision: str, noise: float = 0.0) -> None:
        super().__init__(work)
        self.precision, self.noise = precision, noise
        self.name = f"m3oe_fast, {precision}"

    def _logits(self, x: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        parameters = dict(self.model.named_parameters())
        logits = reference.forward(parameters, self.config, x, domain, rounding.matmul(self.precision))
        return logits * (1 + self.noise)

    def forward(self, batch):
        return self._logits(self.model.embed(batch.ids, batch.dense), batch.domain)

    def network(self, x, domain):
        return self._logits(x, domain)

    def loss(self, batch):
        return reference.pair_losses(self.forward(batch), batch.domain, batch.label, self.config.num_domains).sum()


@pytest.fixture(scope="module")
def reduced(small: workload.Workload) -> gate.Oracle:
    return gate.make_oracle(small, gradients=True, precisions=("bf16x3", "bf16"))


def test_products_are_rounded_as_named() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 64, generator=g), torch.randn(64, 30, generator=g)
    exact = a.double() @ b.double()
    errors = {p: gate.relative_error(rounding.matmul(p)(a, b), exact) for p in rounding.PRECISIONS}
    assert errors["fp32"] < 1e-6 < errors["bf16x3"] < 1e-5 < 1e-4 < errors["tf32"] < 1e-3 < errors["bf16"] < 5e-3
    a.requires_grad_()
    b.requires_grad_()
    (rounding.matmul("bf16")(a, b) * exact.float()).sum().backward()
    assert torch.equal(a.grad, exact.bfloat16().float() @ b.detach().bfloat16().float().mT)


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
def test_gate_judges_by_precision(precision: str, small: workload.Workload, reduced: gate.Oracle) -> None:
    findings = gate.check(RoundedContender(small, precision), small, reduced, MEASURES)
    assert gate.logit_error(findings, "network") == gate.logit_error(findings, "step") > 1e-6
    with pytest.raises(gate.GateError, match="logits"):
        gate.check(RoundedContender(small, precision, noise=0.05), small, reduced, MEASURES)
    if precision == "bf16":
        with pytest.raises(gate.GateError, match="logits"):
            # Under the name of a better precision.
            contender = RoundedContender(small, precision)
            contender.precision, contender.forward = "bf16x3", RoundedContender(small, precision).forward
            gate.check(contender, small, reduced, MEASURES)


def test_opponents_in_reduced_precision_are_measured_not_refused(
    small: workload.Workload, reduced: gate.Oracle
) -> None:
    class Far(FoldedContender):
        def forward(self, batch):
            return super().forward(batch) * 1.5

    class Broken(FoldedContender):
        def forward(self, batch):
            return super().forward(batch) * float("nan")

    findings = gate.check(AutocastContender(Far(small)), small, reduced, MEASURES)
    assert gate.logit_error(findings, "forward") > 0.4
    assert 1e-4 < gate.logit_error(findings, "network") < 2e-2
    with pytest.raises(gate.GateError, match="logits from ids"):
        gate.check(AutocastContender(Broken(small)), small, reduced, ("forward",))


def test_compiled_under_autocast(small: workload.Workload, reduced: gate.Oracle) -> None:
    contender = AutocastContender(CompiledContender(small, backend="eager"))
    findings = gate.check(contender, small, reduced, ("forward", "predict", "step"))
    assert 1e-4 < gate.logit_error(findings, "forward") < 2e-2
    assert contender.name == "torch.compile, batched + folded, bf16 autocast"


def test_contenders_of_each_precision(small: workload.Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(contenders.BUILDERS, contenders.OWN, RoundedContender)

    def field(precision: str) -> list[tuple[str, str]]:
        made = [contenders.build(key, small, precision) for key in contenders.keys([])]
        return [(contender.name, contender.precision) for contender in made]

    assert field("bf16x3")[:2] == [("eager, published style", "fp32"), ("eager, batched + folded", "fp32")]
    assert field("bf16") == [
        ("eager, published style, fp32", "fp32"),
        ("eager, batched + folded, bf16 autocast", "bf16"),
        ("m3oe_fast, bf16", "bf16"),
    ]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in this process, on a small network, with m3oe_fast's rounding written in eager PyTorch."""

    def own(work: workload.Workload, precision: str = "fp32") -> Contender:
        return OwnContender(work) if precision == "fp32" else RoundedContender(work, precision)

    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    monkeypatch.setattr(workload, "PUBLISHED", SMALL)
    monkeypatch.setitem(contenders.BUILDERS, contenders.OWN, own)
    monkeypatch.setattr(machine, "PEAK_BURSTS", 1)


@pytest.mark.usefixtures("tiny")
def test_compare_sections_by_precision_and_both_allocators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(module: str, arguments: list[str]) -> dict:
        assert module == "bench.compare"
        return compare.run(compare._parse(arguments))

    monkeypatch.setattr(child, "run", in_this_process)
    path = tmp_path / "c.json"
    sections = ["--precision", "fp32", "bf16x3", "bf16", "--what", "forward", "step", "--allocator", "both"]
    rounds = ["--batch", "128", "--rounds", "2", "--warmup", "1", "--json", str(path)]
    assert compare.main([*COMPARE, *sections, *rounds]) == 0
    kept = json.loads(path.read_text())
    assert {(m["precision"], m["allocator"]) for m in kept["measurements"]} == {
        (precision, allocator) for precision in backends.CPU_PRECISIONS for allocator in environment.ALLOCATORS
    }
    assert len(kept["measurements"]) == 2 * len(kept["merged"]) == 12
    assert set(kept["environment"]) == set(environment.ALLOCATORS)
    errors = {row["name"]: row["logit_error"] for m in kept["merged"] for row in m["contenders"]}
    assert errors["m3oe_fast, bf16"] > 1e-4 > 1e-5 > errors["m3oe_fast, bf16x3"] > errors["m3oe_fast, reference"]
    printed = capsys.readouterr().out
    assert "bf16: Training step" in printed and "error of logits" in printed and "| allocator |" in printed
    assert report.main([str(path), "--summary"]) == 0
    assert capsys.readouterr().out.count("vs eager, published style") == 3


def test_merge_takes_the_better_run_of_each() -> None:
    def run(allocator: str, *medians: float) -> dict:
        rows = [
            {"name": name, "own": name == "own", "seconds": {"median": median}, "gflops": 10 / median}
            for name, median in zip(("eager", "own"), medians, strict=True)
        ]
        peak = 100.0 if allocator == "tuned" else 80.0
        section = {"precision": "fp32", "what": "step", "batch": 4, "allocator": allocator}
        measured = section | {"fma_peak_gflops": peak, "contenders": rows}
        return {"environment": {}, "config": {}, "macs": {}, "gate": [], "measurements": [measured]}

    runs = {"tuned": run("tuned", 8.0, 2.0), "default": run("default", 6.0, 3.0)}
    (merged,) = merge.merge({}, runs)["merged"]
    assert [(row["allocator"], row["speedup_of_own"]) for row in merged["contenders"]] == [
        ("default", 3.0),
        ("tuned", 1.0),
    ]
    assert merged["contenders"][1]["share_of_peak"] == 5 / 100
    runs["default"]["measurements"][0]["batch"] = 5
    with pytest.raises(ValueError, match="cannot merge"):
        merge.merge({}, runs)


@pytest.mark.usefixtures("tiny")
def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.json"
    small_run = ["--batch", "1", "33", "--rounds", "2", "--calls", "3", "--json", str(path)]
    assert latency.main([*COMPARE, *small_run]) == 0
    kept = json.loads(path.read_text())
    assert [(m["batch"], m["calls"]) for m in kept["measurements"]] == [(1, 6), (33, 6)]
    for measured in kept["measurements"]:
        own = next(row for row in measured["contenders"] if row["own"])
        for row in measured["contenders"]:
            assert 0 < row["seconds"]["median"] <= row["seconds"]["p99"]
        ratio = measured["contenders"][0]["seconds"]["median"] / own["seconds"]["median"]
        assert measured["contenders"][0]["speedup_of_own"] == ratio
    assert "p99 ms" in capsys.readouterr().out
    assert latency.percentile([float(n) for n in range(101)], 99) == 99
    assert latency.percentile([3.0], 99) == 3

    class Wrong(FoldedContender):
        def predict(self, batch):
            return super().forward(batch)

    monkeypatch.setitem(contenders.BUILDERS, "folded", Wrong)
    assert latency.main([*COMPARE, *small_run]) == 1
    captured = capsys.readouterr()
    assert "probabilities" in captured.err and captured.out == ""


@pytest.mark.usefixtures("tiny")
def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.json"
    small_run = ["--grid", "5x2", "2x2", "3x1", "--batch", "300", "--rounds", "2", "--warmup", "1"]
    assert scaling.main(["--backend", "reference", "--threads", "1", *small_run, "--json", str(path)]) == 0
    kept = json.loads(path.read_text())
    assert [(s["domains"], s["tasks"], s["experts"]) for s in kept["sizes"]] == [(5, 2, 10), (2, 2, 7), (3, 1, 7)]
    assert [(r["domains"], r["against"]) for r in kept["ratios"]] == [(5, 2)]
    five, two, _ = kept["sizes"]
    assert kept["ratios"][0]["raw"] == five["gflops"] / two["gflops"]
    # Three more experts: one layer or two, their coefficients; forward, weight gradients, input gradients.
    expert = 17 * 9 + 9 * 6
    assert five["flops_per_row"] - two["flops_per_row"] == 2 * 3 * (3 * expert + 3 * 2 * 6)
    assert "2 rows per domain" in capsys.readouterr().out
    batch = scaling.make_batch(scaling.Size(7, 3).config(), 21, seed=0)
    assert torch.bincount(batch.domain).tolist() == [3] * 7 and batch.label.shape == (21, 3)


def test_routed_oracle_is_the_oracle(small: workload.Workload, oracle: gate.Oracle) -> None:
    routed = gate.make_routed_oracle(small, gradients=True)
    assert gate.relative_error(routed.logits, oracle.logits) < 1e-12
    for name, exact in oracle.gradients.items():
        assert gate.relative_error(routed.gradients[name], exact) < 1e-9, name


@pytest.mark.usefixtures("tiny")
def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def in_this_process(module: str, arguments: list[str]) -> dict:
        return memory.run_one(memory._parse(arguments))

    monkeypatch.setattr(child, "run", in_this_process)
    path = tmp_path / "m.json"
    assert memory.main([*COMPARE, "--batch", "64", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["contenders"]
    assert [row["own"] for row in rows] == [False, False, True]
    parameters = sum(p.numel() for p in M3oE(SMALL, backend="reference").parameters())
    for row in rows:
        assert row["state_bytes"] == 16 * parameters
        assert row["extra_bytes"] == row["peak_bytes"] - row["base_bytes"] >= 0
    assert "extra MiB" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["watermark", "sampled"])
def test_peak_memory_sees_what_is_freed_again(how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if how == "sampled" or not os.access(memory.CLEAR_REFS, os.W_OK):
        monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
        how = "sampled"

    def call() -> None:
        block = torch.ones(1 << 24)
        time.sleep(0.05)
        del block

    before, peak, found = memory.peak_memory(call)
    assert found == how and (1 << 26) <= peak - before + (1 << 22) < (1 << 27)


def test_child_tells_what_went_wrong() -> None:
    with pytest.raises(UserError, match="exit status 2"):
        child.run("bench.compare", ["--batch", "0"])


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (compare.main, ["--batch", "0"], "at least 1"),
        (compare.main, ["--precision", "fp8"], "invalid choice"),
        (latency.main, ["--calls", "none"], "positive"),
        (latency.main, ["--allocator", "both"], "invalid choice"),
        (scaling.main, ["--grid", "3"], "DOMAINSxTASKS"),
        (scaling.main, ["--grid", "0x2"], "at least 1"),
        (scaling.main, ["--grid", "50x2", "--batch", "100"], "at least 200"),
        (memory.main, ["--rounds", "-1"], "at least 1"),
        (seeds.main, ["--precision", "bf16"], "must have fp32"),
        (seeds.main, ["--seeds", "1", "1"], "all different"),
        (seeds.main, ["--seeds", "1"], "two or more"),
        (epoch.main, ["--opponent", "cpu"], "must differ"),
        (bilevel.main, ["--modes", "joint"], "have off"),
        (bilevel.main, ["--modes", "off", "off"], "all different"),
        (bilevel.main, ["--seeds", "1"], "two or more"),
    ],
)
def test_wrong_options(main, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_loop_times_both_loops_and_says_where_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    path = tmp_path / "loop.json"
    sizes = ["--rows", "600", "--batch_size", "200", "--rounds", "1", "--workers", "0", "--precision", "fp32"]
    assert loop.main([*sizes, "--backend", "reference", "--threads", "1", "--json", str(path)]) == 0
    eager, own = json.loads(path.read_text())["contenders"]
    assert (eager["own"], own["own"]) == (False, True)
    assert eager["speedup"] == 1.0
    assert 0 < own["profile"]["outside_kernels"] < 1
    out = capsys.readouterr().out
    assert "An epoch of 480 training rows" in out
    assert "all outside the kernels" in out


def test_loop_refuses_networks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.PublishedM3oE, "forward", lambda self, ids, dense, domain: torch.zeros(len(domain), 2))
    with pytest.raises(gate.GateError, match="the networks differ"):
        loop._check_networks(loop._parse(["--backend", "reference"]))


def test_metrics_agree_with_lists_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "ensure", lambda allocator: None)
    path = tmp_path / "metrics.json"
    short = ["--rows", "3000", "--users", "40", "--rounds", "1", "--json", str(path)]
    assert metrics.main(short) == 0
    assert [row["name"] for row in json.loads(path.read_text())["contenders"]] == ["lists", "m3oe_fast"]
    assert "3,000 scored rows of 40 users" in capsys.readouterr().out
    right = metrics.listed(metrics.make_rows(3000, 40, 0))
    monkeypatch.setattr(metrics, "listed", lambda columns: right | {"gauc": {"0/click": 0.9}})
    assert metrics.main(short) == 1
    assert "refused: gauc of 0/click" in capsys.readouterr().err


def test_kill_sees_a_single_bit() -> None:
    one = {"last embedding": torch.ones(3), "metrics.csv 0 train_loss": "0.5"}
    other = {"last embedding": torch.tensor([1.0, 1.0, 1.0000001]), "metrics.csv 0 train_loss": "0.5"}
    assert kill.differences(one, one) == []
    assert kill.differences(one, other) == ["last embedding"]
    assert kill.differences(one, {"last embedding": torch.ones(3)}) == ["metrics.csv 0 train_loss"]


def test_seeds_against_the_spread_of_fp32() -> None:
    def runs(*aucs: float | None) -> list[dict]:
        return [{"seed": n, "computes": "fp32", "test_auc": auc} for n, auc in enumerate(aucs)]

    rows = seeds.compared({"fp32": runs(0.78, 0.80), "bf16": runs(0.79, 0.80), "bf16x3": runs(0.82, 0.83)})
    assert [row["within_spread"] for row in rows] == [True, True, False]
    assert rows[1]["difference"] == pytest.approx(0.005) and rows[0]["std"] == pytest.approx(0.02 / 2**0.5)
    with pytest.raises(DataError, match="undefined"):
        seeds.compared({"fp32": runs(0.78, None)})


def test_bilevel_against_fixed_weights() -> None:
    def runs(*aucs: float | None) -> list[dict]:
        fusion = {"beta_task": 0.5, "alpha_task": 0.25}
        return [{"test_auc": auc, "fit_seconds": 3.0, "epoch_seconds": [1.0, 2.0], "fusion": fusion} for auc in aucs]

    fixed, moved = bilevel.compared({"off": runs(0.78, 0.80), "unrolled": runs(0.79, 0.80)})
    assert fixed["difference"] == 0 and moved["difference"] == pytest.approx(0.005) and moved["better_seeds"] == 1
    assert moved["epoch_seconds"] == 1.5 and moved["fusion"] == {"alpha_task": 0.25, "beta_task": 0.5}
    with pytest.raises(DataError, match="undefined"):
        bilevel.compared({"off": runs(0.78, 0.80), "joint": runs(0.78, None)})


def test_report_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content, message in (("{", "not JSON"), ("[]", "no result"), ('{"kind": "other"}', "'other'")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            report.main([str(path)])
    with pytest.raises(DataError, match=r"of bench\.epoch"):
        report.summary({"kind": "epoch"})


def test_figure_of_the_kept_results(tmp_path: Path) -> None:
    kept = str(ROOT / "bench" / "results" / "compare.json")
    document = report.read(kept)
    shown = plot.bars([document], "forward", 40960)
    kept_precisions = document["settings"]["precision"]
    assert [precision for precision, _, _ in shown] == [p for p in kept_precisions for _ in range(4)]
    with pytest.raises(DataError, match="no measurement"):
        plot.bars([document], "forward", 7)
    with pytest.raises(DataError, match=r"of bench\.epoch"):
        plot.bars([{"kind": "epoch"}], "forward", 7)
    pytest.importorskip("matplotlib")
    assert plot.main([kept, "--out", str(tmp_path / "f" / "a.png")]) == 0
    assert (tmp_path / "f" / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="foo"):
        plot.main([kept, "--out", str(tmp_path / "a.foo")])


def test_pytest_suite_collects_and_runs(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "bench"),
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "network or step",
    ]
    options = [
        "--bench-batch=40",
        "--bench-rounds=1",
        "--bench-backend=reference",
        "--bench-compile-mode=",
    ]
    done = subprocess.run(
        [
            *command,
            *options,
            "--bench-threads=1",
            "--benchmark-only",
            f"--benchmark-json={tmp_path / 'b.json'}",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment.wanted("tuned", os.environ),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "b.json").read_text())
    assert {(b["group"], b["name"]) for b in kept["benchmarks"]} == {
        (f"{what}, B = 40", name)
        for what in ("network", "step")
        for name in ("eager, published style", "eager, batched + folded", "m3oe_fast, reference")
    }
