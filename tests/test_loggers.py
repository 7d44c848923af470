"""TensorBoard and Weights & Biases: every step once, over a resume, and nothing leaves the machine unasked."""

import json
import struct
import subprocess
import sys
from collections import Counter

import pytest

from m3oe_fast.errors import ConfigError
from m3oe_fast.training import loggers
from m3oe_fast.training.loggers import make_loggers, parse_names, scalars


def record(epoch):
    """As ``Epoch.to_record()``."""
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "lr": 1e-3,
        "train_loss": 1 / epoch,
        "samples": 100,
        "seconds": 2.0,
        "cpu_seconds": 2.0,
        "validation_seconds": 0.5,
        "samples_per_second": 50.0,
        "val": {
            "auc": {"mean": 0.7, "<25/click": 0.7, ">25/click": None},
            "overall": {"auc": {"click": 0.6}},
            "reasons": {">25/click": "no labelled rows"},
        },
        "fusion": {"alpha_domain": 0.7},
    }


def fusion(step):
    return {"alpha_domain": 0.5 + step / 1000, "beta_task/like": 0.7}


def run(root, names, first, last, resumed_step=0):
    """Log epochs of 10 steps with an outer step every 5, as the trainer does: twice at the end of an epoch."""
    opened = make_loggers(names, root, resumed_step)
    for epoch in range(first, last + 1):
        for logger in opened:
            for step in (10 * epoch - 5, 10 * epoch, 10 * epoch):
                logger.outer(step, fusion(step))
            logger.epoch(record(epoch), 10 * epoch)
    return opened


def close(opened):
    for logger in opened:
        logger.close()


def test_scalars_are_flat_and_leave_out_what_is_undefined():
    assert scalars(record(2)) == {
        "train/loss": 0.5,
        "train/lr": 1e-3,
        "train/rows_per_second": 50.0,
        "train/seconds": 2.0,
        "train/validation_seconds": 0.5,
        "val/auc/mean": 0.7,
        "val/auc/<25/click": 0.7,
        "val/overall/auc/click": 0.6,
    }
    assert scalars({"train_loss": float("nan"), "lr": True, "val": None}) == {}


def test_names_are_checked_before_anything_is_opened(tmp_path):
    assert parse_names("") == ()
    assert parse_names(" wandb , tensorboard,wandb,") == ("wandb", "tensorboard")
    with pytest.raises(ConfigError, match=r"logger 'tensorbord' does not exist; choose of tensorboard, wandb"):
        make_loggers("tensorboard,tensorbord", tmp_path / "run", 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"logger {name} .* pip install 'm3oe_fast\[{name}\]'") as caught:
        make_loggers(name, tmp_path, 0)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# TensorBoard ----------------------------------------------------------------------------------------------------------


def events(root):
    """Scalars by tag: (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(root / "tensorboard"))
    read.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_holds_every_step_once_over_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    run(tmp_path, "tensorboard", 1, 3)  # killed: never closed; its last checkpoint is that of epoch 2
    close(run(tmp_path, "tensorboard", 3, 4, resumed_step=20))
    found = events(tmp_path)
    assert found["train/loss"] == [(10, 1.0), (20, 0.5), (30, 0.3333), (40, 0.25)]
    assert [step for step, _ in found["fusion/alpha_domain"]] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert found["fusion/beta_task/like"][0] == (5, 0.7)
    assert "val/auc/<25/click" in found
    assert ">25" not in "".join(found)


def test_a_run_that_starts_afresh_leaves_nothing_of_the_attempt_before(tmp_path):
    pytest.importorskip("tensorboard")
    first = make_loggers("tensorboard", tmp_path, 0)[0]
    first.outer(0, {"alpha_domain": 0.1})  # killed before its first checkpoint
    second = make_loggers("tensorboard", tmp_path, 0)[0]
    second.outer(0, {"alpha_domain": 0.2})
    second.outer(5, {"alpha_domain": 0.3})
    second.close()
    assert events(tmp_path)["fusion/alpha_domain"] == [(0, 0.2), (5, 0.3)]


# Weights & Biases -----------------------------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)


def logged(root):
    """The rows of every Weights & Biases session in the folder, in order of time."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted((root / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for data in stored(file.read_bytes()):
            content = wandb_internal_pb2.Record()
            content.ParseFromString(data)
            if content.WhichOneof("record_type") == "history":
                items = content.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def stored(data):
    """The records of LevelDB's log format behind 7 bytes of magic: blocks of 32 KB, no header across their border."""
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # all of a record, or its last piece
            yield whole
            whole = b""


def test_wandb_stays_offline_and_a_resumed_run_keeps_its_id(tmp_path, offline, capfd):
    (tmp_path / "config.yaml").write_text("lr: 0.001\n")
    close(run(tmp_path, "wandb", 1, 1))
    name = (tmp_path / "wandb" / "run-id").read_text().strip()
    close(run(tmp_path, "wandb", 2, 2, resumed_step=10))
    assert {path.stem for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb")} == {f"run-{name}"}
    rows = logged(tmp_path)
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert losses == {10: 1.0, 20: 0.5}
    steps = Counter(row["step"] for row in rows if "fusion/alpha_domain" in row)
    assert steps == {5: 1, 10: 1, 15: 1, 20: 1}
    assert [path.name for path in tmp_path.iterdir() if path.name != "wandb"] == ["config.yaml"]
    assert capfd.readouterr().out == ""


def test_a_new_run_in_the_folder_has_an_id_of_its_own(tmp_path, offline):
    folder = tmp_path / "wandb"
    folder.mkdir()
    first = loggers._run_id(folder, 0)
    assert loggers._run_id(folder, 5) == first
    assert loggers._run_id(folder, 0) != first
    (folder / loggers.RUN_ID).write_text("\n")
    assert loggers._run_id(folder, 5) != ""


@pytest.mark.parametrize(
    ("environment", "mode"),
    [({}, "offline"), ({"WANDB_API_KEY": "k" * 40}, "online"), ({"WANDB_MODE": "offline"}, None)],
)
def test_only_the_user_turns_uploads_on(monkeypatch, offline, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loggers._mode(None) == mode


def test_without_a_key_nobody_is_asked_to_log_in(tmp_path):
    pytest.importorskip("wandb")
    script = (
        f"from m3oe_fast.training.loggers import make_loggers\nmake_loggers('wandb', {str(tmp_path / 'run')!r}, 0)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "WANDB_MODE": "online"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, input="", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "no key to log in with; set WANDB_API_KEY or WANDB_MODE=offline" in done.stderr
