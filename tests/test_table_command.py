"""The command `python -m m3oe_fast.table`: real runs, the same line again after anything, every wrong line.

`test_table.py` belongs to `m3oe_fast.data.table`.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import m3oe_fast
from m3oe_fast.comparison import workers
from m3oe_fast.errors import ConfigError, UserError
from m3oe_fast.table import main

from .small_run import SMALL, write_small_log

SOURCE = Path(m3oe_fast.__file__).parents[1]
FILES = ("table.md", "table.csv", "summary.csv", "table.png")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    log = write_small_log(tmp_path_factory.mktemp("log") / "small", tmp_path_factory.mktemp("cache"))
    return [*log, *SMALL, "--epochs=2", "--models=mmoe:mtl,m3oe", "--seeds=1", "--out=out"]


@pytest.fixture(scope="module")
def undisturbed(line, tmp_path_factory):
    """The folder of a table that nothing interrupted."""
    folder = tmp_path_factory.mktemp("table") / "out"
    assert main([*line, f"--out={folder}"]) == 0
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def no_run(*_, **__):
    raise AssertionError("a run was started")


def scores(folder="out"):
    return pd.read_csv(Path(folder) / "table.csv")


def test_a_table_of_real_runs(undisturbed):
    found = scores(undisturbed)
    runs = set(zip(found["model"], found["form"], found["seed"], strict=True))
    assert runs == {("mmoe", "mtl", 1), ("m3oe", "mdmt", 1)}
    means = found[(found["pair"] == "mean") & (found["metric"] == "auc") & (found["part"] == "test")]
    summary = pd.read_csv(undisturbed / "summary.csv").set_index("model")
    assert means[means["model"] == "mmoe"]["value"].mean() == pytest.approx(summary.loc["mmoe", "auc/mean"])
    assert summary.loc["m3oe", "seeds"] == 1 and summary.loc["mmoe", "parameters"] > 0
    assert summary.loc["mmoe", "backend"] == "reference"
    text = (undisturbed / "table.md").read_text()
    assert "| split | random, split seed 0 |" in text and "| train | 1,200 |" in text and "| MMoE | mtl |" in text
    assert (undisturbed / "table.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((undisturbed / "runs/mmoe-mtl/1/config.yaml").read_text())
    assert (config["seed"], config["form"], config["embed_dim"]) == (1, "mtl", 4) and "star_dim" not in config


def test_the_same_line_again_repeats_no_run(line, undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(workers.subprocess, "Popen", no_run)
    before = {name: (undisturbed / name).read_bytes() for name in FILES}
    assert main([*line, f"--out={undisturbed}"]) == 0
    assert {name: (undisturbed / name).read_bytes() for name in FILES} == before
    assert "run 1/" not in capsys.readouterr().out


def test_a_table_can_grow_and_show_less(line, undisturbed, capsys):
    shutil.copytree(undisturbed, "out")
    assert main([*line, "--models=m3oe,mlp"]) == 0
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("run ")]
    assert len(said) == 1 and said[0].startswith("run 2/2  mlp single  seed 1")
    assert set(scores()["model"]) == {"mlp", "m3oe"}


def test_killed_and_typed_again_a_table_is_the_same(line, undisturbed):
    command = [sys.executable, "-m", "m3oe_fast.table", *line, "--jobs=1"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = []
    for text in process.stdout:
        seen.append(text)
        if text.startswith("run 1/"):
            process.kill()
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, seen
    finished = {path: path.stat().st_mtime_ns for path in Path("out").glob("runs/*/*/metrics.json")}
    assert finished and not Path("out/table.md").exists()
    assert main(line) == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    pd.testing.assert_frame_equal(scores(), scores(undisturbed), check_exact=True)


def test_ctrl_c_ends_the_command_and_its_runs(line):
    command = [sys.executable, "-m", "m3oe_fast.table", *line, "--jobs=1", "--epochs=5000"]
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    log = Path("out/logs/mmoe-mtl-1.log")
    while not (log.exists() and "epoch 1/5000" in log.read_text()):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "", out + err
    assert "interrupted with 0 of 2 runs done; the same line goes on" in out
    assert "interrupted" in log.read_text() and workers._is_free(log)
    assert not Path("out/table.md").exists()


def test_a_rate_that_diverges_loses_and_is_told(line, capsys):
    rest = [word for word in line if not word.startswith("--lr=")]
    assert main([*rest, "--models=mmoe:mdmt", "--lrs=1e30,1e-2"]) == 1
    out = capsys.readouterr().out
    assert "failed: mmoe mdmt  seed 1  lr 1e+30: training diverged in epoch 1" in out
    text = Path("out/table.md").read_text()
    assert "| MMoE | mdmt | 0.01 | 2 |" in text and "- mmoe mdmt seed 1 lr 1e+30: training diverged" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split=user"], "holds a table with another split: it was 'random' and is now 'user'"),
        (["--split_seed=1"], "another split_seed: it was 0 and is now 1"),
        (["--epochs=3"], "another epochs"),
        (["--lr=0.5"], "another lr: it was 0.01 and is now 0.5"),
        (["--threads=2"], "another threads"),
        (["--labels=click=rating>2"], "another labels"),
        (["--data=demo", "--models=mlp"], "--domain_column describes recbole: logs"),
    ],
)
def test_one_folder_has_one_protocol(line, undisturbed, monkeypatch, words, message):
    monkeypatch.setattr(workers.subprocess, "Popen", no_run)
    before = {path: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=message) as error:
        main([*line, f"--out={undisturbed}", *words])
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in undisturbed.iterdir() if path.is_file()} == before


def test_a_run_folder_from_elsewhere_is_refused(line, undisturbed, monkeypatch):
    shutil.copytree(undisturbed, "out")
    config = Path("out/runs/m3oe-mdmt/1/config.yaml")
    config.write_text(config.read_text().replace("split_seed: 0", "split_seed: 7"))
    monkeypatch.setattr(workers.subprocess, "Popen", no_run)
    with pytest.raises(ConfigError, match="out/runs/m3oe-mdmt/1 is a run with another split_seed: it was 7"):
        main(line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out="], "name the table's folder with --out"),
        (["--models=mmo"], "models: 'mmo' does not exist"),
        (["--seeds=2022..2020"], "go backwards"),
        (["--lrs=1e-3,1e-2"], "lr and lrs are both named"),
        (["--jobs=0"], "jobs must be an integer of at least 1, got 0"),
        (["--threads=0"], "threads must be an integer of at least 1, got 0"),
        (["--epochs=0"], "epochs must be an integer of at least 1"),
        (["--seed=3"], "unknown option --seed; did you mean --seeds"),
        (["--model=mmoe"], "unknown option --model; did you mean --models"),
        (["--models=m2m", "--backend=cpu"], "m2m"),
        (["--data=recbole:nowhere"], "nowhere"),
        (["--out=file"], "cannot write to the run folder file"),
        (["--out=notes"], r"notes is no table folder: it holds a\.txt"),
        (["--out=run"], "run holds a training run"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(line, monkeypatch, words, message):
    monkeypatch.setattr(workers.subprocess, "Popen", no_run)
    Path("file").write_text("")
    for name in ("notes/a.txt", "run/config.yaml"):
        Path(name).parent.mkdir()
        Path(name).write_text("")
    before = sorted(map(str, Path().rglob("*")))
    with pytest.raises(UserError, match=message) as error:
        main([*line, *words])
    assert "\n" not in str(error.value)
    assert sorted(map(str, Path().rglob("*"))) == before


def test_help_tells_of_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for option in ("--out", "--models", "--seeds", "--lrs", "--threads", "--jobs", "--split", "--epochs", "--backend"):
        assert f"\n  {option} " in text
    assert "--seed " not in text and "--form " not in text and "Exit status 1" in text
