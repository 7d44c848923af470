"""The command: trials, what stays of a study, resuming it after anything, every wrong line."""

import csv
import dataclasses
import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import m3oe_fast
from m3oe_fast.errors import ConfigError, UserError
from m3oe_fast.train import main as train
from m3oe_fast.train import parse as parse_train
from m3oe_fast.training import Trainer
from m3oe_fast.tune import main

from .small_run import SMALL, write_small_log

optuna = pytest.importorskip("optuna")

SOURCE = Path(m3oe_fast.__file__).parents[1]
SPACE = "lr: {low: 1e-3, high: 1e-1, log: true}\nexpert_dims: {choices: [4, '4,3']}\n"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_small_log(tmp_path_factory.mktemp("log") / "small", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("space.yaml").write_text(SPACE)


@pytest.fixture
def line(log):
    small = [word for word in SMALL if not word.startswith(("--lr", "--expert_dims"))]
    return [*log, *small, "--epochs=1", "--out=study", "--space=space.yaml"]


def rows(folder="study"):
    with open(Path(folder) / "tune.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def searched(folder="study"):
    return [(row["trial"], row["state"], row["lr"], row["expert_dims"], row["val_auc"]) for row in rows(folder)]


def test_a_study_leaves_a_table_runs_and_the_best_options(line, log, capsys):
    assert main([*line, "--trials=3"]) == 0
    text = capsys.readouterr().out
    found = rows()
    assert [row["trial"] for row in found] == ["1", "2", "3"]
    assert {row["state"] for row in found} == {"complete"}
    assert all(0.001 <= float(row["lr"]) <= 0.1 and row["expert_dims"] in ("4", "4,3") for row in found)
    best = max(found, key=lambda row: float(row["val_auc"]))
    assert f"best      trial {best['trial']} of 3, val AUC {float(best['val_auc']):.4f}" in text
    assert "trial 2/3  lr " in text and "epoch 1/1" not in text
    assert "python -m m3oe_fast.train --config study/best.yaml" in text
    assert sorted(path.name for path in Path("study").iterdir()) == [
        "best.yaml",
        "space.yaml",
        "study.db",
        "study.yaml",
        "trials",
        "tune.csv",
    ]
    own = yaml.safe_load(Path(f"study/trials/{best['trial']}/config.yaml").read_text())
    assert yaml.safe_load(Path("study/best.yaml").read_text()) == {k: v for k, v in own.items() if k != "out"}
    assert train(["--config=study/best.yaml", "--out=again"]) == 0
    metrics = yaml.safe_load(Path("again/metrics.json").read_text())
    assert metrics["val"]["auc"]["mean"] == float(best["val_auc"])


def test_the_first_trial_has_the_options_as_set(log):
    Path("space.yaml").write_text(
        "lr: {low: 1e-3, high: 1e-1}\ntower_dim: {choices: [4, 64]}\nexpert_dims: {choices: [64]}"
    )
    shape = ["--star_dim=8", "--hidden_dim=8", "--backend=reference"]
    assert main([*log, *shape, "--out=study", "--space=space.yaml", "--trials=1", "--epochs=1"]) == 0
    ((_, _, lr, dims, _),) = searched()
    assert (float(lr), dims, rows()[0]["tower_dim"]) == (parse_train([]).train.lr, "64", "64")


def test_options_on_the_line_are_not_searched(log):
    shape = ["--star_dim=8", "--hidden_dim=8", "--embed_dim=4", "--expert_dims=4", "--backend=reference"]
    assert main([*log, *shape, "--bilevel=off", "--trials=1", "--epochs=1", "--out=study"]) == 0
    assert set(yaml.safe_load(Path("study/space.yaml").read_text())) == {"lr", "shared_experts", "tower_dim"}
    config = yaml.safe_load(Path("study/trials/1/config.yaml").read_text())
    assert (config["hidden_dim"], config["expert_dims"], config["bilevel"]) == (8, [4], "off")


def test_a_resumed_study_goes_on_as_if_never_stopped(line, capsys):
    assert main([*line, "--trials=4", "--out=whole"]) == 0
    assert main([*line, "--trials=2", "--resume"]) == 0
    assert "nothing to resume from: starting afresh" in capsys.readouterr().out
    assert main(["--out=study", "--resume", "--trials=4"]) == 0  # everything else is the study's
    assert searched() == searched("whole")
    before = Path("study/tune.csv").read_bytes()
    assert main(["--out=study", "--resume", "--trials=4"]) == 0
    assert Path("study/tune.csv").read_bytes() == before


def test_a_trial_that_diverges_is_recorded_and_the_study_goes_on(line, monkeypatch, capsys):
    fit = Trainer.fit

    def diverge(trainer, resume):
        if trainer.run.root.name == "2":
            raise ConfigError("training diverged in epoch 1 (the loss is nan): lower lr")
        if trainer.run.root.name == "3":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried a lot")
        return fit(trainer, resume)

    monkeypatch.setattr(Trainer, "fit", diverge)
    assert main([*line, "--trials=4"]) == 0
    assert [row["state"] for row in rows()] == ["complete", "fail", "fail", "complete"]
    assert rows()[1]["reason"] == "training diverged in epoch 1 (the loss is nan): lower lr"
    assert rows()[2]["reason"] == "CUDA out of memory."
    assert "failed: training diverged" in capsys.readouterr().out


def test_a_study_without_a_result_says_why(line):
    Path("space.yaml").write_text("weight_decay: {choices: [-1.0, -2.0]}")
    with pytest.raises(
        ConfigError, match="none of 2 trials came to a result; the first: weight_decay must be"
    ) as caught:
        main([*line, "--trials=2"])
    assert "\n" not in str(caught.value)
    assert [row["state"] for row in rows()] == ["fail", "fail"]


def test_the_pruner_ends_trials_that_are_behind(line, monkeypatch, capsys):
    monkeypatch.setattr(optuna.trial.Trial, "should_prune", lambda trial: trial.number == 1)
    assert main([*line, "--trials=2", "--epochs=3", "--pruner=median"]) == 0
    assert [row["state"] for row in rows()] == ["complete", "pruned"]
    assert rows()[1]["reason"].startswith("after epoch 1, val AUC 0.") and rows()[1]["val_auc"] == ""
    assert "pruned after epoch 1" in capsys.readouterr().out


def test_a_timeout_starts_no_further_trial(line, monkeypatch, capsys):
    monkeypatch.setattr("m3oe_fast.tune.time.monotonic", iter(range(0, 10_000, 10)).__next__)
    assert main([*line, "--trials=5", "--timeout=25"]) == 0
    assert 0 < len(rows()) < 5
    assert f"timeout after {len(rows())} trials; to go on: python -m m3oe_fast.tune --out study --resume" in (
        capsys.readouterr().out
    )


# Interruptions -----------------------------------------------------------------------------------


def interrupt_once(monkeypatch, name, error):
    """Let the run in the folder ``name`` end with ``error`` after its first epoch, once."""
    from m3oe_fast.tune import _TrialDisplay

    end_epoch, left = _TrialDisplay.end_epoch, [error]

    def stop(display, epoch, is_best):
        end_epoch(display, epoch, is_best)
        if display._trial.user_attrs["folder"] == name and left:
            raise left.pop()

    monkeypatch.setattr(_TrialDisplay, "end_epoch", stop)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("cannot write: No space left on device")])
