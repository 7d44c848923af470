"""Checkpoint files: whole or not at all, and one line for every way in which one can be wrong."""

import os
import subprocess
import sys

import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig, checkpoint
from m3oe_fast.errors import CheckpointError

CONFIG = M3oEConfig([5], 1, 2, 1, star_dim=4, hidden_dim=4, expert_dims=(4,), tower_dim=4)


@pytest.fixture
def saved(tmp_path):
    M3oE(CONFIG).save(tmp_path)
    return tmp_path / "model.pt"


def test_locates_run_folder_checkpoint_folder_and_file(tmp_path):
    best = tmp_path / "checkpoints" / "best"
    M3oE(CONFIG).save(best)
    for path in (tmp_path, best, best / "model.pt"):
        assert checkpoint.locate(path) == best / "model.pt"


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        M3oE.load(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 1, 100, -100])
def test_truncated(saved, keep):
    content = saved.read_bytes()
    saved.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint") as error:
        M3oE.load(saved)
    assert "\n" not in str(error.value) and str(saved) in str(error.value)


def test_text_file(saved):
    saved.write_text("hello")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        M3oE.load(saved)


def test_foreign_content(saved):
    torch.save({"state_dict": {}}, saved)
    with pytest.raises(CheckpointError, match=r"m3oe_fast\.interop"):
        M3oE.load(saved)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "config": Hostile()}, saved)
    with pytest.raises(CheckpointError):
        M3oE.load(saved)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("weights", [None, {"embedding": 3}, {}])
def test_weights_that_are_none(saved, weights):
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "weights": weights}, saved)
    with pytest.raises(CheckpointError):
        M3oE.load(saved)


def test_any_flipped_bytes_are_one_kind_of_error(saved):
    content = saved.read_bytes()
    refused = 0
    for place in range(0, len(content), max(1, len(content) // 150)):
        saved.write_bytes(content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :])
        try:
            M3oE.load(saved)  # some bytes do not matter
        except CheckpointError:
            refused += 1
    assert refused > 10


def test_foreign_vocabularies(saved):
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "encoder": {"words": []}}, saved)
    with pytest.raises(CheckpointError, match="vocabularies"):
        M3oE.load(saved)


def test_newer_format(saved):
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "format": 99}, saved)
    with pytest.raises(CheckpointError, match="format 99"):
        M3oE.load(saved)


def test_unknown_configuration_field(saved):
    content = torch.load(saved, weights_only=True)
    content["config"]["attention_heads"] = 8
    torch.save(content, saved)
    with pytest.raises(CheckpointError, match="attention_heads"):
        M3oE.load(saved)


def test_a_failed_write_leaves_the_old_file_and_no_scrap(saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.write(saved, {})
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["model.pt"]


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        M3oE(CONFIG).save(tmp_path / "taken")


def test_a_disk_that_fills_up_while_writing_is_named_as_such(tmp_path):
    """By a limit on the size of files, in a process of its own; the file before stays."""
    checkpoint.write(tmp_path / "model.pt", {"config": {}})
    before = (tmp_path / "model.pt").read_bytes()
    program = (
        "import resource, sys, torch; from pathlib import Path; from m3oe_fast import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.write(sys.argv[1], {'weights': torch.zeros(1_000_000)})\n"
        "except checkpoint.CheckpointError as error: print(error)\n"
    )
    call = [sys.executable, "-c", program, str(tmp_path / "model.pt")]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {tmp_path / 'model.pt'}: File too large\n"
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("before", [0, 1, 5])
def test_ctrl_c_while_writing_is_no_full_disk(tmp_path, monkeypatch, before):
    checkpoint.write(tmp_path / "model.pt", {"config": {}})
    old = (tmp_path / "model.pt").read_bytes()
    write, calls = checkpoint._Watched.write, []

    def interrupted(stream, data):
        calls.append(data)
        if len(calls) > before:
            raise KeyboardInterrupt
        return write(stream, data)

    monkeypatch.setattr(checkpoint._Watched, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "model.pt", {"weights": torch.zeros(10_000)})
    assert (tmp_path / "model.pt").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
