"""Runs that end anywhere and go on: the same bits as runs that were never stopped, in files as in weights."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from m3oe_fast import checkpoint
from m3oe_fast.data import reader
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.training.console import Display
from tests.test_trainer import (
    MODES,
    OPTIONS,
    Killed,
    assert_same_bits,
    bits,
    compiled,
    make_dataset,
    make_model,
    make_trainer,
)

STEPS = dataclasses.replace(OPTIONS, epochs=2, checkpoint_every=1, outer_every=3, batch_size=100)
TIMES = ("seconds", "validation_seconds", "samples_per_second", "cpu_seconds")


class After(Display):
    """Does something once, after ``steps`` steps in all."""

    def __init__(self, steps, act):
        self.left, self.act = steps, act

    def advance(self, done, mean_loss):
        self.left -= 1
        if self.left == 0:
            self.act()


def die():
    """Stands for kill -9: nothing of the trainer runs afterwards."""
    raise Killed


def ask(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def left_by(out):
    """All that a run must leave, less its times."""
    found = {}
    for name in ("last", "best"):
        content = checkpoint.read(out / "checkpoints" / name)
        state = content["trainer"]
        for epoch in state["history"]:
            for key in TIMES:
                epoch.pop(key, None)
        kept = {key: state[key] for key in state if key not in ("partial", "rng")}
        found[name] = {
            "weights": dict(content["weights"]),
            "rng": state["rng"],
            "step": state["partial"]["step"],
            **kept,
        }
    for file in ("metrics.csv", "fusion.csv"):
        with (out / file).open(newline="") as stream:
            found[file] = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(stream)]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found["metrics.jsonl"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return found


def assert_same(one, other, where=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_same(value, other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for place, (value, wanted) in enumerate(zip(one, other, strict=True)):
            assert_same(value, wanted, f"{where}/{place}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("changed", "backend"),
    [
        *(({"bilevel": mode}, "reference") for mode in MODES),
        ({"accumulate": 2, "clip_norm": 0.5, "schedule": "cosine", "warmup": 3}, "reference"),
        ({"loss_weighting": "uncertainty", "decay": "matrices", "schedule": "step"}, "reference"),
        ({"loss_weighting": "rows", "embedding_optimizer": "lazy_adam"}, "reference"),
        ({"embedding_optimizer": "row_adagrad", "bilevel": "joint", "schedule": "linear"}, "reference"),
        ({"shuffle_window": 64, "prefetch": 0}, "reference"),
        compiled({"bilevel": "unrolled", "loss_weighting": "uncertainty"}),
        compiled({"bilevel": "implicit"}),
    ],
)
def test_killed_after_any_step_and_resumed_is_the_same_run(tmp_path, monkeypatch, changed, backend):
    monkeypatch.setattr(reader, "BLOCK_ROWS", 32)  # so that a small log has windows
    options = dataclasses.replace(STEPS, **changed)
    straight = make_trainer(options, out=tmp_path / "straight", model=make_model(backend=backend))
    straight.fit()
    steps = 2 * straight.steps_per_epoch
    assert steps >= 6
    for killed in {1, steps // 2 - 1, steps // 2, steps // 2 + 1, steps - 1}:
        out = tmp_path / str(killed)
        trainer = make_trainer(options, out=out, model=make_model(backend=backend), display=After(killed, die))
        with pytest.raises(Killed):
            trainer.fit()
        # Killed in the first step, a run has written nothing, and begins anew with the weights that it is given.
        resumed = make_trainer(options, out=out, model=make_model(seed=5 * (killed > 1), backend=backend))
        resumed.fit(resume="last")
        assert_same_bits(bits(resumed.model), bits(straight.model))
        assert_same(left_by(out), left_by(tmp_path / "straight"))


def test_a_checkpoint_inside_an_epoch_says_where_it_stands(tmp_path):
    said = []

    class Says(Display):
        def message(self, text):
            said.append(text)

        def begin_epoch(self, epoch, epochs, rows, done=0):
            said.append((epoch, done))

    with pytest.raises(Killed):
        make_trainer(STEPS, out=tmp_path, display=After(4, die)).fit()
    resumed = make_trainer(STEPS, out=tmp_path, display=Says())
    resumed.fit(resume="last")
    assert said[0].startswith("resuming in epoch 1 after step 3 of 5")  # the step that was killed had not been written
    assert said[1] == (1, 300)
    assert said[2] == (2, 0)


def test_going_back_inside_a_run_folder_is_refused(tmp_path):
    """Its files would tell of two runs: best of the one, last and metrics of the other."""
    options = dataclasses.replace(STEPS, epochs=3, keep_last=3)
    make_trainer(options, out=tmp_path).fit()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("epoch-1", "epoch-2"):
        with pytest.raises(ConfigError, match=f"{name}.* lies behind .* in another folder, with --out"):
            make_trainer(options, out=tmp_path).fit(resume=tmp_path / "checkpoints" / name)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    make_trainer(options, out=tmp_path).fit(resume=tmp_path / "checkpoints" / "epoch-3")


def test_a_kill_between_a_checkpoint_and_its_second_name_loses_no_epoch(tmp_path, monkeypatch):
    options = dataclasses.replace(STEPS, keep_last=2)
    trainer = make_trainer(options, out=tmp_path)
    monkeypatch.setattr(trainer.run, "keep_epoch", lambda *arguments: die())
    with pytest.raises(Killed):
        trainer.fit()
    make_trainer(options, out=tmp_path).fit(resume="last")
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "epoch-1", "epoch-2", "last"]


def test_a_diverged_run_does_not_overwrite_its_last_good_state(tmp_path):
    make_trainer(dataclasses.replace(STEPS, epochs=1), out=tmp_path).fit()
    trainer = make_trainer(STEPS, out=tmp_path, display=After(2, lambda: trainer.model.embedding.data.fill_(torch.nan)))
    with pytest.raises(ConfigError, match="diverged in epoch 2"):
        trainer.fit(resume="last")
    content = checkpoint.read(tmp_path / "checkpoints" / "last")
    assert all(weight.isfinite().all() for weight in content["weights"].values())


def test_an_interrupted_trainer_is_not_fitted_a_second_time():
    trainer = make_trainer(STEPS, display=After(2, ask))
    assert trainer.fit().ended == "interrupted"
    with pytest.raises(ConfigError, match="was interrupted"):
        trainer.fit()


def test_checkpoints_come_every_so_many_steps_and_never_where_the_epoch_writes_one(tmp_path, monkeypatch):
    for every, partial in ((0, 0), (2, 4), (5, 0), (100, 0)):
        trainer = make_trainer(dataclasses.replace(STEPS, checkpoint_every=every), out=tmp_path / str(every))
        written = []
        monkeypatch.setattr(trainer, "_write_partial", lambda written=written: written.append(1))
        trainer.fit()
        assert trainer.steps_per_epoch == 5
        assert len(written) == partial, every


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_ctrl_c_ends_after_the_step_and_loses_nothing(tmp_path, number):
    options = dataclasses.replace(STEPS, checkpoint_every=0)
    straight = make_trainer(options)
    straight.fit()
    trainer = make_trainer(options, out=tmp_path, display=After(7, lambda: ask(number)))
    result = trainer.fit()
    assert (result.ended, len(result.history), result.best_epoch) == ("interrupted", 1, 1)
    state = checkpoint.read(tmp_path / "checkpoints" / "last")["trainer"]
    assert (len(state["history"]), state["partial"]["step"]) == (1, 2)
    resumed = make_trainer(options, out=tmp_path, model=make_model(seed=5))
    resumed.fit(resume="last")
    assert_same_bits(bits(resumed.model), bits(straight.model))


def test_ctrl_c_before_the_first_epoch_is_over_can_be_resumed_too(tmp_path):
    result = make_trainer(STEPS, out=tmp_path, display=After(2, ask)).fit()
    assert (result.ended, result.best_epoch) == ("interrupted", 0)
    straight = make_trainer(STEPS)
    straight.fit()
    resumed = make_trainer(STEPS, out=tmp_path, model=make_model(seed=5))
    resumed.fit(resume="last")
    assert_same_bits(bits(resumed.model), bits(straight.model))


def test_ctrl_c_in_the_last_step_of_a_run_is_no_interruption(tmp_path):
    result = make_trainer(STEPS, out=tmp_path, display=After(10, ask)).fit()
    assert result.ended == "epochs"


def test_the_newest_epochs_are_kept_and_each_can_be_gone_on_from(tmp_path):
    options = dataclasses.replace(STEPS, epochs=4, keep_last=2)
    straight = make_trainer(options, out=tmp_path / "run")
    straight.fit()
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best", "epoch-3", "epoch-4", "last"]
    assert len(checkpoint.read(folder / "epoch-3")["trainer"]["history"]) == 3
    resumed = make_trainer(options, out=tmp_path / "other", model=make_model(seed=5))
    resumed.fit(resume=folder / "epoch-3")
    assert_same_bits(bits(resumed.model), bits(straight.model))
    make_trainer(dataclasses.replace(options, epochs=5, keep_last=1), out=tmp_path / "run").fit(resume="last")
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last"]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_length_of_a_run_is_fixed_where_the_rate_depends_on_it(tmp_path, schedule):
    options = dataclasses.replace(STEPS, schedule=schedule)
    make_trainer(options, out=tmp_path).fit()
    with pytest.raises(CheckpointError, match="epochs was 2 and is now 3"):
        make_trainer(dataclasses.replace(options, epochs=3), out=tmp_path).fit(resume="last")


def test_what_changes_nothing_may_change(tmp_path):
    make_trainer(dataclasses.replace(STEPS, epochs=1), out=tmp_path).fit()
    other = dataclasses.replace(STEPS, prefetch=0, checkpoint_every=4, keep_last=3, patience=2, profile=True)
    resumed = make_trainer(other, out=tmp_path)
    resumed.fit(resume="last")
    straight = make_trainer(STEPS)
    straight.fit()
    assert_same_bits(bits(resumed.model), bits(straight.model))
    profile = json.loads((tmp_path / "profile.json").read_text())
    assert {"read", "step", "outer", "score", "metrics", "checkpoint", "other"} <= set(profile["sections"])
    assert sum(section["share"] for section in profile["sections"].values()) == pytest.approx(1.0)


def test_fusion_csv_has_a_row_for_each_step_of_the_fusion_weights_and_each_epoch(tmp_path):
    trainer = make_trainer(STEPS, out=tmp_path, model=make_model(fusion="per_pair"))
    trainer.fit()
    with (tmp_path / "fusion.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["epoch"], row["step"]) for row in rows] == [
        *(("1", step) for step in ("3", "5")),
        *(("2", step) for step in ("6", "9", "10")),
    ]
    assert {"alpha_domain/home/click", "beta_task/[b]odd/like"} <= set(rows[0])
    assert rows[0]["alpha_domain/home/click"] != rows[3]["alpha_domain/home/click"]


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    make_trainer(STEPS, out=tmp_path).fit()
    for name in ("last", "best"):
        file = tmp_path / "checkpoints" / name / "model.pt"
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged") as error:
        make_trainer(STEPS, out=tmp_path).fit(resume="last")
    assert "\n" not in str(error.value)


COMMAND = """\
import dataclasses, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_resume import STEPS
from tests.test_trainer import make_trainer, make_dataset
options = dataclasses.replace(STEPS, epochs=20, batch_size=50)
make_trainer(options, out=Path(sys.argv[2])).fit(resume="last")
"""


def last_written(out):
    times = []
    for name in ("last", "best"):
        with suppress(FileNotFoundError):
            times.append((out / "checkpoints" / name / "model.pt").stat().st_mtime)
    return max(times, default=0.0)


def test_kill_9_at_any_moment_loses_nothing(tmp_path, request):
    """The real signal, at moments that nobody chose: bench.kill does this to whole training commands."""
    call = [sys.executable, "-c", COMMAND, str(request.config.rootpath)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*call, str(tmp_path / "straight")], check=True, env=environment)
    out, killed = tmp_path / "killed", 0
    while killed < 2:
        process = subprocess.Popen([*call, str(out)], env=environment)
        newest = last_written(out)
        # Importing takes seconds: the interesting moments are those after something was written.
        while process.poll() is None:
            written = (
                max((path.stat().st_mtime for path in out.rglob("model.pt")), default=0.0) if out.exists() else 0.0
            )
            if written > newest:
                time.sleep(0.013 * (1 + 3 * killed))
                break
            time.sleep(0.005)
        process.kill()
        if process.wait() == 0:
            break
        killed += 1
    assert killed
    subprocess.run([*call, str(out)], check=True, env=environment)
    assert_same(left_by(out), left_by(tmp_path / "straight"))


def test_two_parts_that_differ_are_two_runs(tmp_path):
    make_trainer(STEPS, out=tmp_path).fit()
    with pytest.raises(CheckpointError, match="digest of the rows"):
        make_trainer(STEPS, out=tmp_path, dataset=make_dataset(identity="other")).fit(resume="last")
