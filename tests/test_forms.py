"""Forms single, mtl and mdl: members trained as by hand, joined, resumed, saved and served as one model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import m3oe_fast
from m3oe_fast.data.restrict import labelled_rows, restrict
from m3oe_fast.errors import BackendError, CheckpointError, ConfigError, DataError
from m3oe_fast.models import MODELS
from m3oe_fast.models.family import Family, Member, take
from m3oe_fast.training import Trainer, TrainOptions, forms, trainer
from m3oe_fast.training.console import Display
from tests.test_seesaw import DOMAINS, SCHEMA, TASKS, make_dataset

OPTIONS = TrainOptions(epochs=2, batch_size=64, lr=1e-2, outer_every=2, patience=0)
SIZES = {"embed_dim": 4, "expert_dims": (8, 4), "tower_dim": 4}

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(schema, name="mmoe", backend="reference"):
    config = MODELS[name].config_type(
        schema.vocab_sizes,
        len(schema.dense),
        len(schema.domains),
        len(schema.tasks),
        bag_vocab_sizes=schema.bag_vocab_sizes,
        bag_pooling=schema.bag_pooling,
        **SIZES,
    )
    return MODELS[name](config, backend=backend)


def fit(form, dataset, out, name="mmoe", options=OPTIONS, tell=lambda text: None, display=Display):
    return forms.fit(form, dataset, lambda schema: make_model(schema, name), options, Path(out), display, tell)


# Members and their views ----------------------------------------------------------------------------------------------


def test_members_of_each_form():
    def shape(form):
        return [(part.domains, part.tasks) for part in forms.parts_of(form, SCHEMA)]

    assert shape("mtl") == [((0,), (0, 1)), ((1,), (0, 1)), ((2,), (0, 1))]
    assert shape("mdl") == [((0, 1, 2), (0,)), ((0, 1, 2), (1,))]
    assert shape("single") == [((d,), (t,)) for d in range(3) for t in range(2)]
    names = [part.name for form in ("mtl", "mdl", "single") for part in forms.parts_of(form, SCHEMA)]
    assert names[:3] == ["0-home", "1-25", "2-25"] and len(set(names)) == 11
    with pytest.raises(ConfigError, match="form must be single, mtl or mdl to have members, got 'mdmt'"):
        forms.parts_of("mdmt", SCHEMA)


def test_names_of_folders_are_safe_and_differ():
    assert forms.folder_name("1-0", "<25/click") != forms.folder_name("2-0", ">25/click")
    for key in ("../../etc", "a\\b", "", "x" * 300, "..."):
        name = forms.folder_name("0-0", key)
        assert name.startswith("0-0-") and "/" not in name and "\\" not in name and len(name) < 80


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["single", "mtl", "mdl"])
def test_a_member_is_the_run_that_one_would_make_by_hand(form, tmp_path):
    dataset = make_dataset()
    family = fit(form, dataset, tmp_path / "family").family
    part = forms.parts_of(form, SCHEMA)[-1]
    view = restrict(dataset, part.domains, part.tasks, labelled_rows(dataset, part.domains, part.tasks))
    torch.manual_seed(OPTIONS.seed)
    by_hand = Trainer(make_model(view.schema), view, OPTIONS, out=tmp_path / "hand", display=Display())
    by_hand.fit()
    own = family.members[-1].model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in by_hand.model.state_dict().items())


@pytest.mark.parametrize("form", ["single", "mtl", "mdl"])
def test_the_result_is_that_of_the_member_which_has_the_pair(form, tmp_path):
    dataset = make_dataset()
    result = fit(form, dataset, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    auc = metrics["test"]["auc"]
    for part in forms.parts_of(form, SCHEMA):
        own = json.loads((tmp_path / "members" / part.name / "metrics.json").read_text())
        for d in part.domains:
            for t in part.tasks:
                key = f"{DOMAINS[d]}/{TASKS[t]}"
                assert auc[key] == pytest.approx(own["test"]["auc"][key], abs=1e-12)
    pairs = [value for key, value in auc.items() if key != "mean"]
    assert auc["mean"] == pytest.approx(np.mean(pairs)) and len(pairs) == 6
    members = metrics["members"]
    assert list(members) == [part.name for part in forms.parts_of(form, SCHEMA)]
    assert metrics["model"] == {
        "name": "mmoe",
        "form": form,
        "parameters": sum(p.numel() for p in result.family.parameters()),
        "multiply_adds": result.family.multiply_adds(),
    }
    assert metrics["train"]["epochs"] == 2 and metrics["fusion"] == {} and metrics["data"]["domains"] == list(DOMAINS)
    assert metrics["train"]["samples_per_second"] > 0


def test_multiply_adds_are_those_that_a_row_needs():
    def of(form):
        members = [
            Member(part.domains, part.tasks, make_model(restrict_schema(part))) for part in forms.parts_of(form, SCHEMA)
        ]
        return Family(form, members, 3, 2), [member.model.multiply_adds() for member in members]

    def restrict_schema(part):
        return dataclasses.replace(
            SCHEMA, domains=tuple(DOMAINS[d] for d in part.domains), tasks=tuple(TASKS[t] for t in part.tasks)
        )

    family, each = of("mtl")
    assert family.multiply_adds() == each[0]  # a row's own domain
    family, each = of("mdl")
    assert family.multiply_adds() == sum(each)  # a row's tasks
    family, each = of("single")
    assert family.multiply_adds() == 2 * each[0]


def test_m3oe_has_fusion_weights_in_its_members(tmp_path):
    fit("mtl", make_dataset(), tmp_path, name="m3oe")
    own = json.loads((tmp_path / "members" / "0-home" / "metrics.json").read_text())
    assert set(own["fusion"]) == {"alpha_domain", "alpha_task", "beta_domain", "beta_task"}


def test_finished_members_are_not_trained_again_and_the_result_is_the_same(tmp_path):
    dataset = make_dataset()
    assert not fit("mtl", dataset, tmp_path).kept
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {"metrics.json", "model.pt", "metrics.csv"} <= {path.name for path in stamps}
    again = fit("mtl", dataset, tmp_path)
    assert (
        again.kept and again.test.mean_auc == json.loads((tmp_path / "metrics.json").read_text())["test"]["auc"]["mean"]
    )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == stamps
    (tmp_path / "checkpoints" / "best" / "model.pt").unlink()
    assert not fit("mtl", dataset, tmp_path).kept and (tmp_path / "checkpoints" / "best" / "model.pt").is_file()
    longer = fit("mtl", dataset, tmp_path, options=dataclasses.replace(OPTIONS, epochs=3))
    assert not longer.kept and json.loads((tmp_path / "metrics.json").read_text())["train"]["epochs"] == 3


def test_an_interrupted_member_goes_on_where_it_was(tmp_path):
    """As Ctrl-C in the second member: the third has not begun, and the end is the same as without."""

    class Stop(Display):
        left = 8

        def advance(self, done, mean_loss):
            Stop.left -= 1
            if Stop.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

    dataset = make_dataset()
    straight = fit("mdl", dataset, tmp_path / "straight")
    result = fit("mdl", dataset, tmp_path / "halves", display=Stop)
    assert result.ended == "interrupted" and result.family is None and Stop.left <= 0
    assert not (tmp_path / "halves" / "metrics.json").exists()
    resumed = fit("mdl", dataset, tmp_path / "halves")
    for name, value in straight.family.state_dict().items():
        assert torch.equal(resumed.family.state_dict()[name], value), name


def test_a_member_without_rows_is_left_out_and_its_pairs_are_undefined(tmp_path):
    dataset = make_dataset()
    dataset.test.label[np.asarray(dataset.test.domain) == 1, 0] = np.nan
    told = []
    result = fit("single", dataset, tmp_path, tell=told.append)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["test"]["auc"]["<25/click"] is None and metrics["test"]["auc"]["<25/like"] is not None
    assert result.val.undefined() == ["AUC and logloss of <25/click: no member has this pair (85 labelled rows)"]
    assert result.test.undefined() == ["AUC and logloss of <25/click: no labelled rows (0 labelled rows)"]
    assert metrics["val"]["overall"]["auc"]["click"] is None  # some of its rows have no score
    assert result.missing == {"1-0-25-click": "no labelled row in test"} == metrics["missing_members"]
    assert "left out: no labelled row in test" in told
    for part in ("train", "val", "test"):
        getattr(dataset, part).label[:] = np.nan
    with pytest.raises(DataError, match=r"form single: no member of made-up can be trained; 0-0-home-click: no lab"):
        fit("single", dataset, tmp_path / "none")


def test_a_member_with_a_single_row_is_left_out_where_rows_are_to_be_held_out(tmp_path):
    dataset = make_dataset()
    of_domain = np.flatnonzero(np.asarray(dataset.train.domain) == 1)
    dataset.train.label[of_domain[1:]] = np.nan
    dataset.train.label[of_domain[0]] = 1
    missing = fit("mtl", dataset, tmp_path, name="m3oe").missing
    assert list(missing) == ["1-25"] and "has one row; use bilevel off or joint" in missing["1-25"]


def test_damage_while_a_member_is_trained_is_no_reason_to_leave_it_out(tmp_path, monkeypatch):
    def damaged(self, resume=None):
        raise DataError("train.arrow: differs from what was written")

    monkeypatch.setattr(Trainer, "fit", damaged)
    with pytest.raises(DataError, match=r"^train\.arrow: differs"):
        fit("mtl", make_dataset(), tmp_path)


def test_ctrl_c_while_the_last_epoch_of_a_member_is_measured_ends_the_family(tmp_path, monkeypatch):
    """The member is finished then, and its run does not say interrupted."""
    real, calls = trainer.evaluate, []

    def evaluate(model, part, dataset, clock=None):
        calls.append(part)
        if len(calls) == OPTIONS.epochs:
            os.kill(os.getpid(), signal.SIGINT)
        return real(model, part, dataset, clock)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    dataset = make_dataset()
    assert fit("mdl", dataset, tmp_path).ended == "interrupted"
    assert [path.name for path in (tmp_path / "members").iterdir()] == ["0-click"]
    told = []
    monkeypatch.setattr(trainer, "evaluate", real)
    assert fit("mdl", dataset, tmp_path, tell=told.append).ended == "epochs"


def test_ctrl_c_between_members_ends_the_family(tmp_path, monkeypatch):
    real, calls = forms.labelled_rows, []

    def labelled_rows(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(forms, "labelled_rows", labelled_rows)
    assert fit("mdl", make_dataset(), tmp_path).ended == "interrupted" and len(calls) == 2


def test_row_numbers_of_one_member_at_a_time_are_kept(tmp_path, monkeypatch):
    real, found = forms.labelled_rows, []

    def labelled_rows(*given):
        assert not any(rows() is not None for rows in found)
        rows = real(*given)
        found.extend(weakref.ref(numbers) for numbers in rows.values())
        return rows

    monkeypatch.setattr(forms, "labelled_rows", labelled_rows)
    result = fit("mtl", make_dataset(), tmp_path)
    assert len(found) == 9 and result.ended == "epochs"


def test_pair_weights_are_those_of_a_members_pairs(tmp_path):
    dataset = make_dataset()
    options = dataclasses.replace(OPTIONS, loss_weighting="given", pair_weights="like=2, <25/*=3,>25/click=4")
    family = fit("mtl", dataset, tmp_path / "family", options=options).family
    for member, weights in zip(family.members, ("like=2", "like=2,<25/*=3", "like=2,>25/click=4"), strict=True):
        view = restrict(dataset, member.domains, (0, 1), labelled_rows(dataset, member.domains, (0, 1)))
        torch.manual_seed(options.seed)
        model = make_model(view.schema)
        Trainer(model, view, dataclasses.replace(options, pair_weights=weights), display=Display()).fit()
        own = member.model.state_dict()
        assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="pair_weights: 'lik=2' names no pair"):
        fit("mtl", dataset, tmp_path / "no", options=dataclasses.replace(options, pair_weights="lik=2"))
    assert not (tmp_path / "no").exists()


class Killed(BaseException):
    """No cleanup of the trainer's answers to it, as none answers to kill -9."""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("nth", [1, 2, 6, 9, 10, 11, 14, 20, 21, 22])
