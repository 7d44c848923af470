"""The command: from a run folder to a file of scores, and every way it can fail without leaving half a file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import m3oe_fast
from m3oe_fast import M3oE
from m3oe_fast.errors import CheckpointError, ConfigError, UserError
from m3oe_fast.predict import _Lines, main
from m3oe_fast.train import main as train
from m3oe_fast.training.console import make_console

from .small_run import SMALL, raw_rows, write_small_log

SOURCE = Path(m3oe_fast.__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("predict")
    log = write_small_log(place / "small", place / "cache")
    assert train([*log, *SMALL, "--epochs=1", f"--out={place / 'run'}"]) == 0
    return place / "run"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw_rows(300).to_parquet("in.parquet")


def line(run, *more):
    return ["--checkpoint", str(run), "--input", "in.parquet", "--output", "out.parquet", "--backend=reference", *more]


def test_scores_of_a_run_are_written(run, capsys):
    assert main(line(run, "--keep", "user_id,note")) == 0
    table = pq.read_table("out.parquet")
    assert table.column_names == ["user_id", "note", "score_click", "score_like"]
    expected = M3oE.load(run, backend="reference").score(raw_rows(300))
    assert np.stack([table["score_click"], table["score_like"]], 1).astype(np.float32).tobytes() == expected.tobytes()
    text = capsys.readouterr().out
    assert "backend   reference, fp32" in text
    assert text.splitlines()[-1].startswith("scored 300 rows in ") and text.endswith("rows/s, into out.parquet\n")


def test_keep_all_and_overwrite(run):
    assert main(line(run, "--keep=all")) == 0
    assert len(pq.read_table("out.parquet").column_names) == 7
    with pytest.raises(
        ConfigError, match=r"--output out\.parquet is there already; name another file, or add --overwr"
    ):
        main(line(run))
    assert len(pq.read_table("out.parquet").column_names) == 7
    assert main(line(run, "--overwrite")) == 0
    assert pq.read_table("out.parquet").column_names == ["score_click", "score_like"]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ("--checkpoint=", ConfigError, "checkpoint is missing; name it, for example --checkpoint runs/a"),
        ("--input=", ConfigError, "input is missing; name it, for example --input"),
        ("--output=", ConfigError, "output is missing; name it"),
        ("--output=out.csv", ConfigError, r"output must be a name that ends in \.parquet, got 'out\.csv'"),
        ("--output=in.parquet", ConfigError, "is there already"),
        ("--output=in.parquet/out.parquet", ConfigError, "cannot write --output in.parquet/out.parquet"),
        ("--batch_size=0", ConfigError, "batch_size must be an integer of at least 1, got 0"),
        ("--input=nowhere.parquet", UserError, r"nowhere\.parquet: no such file or folder"),
        ("--checkpoint=nowhere", CheckpointError, "no checkpoint at nowhere"),
        ("--keep=age,nope", UserError, r"in\.parquet: has no column nope"),
        ("--backend=cuda", UserError, "backend 'cuda' cannot run here"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_file(run, changed, error, message):
    with pytest.raises(error, match=message) as caught:
        main(line(run, changed))
    assert "\n" not in str(caught.value)
    assert [path.name for path in Path().iterdir()] == ["in.parquet"]


def test_the_input_is_never_the_output(run):
    os.link("in.parquet", "same.parquet")
    for name in ("in.parquet", "same.parquet"):
        with pytest.raises(ConfigError, match=f"--output {name} is one of the files to score; name another file"):
            main(line(run, "--overwrite", f"--output={name}"))
    assert len(pq.read_table("in.parquet")) == 300


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(run):
    Path("shut").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"cannot write --output shut/out\.parquet \(Permission denied\)"):
        main(line(run, "--output=shut/out.parquet"))


def test_lines_of_progress_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    lines = _Lines(make_console(), 5000)
    for now[0], rows in ((1.0, 1000), (11.0, 1000), (12.0, 1000), (22.0, 1000)):
        lines(rows)
    assert capsys.readouterr().out == (
        "scored 2,000 of 5,000 rows, 182 rows/s\nscored 4,000 of 5,000 rows, 182 rows/s\n"
    )


def run_command(argv, before=""):
    code = f"{before}\nimport runpy, sys\nsys.argv = ['predict', *{argv!r}]\n"
    code += "runpy.run_module('m3oe_fast.predict', run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_full_disk_is_one_line_and_leaves_no_file(run):
    raw_rows(30_000).to_parquet("in.parquet")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    process = run_command(line(run, "--keep=all", "--output=new/out.parquet"), limit)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err == "error: cannot write new/out.parquet: File too large\n"
    assert [path.name for path in Path().iterdir()] == ["in.parquet"]


def test_ctrl_c_leaves_no_file(run):
    raw_rows(100_000).to_parquet("in.parquet")
    process = run_command(line(run, "--batch_size=100"))
    # Scoring 1,000 batches leaves time enough.
    for text in process.stdout:
        if text.startswith("input"):
            break
    deadline = time.monotonic() + 60
    while not list(Path().glob(".out.parquet.*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (130, "interrupted\n")
    assert [path.name for path in Path().iterdir()] == ["in.parquet"]
