"""The run folder: whole files or none, one-line errors, no run overwritten."""

import csv
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch
import yaml

from m3oe_fast import checkpoint
from m3oe_fast.errors import ConfigError, UserError
from m3oe_fast.training.run_folder import RunFolder, reserve_default, root_of, write_text

NOON = datetime(2024, 5, 17, 12, 0, 0)


def test_check_leaves_nothing_behind(tmp_path):
    RunFolder(tmp_path / "runs" / "a").check(resuming=False)
    assert list(tmp_path.iterdir()) == []


def test_check_keeps_a_folder_that_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    RunFolder(tmp_path).check(resuming=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("trace", ["config.yaml", "metrics.csv", "metrics.json", "checkpoints/best/model.pt"])
def test_another_run_is_not_overwritten(tmp_path, trace):
    (tmp_path / trace).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / trace).write_text("")
    with pytest.raises(ConfigError, match=r"already holds a run.*--resume last"):
        RunFolder(tmp_path).check(resuming=False)
    RunFolder(tmp_path).check(resuming=True)


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the run folder .*file/a .*--out") as caught:
        RunFolder(tmp_path / "file" / "a").check(resuming=False)
    assert "\n" not in str(caught.value)


def test_folder_without_permission_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("m3oe_fast.training.run_folder.tempfile.mkstemp", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        RunFolder(tmp_path / "new").check(resuming=False)
    assert list(tmp_path.iterdir()) == []


def test_metrics_json_is_strict_and_read_back(tmp_path):
    run = RunFolder(tmp_path / "a")
    run.write_metrics({"auc": None, "best_epoch": 3})
    assert json.loads(run.metrics.read_text()) == {"auc": None, "best_epoch": 3}
    assert run.read_metrics() == {"auc": None, "best_epoch": 3}
    with pytest.raises(ValueError, match="JSON"):
        run.write_metrics({"auc": float("nan")})
    assert run.read_metrics() == {"auc": None, "best_epoch": 3}


def test_unreadable_metrics_json_counts_as_none(tmp_path):
    run = RunFolder(tmp_path)
    assert run.read_metrics() is None
    run.metrics.write_text('{"auc": ')
    assert run.read_metrics() is None


def test_history_has_a_row_per_epoch_and_empty_cells_for_undefined(tmp_path):
    run = RunFolder(tmp_path)
    rows = [{"epoch": 1, "val_auc/<25,odd/x": None}, {"epoch": 2, "val_auc/<25,odd/x": 0.5}]
    run.write_history(rows, [{"val": {"x": None}}, {"val": {"x": 0.5}}], [{"step": 3, "alpha": 0.7}])
    assert run.records.read_text() == '{"val": {"x": null}}\n{"val": {"x": 0.5}}\n'
    assert run.fusion.read_text() == "step,alpha\n3,0.7\n"
    with run.history.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [
        {"epoch": "1", "val_auc/<25,odd/x": ""},
        {"epoch": "2", "val_auc/<25,odd/x": "0.5"},
    ]


def test_config_is_plain_yaml(tmp_path):
    run = RunFolder(tmp_path)
    run.write_config({"lr": 1e-3, "expert_dims": [64], "labels": None})
    assert yaml.safe_load(run.config.read_text()) == {
        "lr": 1e-3,
        "expert_dims": [64],
        "labels": None,
    }


def test_failed_write_keeps_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.txt: No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_default_folder_names_the_log_and_no_two_runs_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reserve_default("demo", NOON) == Path("runs/demo-20240517-120000")
    assert reserve_default("recbole:/data/my logs/ml-100k/", NOON).name == "ml-100k-20240517-120000"
    assert reserve_default("demo", NOON) == Path("runs/demo-20240517-120000-2")
    assert reserve_default("demo", NOON) == Path("runs/demo-20240517-120000-3")
    assert len(list(Path("runs").iterdir())) == 4


def test_default_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the run folder runs/demo.*--out"):
        reserve_default("demo", NOON)


def test_empty_checkpoint_folders_are_no_run(tmp_path):
    run = RunFolder(tmp_path)
    run.checkpoint("best").mkdir(parents=True)
    assert not run.holds_run()
    run.check(resuming=False)


def refuse_everything(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_a_folder_closed_to_us_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("os.stat", refuse_everything)
    monkeypatch.setattr("os.mkdir", refuse_everything)
    with pytest.raises(ConfigError, match="Permission denied"):
        RunFolder(tmp_path / "closed" / "a").check(resuming=False)
    assert root_of(tmp_path / "closed" / "a") is None


def test_history_is_written_where_it_differs_and_left_alone_where_not(tmp_path):
    run = RunFolder(tmp_path)
    history = [{"epoch": 1}], [{"epoch": 1}], [{"step": 1}]
    run.write_history(*history)
    run.records.write_bytes(b"\xff\xfe")  # damaged
    before = {path: path.stat().st_mtime_ns for path in (run.history, run.fusion)}
    run.write_history(*history)
    assert run.records.read_text() == '{"epoch": 1}\n'
    assert {path: path.stat().st_mtime_ns for path in (run.history, run.fusion)} == before


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_epochs_are_kept_as_they_were(tmp_path, monkeypatch, links):
    run = RunFolder(tmp_path)
    last = run.checkpoint("last") / "model.pt"
    if not links:
        monkeypatch.setattr("os.link", refuse_everything)
    for epoch in (1, 2, 3, 4):
        checkpoint.write(last, {"epoch": epoch})
        run.keep_epoch(epoch, 2)
    kept = {path.name: torch.load(path / "model.pt")["epoch"] for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {"last": 4, "epoch-3": 3, "epoch-4": 4}
    (tmp_path / "checkpoints" / "epoch-of-mine").mkdir()
    run.keep_epoch(4, 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch-of-mine", "last"]


def test_a_disk_without_room_for_one_more_epoch_is_one_line(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    checkpoint.write(run.checkpoint("last") / "model.pt", {})
    monkeypatch.setattr("os.link", refuse_everything)
    monkeypatch.setattr("shutil.copyfile", refuse_everything)
    with pytest.raises(UserError, match=r"cannot write .*epoch-1.*Permission denied"):
        run.keep_epoch(1, 2)


def test_root_of_a_run_or_its_checkpoint(tmp_path):
    run = RunFolder(tmp_path / "a")
    file = run.checkpoint("last") / "model.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert root_of(run.root) == root_of(file.parent) == root_of(file) == run.root
    elsewhere = tmp_path / "model.pt"
    elsewhere.write_bytes(b"")
    assert root_of(elsewhere) is None