def test_a_run_that_is_killed_around_any_file_ends_as_if_it_had_not_been(straight, tmp_path, monkeypatch, nth, before):
    dataset, real, written = make_dataset(), Path.replace, []

    def replace(self, target):
        written.append(target)
        if not before or len(written) != nth:
            real(self, target)
        if len(written) == nth:
            raise Killed

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Killed):
        fit("mdl", dataset, tmp_path)
    monkeypatch.setattr(Path, "replace", real)
    fit("mdl", dataset, tmp_path)
    assert lasting(tmp_path) == straight


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    fit("mdl", make_dataset(), out)
    return lasting(out)


def lasting(out):
    """metrics.json but for times and memory, and every file."""
    metrics = json.loads(Path(out, "metrics.json").read_text())
    assert set(metrics["train"]) == {"epochs", "seconds", "cpu_seconds", "samples_per_second", "peak_rss_bytes"}
    metrics["train"] = {"epochs": metrics["train"]["epochs"]}
    return metrics, sorted(str(path.relative_to(out)) for path in Path(out).rglob("*") if path.is_file())


# As one model ---------------------------------------------------------------------------------------------------------


def make_family(form, name="mmoe", backend="cpu"):
    dataset = make_dataset()
    members = []
    for part in forms.parts_of(form, SCHEMA):
        view = restrict(dataset, part.domains, part.tasks, labelled_rows(dataset, part.domains, part.tasks))
        torch.manual_seed(len(members))
        model = make_model(view.schema, name, backend)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        members.append(Member(part.domains, part.tasks, model.eval()))
    return Family(form, members, 3, 2).eval(), dataset