def test_the_trial_that_was_interrupted_goes_on(line, monkeypatch, capsys, error):
    assert main([*line, "--trials=3", "--epochs=2", "--out=whole"]) == 0
    interrupt_once(monkeypatch, 2, error)
    argv = [*line, "--trials=3", "--epochs=2"]
    if isinstance(error, KeyboardInterrupt):
        assert main(argv) == 130
        assert (
            "interrupted in trial 2; to go on: python -m m3oe_fast.tune --out study --resume" in capsys.readouterr().out
        )
    else:
        with pytest.raises(UserError, match="No space left"):
            main(argv)
    seen = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda trainer, resume: seen.append(trainer) or fit(trainer, resume))
    assert main(["--out=study", "--resume"]) == 0
    assert len(seen) == 2  # trial 1 is not done again
    assert searched() == searched("whole")
    assert sorted(path.name for path in Path("study/trials").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_study_that_is_stopped_from_outside_goes_on(line, kill):
    command = [sys.executable, "-m", "m3oe_fast.tune", *line, "--trials=500"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = io.StringIO()
    for text in process.stdout:
        seen.write(text)
        if text.startswith("trial 2/"):
            process.send_signal(kill)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == (130 if kill == signal.SIGINT else -signal.SIGKILL), seen.getvalue() + out + err
    assert "Traceback" not in err
    done = len(rows())
    assert main(["--out=study", "--resume", f"--trials={done + 2}"]) == 0
    assert [row["trial"] for row in rows()] == [str(number) for number in range(1, done + 3)]
    assert {row["state"] for row in rows()} == {"complete"}


def test_only_options_of_the_model_are_searched(log):
    assert main([*log, "--model=shared_bottom", "--trials=2", "--epochs=1", "--out=study"]) == 0
    assert set(yaml.safe_load(Path("study/space.yaml").read_text())) == {"lr", "expert_dims", "tower_dim", "embed_dim"}
    assert {row["state"] for row in rows()} == {"complete"}
    Path("space.yaml").write_text("hidden_dim: {low: 8, high: 16}\n")
    with pytest.raises(ConfigError, match=r"search space space\.yaml: hidden_dim is no option of model star"):
        main([*log, "--model=star", "--out=other", "--space=space.yaml"])
    assert not Path("other").exists()


# Wrong input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--out=", "name the study's folder with --out"),
        ("--trials=0", "trials must be an integer of at least 1, got 0"),
        ("--timeout=-1", "timeout must be above 0"),
        ("--pruner=best", "--pruner must be one of none, median, got best"),
        ("--space=nowhere.yaml", r"search space nowhere\.yaml: No such file"),
        ("--lr=0.1", r"search space space\.yaml: lr is searched here and set on the line; drop one"),
        ("--epochs=0", "epochs must be an integer of at least 1"),
        ("--backend=cuda", "backend 'cuda' cannot run here"),
        ("--data=recbole:nowhere", "nowhere"),
        ("--out=file/below", "cannot write to the run folder file/below"),
        ("--out=run", "run holds a training run; name another folder with --out"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_study(line, changed, message):
    Path("file").write_text("")
    Path("run").mkdir()
    Path("run/config.yaml").write_text("epochs: 1\n")
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        main([*line, changed])
    assert "\n" not in str(caught.value)
    assert sorted(Path().rglob("*")) == before


def test_a_study_is_not_overwritten_and_not_changed(line):
    main([*line, "--trials=1"])
    before = {path: path.read_bytes() for path in Path("study").rglob("*") if path.is_file()}
    Path("other.yaml").write_text("lr: {low: 1, high: 2}")
    for argv, message in (
        ([*line], "study already holds a study: continue it with --resume, or name another"),
        (["--out=study", "--resume", "--epochs=2"], "another epochs: it was 1 and is now 2; drop the option"),
        (["--out=study", "--resume", "--split=user"], "another split: it was 'random' and is now 'user'"),
        (["--out=study", "--resume", "--space=other.yaml"], r"another search space, study/space\.yaml; drop --space"),
    ):
        with pytest.raises(ConfigError, match=message):
            main(argv)
    assert {path: path.read_bytes() for path in Path("study").rglob("*") if path.is_file()} == before
    assert main([*line, "--resume", "--trials=1"]) == 0


def test_damaged_files_of_a_study_are_named(line):
    main([*line, "--trials=1"])
    Path("study/study.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(ConfigError, match=r"study\.db cannot be used \(.*not a database.*\); mend that") as caught:
        main(["--out=study", "--resume", "--trials=2"])
    assert "\n" not in str(caught.value)
    Path("study/space.yaml").write_text("lr: 3")
    with pytest.raises(ConfigError, match=r"search space study/space\.yaml: lr must be"):
        main(["--out=study", "--resume"])
    Path("study/study.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"^study/study\.yaml: while parsing"):
        main(["--out=study", "--resume"])


@pytest.mark.parametrize("name", ["a b", "a?b#c", "a%20b", "a;b&c=d"])
def test_a_folder_of_any_name_is_resumed(line, name):
    assert main([*line, f"--out={name}", "--trials=1"]) == 0
    assert Path(name, "study.db").is_file()
    assert main([f"--out={name}", "--resume", "--trials=2"]) == 0
    assert len(rows(name)) == 2
    shutil.rmtree(name)
    assert [path.name for path in Path().iterdir()] == ["space.yaml"]


def test_without_optuna_one_line_says_how_to_get_it(line, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ConfigError, match=r"^tuning needs Optuna, which is not installed: pip install 'm3oe_fast\[tune\]'$"
    ):
        main(line)
    assert [path.name for path in Path().iterdir()] == ["space.yaml"]


def test_every_option_of_train_but_its_folder_is_there():
    from m3oe_fast.train import COMMAND as TRAIN
    from m3oe_fast.tune import COMMAND, TuneOptions

    own = {field.name for field in dataclasses.fields(TuneOptions)}
    assert set(COMMAND.names.types) == set(TRAIN.names.types) | own
