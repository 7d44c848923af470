"""The benchmarks' own tests: contenders compute the same, the gate refuses wrong ones, counts and
tables are right.
"""

from __future__ import annotations

import dataclasses
import json
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

from bench import compare, document, environment, epoch, flops, gate, report, timing, workload  # noqa: E402
from bench.compiled import CompiledContender  # noqa: E402
from bench.contender import Contender  # noqa: E402
from bench.eager import FoldedContender, OwnContender, PublishedContender  # noqa: E402
from bench.measures import MEASURES, calls  # noqa: E402
from bench.sorting import by_domain, sorted_loss, unsort  # noqa: E402
from m3oe_fast import M3oEConfig, reference  # noqa: E402

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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small only wait for each other on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
        *(f"gradient of {name}" for name in names),
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


def test_epoch_trains_through_the_trainer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5, (400, 3), generator=g).tolist()
    lines = [f"{u}\t{i}\t{20 + 10 * d}\t{(u + i + d) % 5 + 1}" for u, i, d in rows]
    (log / "log.inter").write_text("user_id:token\titem_id:token\tage:float\trating:float\n" + "\n".join(lines) + "\n")
    dataset = epoch.load(
        f"recbole:{log}",
        cache_dir=str(tmp_path / "cache"),
        domain_column="age",
        domain_bins="35",
        labels="click=rating>3",
    )
    options = epoch.TrainOptions(epochs=1, batch_size=64)
    done = epoch.fit(dataset, "reference", options)
    assert done.sample.wall >= sum(done.epoch_seconds) > 0
    assert done.result.best_epoch == 1


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