@pytest.mark.parametrize("form", ["single", "mtl", "mdl"])
def test_every_row_gets_what_its_members_say(form):
    family, dataset = make_family(form)
    batch = dataset.test.take(np.arange(60))
    scores, logits = family.predict(*batch.inputs), family(*batch.inputs)
    torch.testing.assert_close(torch.sigmoid(logits), scores, rtol=1e-5, atol=1e-6)
    for row in range(60):
        one = batch.rows(row, row + 1)
        d = int(one.domain)
        for member in family.members:
            if d in member.domains:
                place = torch.tensor([member.domains.index(d)])
                own = member.model.predict(one.ids, one.dense, place, one.bags)
                torch.testing.assert_close(scores[row, list(member.tasks)], own[0], rtol=1e-4, atol=1e-5)
    assert scores.shape == (60, 2) and scores.dtype == torch.float32
    assert family.predict(*batch.rows(0, 0).inputs).shape == (0, 2)


def test_a_domain_that_is_none_is_refused_by_row():
    family, dataset = make_family("mtl")
    batch = dataset.test.take(np.arange(3))
    with pytest.raises(ValueError, match=r"domain\[1\] is 3, the family has 3 domains"):
        family.predict(batch.ids, batch.dense, torch.tensor([0, 3, 1]), batch.bags)
    with pytest.raises(ValueError, match=r"domain must be \[B\] = \[3\], got \[2\]"):
        family.predict(batch.ids, batch.dense, torch.tensor([0, 1]), batch.bags)


@pytest.mark.parametrize("members", [None, [], [None], [{}]])
def test_a_family_that_tells_of_no_member_is_refused(members):
    content = {"model": "mmoe", "config": {"members": members}, "weights": {}, "encoder": None}
    for read in (m3oe_fast.models.config_of, m3oe_fast.models.from_checkpoint):
        with pytest.raises(CheckpointError, match=r"somewhere holds (no )?members"):
            read(content, "somewhere")


def test_rows_of_a_bag():
    values, offsets = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 2, 2, 5])
    taken, ends = take((values, offsets), torch.tensor([2, 1, 0, 2]))
    assert taken.tolist() == [7, 8, 9, 5, 6, 7, 8, 9] and ends.tolist() == [0, 3, 3, 5, 8]
    taken, ends = take((values, offsets), torch.tensor([], dtype=torch.int64))
    assert taken.tolist() == [] and ends.tolist() == [0]


@pytest.mark.parametrize("form", ["single", "mtl", "mdl"])
def test_a_saved_family_comes_back(form, tmp_path):
    family, dataset = make_family(form)
    family.save(tmp_path)
    loaded = m3oe_fast.load(tmp_path)
    batch = dataset.test.take(np.arange(40))
    assert torch.equal(loaded.predict(*batch.inputs), family.predict(*batch.inputs))
    assert (loaded.form, loaded.num_domains, loaded.backend_name) == (form, 3, "cpu") and not loaded.training
    with pytest.raises(CheckpointError, match=r"holds the models of a form, not one; m3oe_fast\.load reads them"):
        MODELS["mmoe"].load(tmp_path)


def test_a_damaged_family_is_refused(tmp_path):
    family, _ = make_family("mtl")
    family.save(tmp_path)
    content = m3oe_fast.checkpoint.read(tmp_path)
    for change in (
        lambda c: c["weights"].pop("1.embedding"),
        lambda c: c["config"]["members"][0].pop("domains"),
        lambda c: c["config"]["members"][1]["config"].pop("vocab_sizes"),
        lambda c: c.update(config={"members": [None]}),
        lambda c: c.update(config={**c["config"], "members": []}),
        lambda c: c["config"]["members"][0].update(domains=[9]),
        lambda c: c["config"]["members"][0].update(tasks=[0, 0]),
        lambda c: c["config"].update(num_domains="3"),
        lambda c: c.update(model=["mmoe"]),
    ):
        broken = {
            **content,
            "config": json.loads(json.dumps(content["config"])),
            "weights": dict(content["weights"]),
        }
        change(broken)
        with pytest.raises(CheckpointError):
            m3oe_fast.models.from_checkpoint(broken, "somewhere")


def test_families_of_models_that_only_eager_pytorch_computes():
    family, _ = make_family("mtl", name="mmoe", backend="reference")
    assert family.backend_name == "reference" and family.isa_name is None
    with pytest.raises(BackendError):
        MODELS["m2m"](MODELS["m2m"].config_type([3], 0, 1, 1), backend="cpu")


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = 900
    frame = pd.DataFrame({"item": rng.integers(0, 12, rows), "tab": rng.integers(0, 3, rows), "user": np.arange(rows)})
    for task, shift in (("click", 0), ("like", 2)):
        logit = frame["item"] / 3 - 2 - shift + frame["tab"]
        frame[task] = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int)
    monkeypatch.chdir(tmp_path)
    frame.to_parquet("log.parquet")
    Path("schema.yaml").write_text(
        "ids: [item]\ndomain: {column: tab}\nlabels: {click: click, like: like}\nuser: user\n"
    )
    return ["--data=parquet:log.parquet", "--schema=schema.yaml", "--cache_dir=cache", "--batch_size=128", "--seed=1"]


SMALL = ["--embed_dim=4", "--expert_dims=8,4", "--tower_dim=4"]


def run(*argv):
    return subprocess.run([sys.executable, "-m", "m3oe_fast.train", *argv], capture_output=True, text=True)


def test_a_family_from_training_to_scores(log, capsys):
    from m3oe_fast.evaluate import main as evaluate
    from m3oe_fast.predict import main as predict
    from m3oe_fast.train import main as train

    assert train([*log, *SMALL, "--model=ple", "--form=mtl", "--epochs=2", "--out=runs/a"]) == 0
    text = capsys.readouterr().out
    for words in ("model     ple (mtl)", "member 2/3  1-1", "done: 3 models", "test scores of all models together"):
        assert words in text
    metrics = json.loads(Path("runs/a/metrics.json").read_text())
    assert evaluate(["--checkpoint=runs/a", "--json=e.json"]) == 0
    assert json.loads(Path("e.json").read_text())["auc"] == pytest.approx(metrics["test"]["auc"])
    assert predict(["--checkpoint=runs/a", "--input=log.parquet", "--output=s.parquet"]) == 0
    scores = pd.read_parquet("s.parquet")
    model = m3oe_fast.load("runs/a")
    np.testing.assert_allclose(scores, model.score(pd.read_parquet("log.parquet")), rtol=1e-5, atol=1e-6)
    assert scores.notna().all().all() and len(scores) == 900
    capsys.readouterr()
    assert train(["--config=runs/a/config.yaml", "--resume=last"]) == 0
    assert "of a finished run: nothing to train" in capsys.readouterr().out
    for line, message in (
        (["--form=mdl", "--resume=last"], "runs/a is a run of another form: it was mtl and is now mdl"),
        (["--lr=0.5", "--resume=last"], "lr was 0.001 and is now 0.5"),
        (["--resume=best"], "resume of form mtl must be last, got best"),
        ([], "already holds a run"),
    ):
        with pytest.raises((ConfigError, CheckpointError), match=message):
            train(["--config=runs/a/config.yaml", *line])
    assert train(["--config=runs/a/config.yaml", "--resume=last"]) == 0  # a refused line left config.yaml alone


def test_what_is_no_run_of_the_form_is_not_written_over(log, capsys):
    from m3oe_fast.train import main as train

    line = [*log, *SMALL, "--star_dim=8", "--hidden_dim=8", "--epochs=1"]
    assert train([*line, "--form=mtl", "--out=runs/a"]) == 0
    member = next(Path("runs/a/members").iterdir()) / "config.yaml"
    with pytest.raises(ConfigError, match="unknown option view"):  # the whole log would be another run
        train([f"--config={member}", "--out=runs/b"])
    old = Path("runs/old/config.yaml")
    old.parent.mkdir()
    old.write_text("epochs: 1\n")
    with pytest.raises(ConfigError, match="is a run of another form: it was mdmt and is now mtl"):
        train([*line, "--form=mtl", "--out=runs/old", "--resume=last"])
    assert old.read_text() == "epochs: 1\n"
    family = Path("runs/a/config.yaml").read_text()
    shutil.rmtree("runs/a/checkpoints")  # as if killed before the last member was done
    with pytest.raises(ConfigError, match="runs/a is a run of another form: it was mtl and is now mdmt"):
        train([*line, "--out=runs/a", "--resume=last"])
    assert Path("runs/a/config.yaml").read_text() == family and not Path("runs/a/checkpoints").exists()


def test_the_folder_of_a_member_names_that_of_the_family(log):
    from m3oe_fast.evaluate import main as evaluate
    from m3oe_fast.predict import main as predict
    from m3oe_fast.train import main as train

    assert train([*log, *SMALL, "--model=ple", "--form=mtl", "--epochs=1", "--out=runs/a"]) == 0
    member = f"--checkpoint={next(Path('runs/a/members').iterdir())}"
    with pytest.raises(CheckpointError, match=r"holds no vocabularies.*for a member of a form the folder of the whole"):
        evaluate([member, *log[:3]])
    with pytest.raises(ConfigError, match=r"holds no vocabularies.*for a member of a form the folder of the whole run"):
        predict([member, "--input=log.parquet", "--output=s.parquet"])
    assert not Path("s.parquet").exists()


def test_mlp_is_trained_per_pair_by_default(log, capsys):
    from m3oe_fast.train import main as train

    assert train([*log, *SMALL, "--model=mlp", "--epochs=1", "--out=runs/a"]) == 0
    assert "member 6/6  2-1-2-like" in capsys.readouterr().out
    assert json.loads(Path("runs/a/metrics.json").read_text())["model"]["form"] == "single"


def test_kill_9_and_again_ends_as_if_nothing_had_been(log):
    line = [*log, *SMALL, "--model=mmoe", "--form=single", "--epochs=3"]
    assert run(*line, "--out=straight").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "m3oe_fast.train", *line, "--out=killed"], stdout=subprocess.DEVNULL
    )
    limit = time.monotonic() + 60
    while not Path("killed/members/1-0-1-click/metrics.csv").exists():
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not Path("killed/metrics.json").exists()
    assert run(*line, "--out=killed", "--resume=last").returncode == 0
    straight, killed = (json.loads(Path(name, "metrics.json").read_text()) for name in ("straight", "killed"))
    assert lasting("straight")[0] == lasting("killed")[0] and straight["members"] == killed["members"]
