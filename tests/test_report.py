"""The command: a report of a small run, whole, interrupted or in pieces, and errors of one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from m3oe_fast.errors import CheckpointError, ConfigError, DataError
from m3oe_fast.report import COMMAND, main
from m3oe_fast.reporting import build
from m3oe_fast.train import main as train
from m3oe_fast.training import Trainer

from .small_run import SMALL, write_small_log

FIGURES = {"curves", "fusion", "gates", "calibration", "embeddings"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Options that name a small RecBole log with three domains by age and two tasks."""
    return write_small_log(tmp_path_factory.mktemp("log") / "small", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def finished(log, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs") / "finished"
    assert train([*log, *SMALL, "--epochs=2", f"--out={root}"]) == 0
    return root


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to change."""
    return shutil.copytree(finished, tmp_path / "run")


def figures(root):
    return {path.stem for path in (root / "report").iterdir()}


def text(root):
    return (root / "report.md").read_text()


def test_a_finished_run_has_every_figure_and_score(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main([str(run)]) == 0
    assert figures(run) == FIGURES
    for name in FIGURES:
        assert f"](report/{name}.png)" in text(run)
    test = json.loads((run / "metrics.json").read_text())["test"]["auc"]
    for name in ("mean", "25-34/click"):
        assert f"| {test[name]:.4f} |" in text(run)
    assert "## What is missing" not in text(run)
    assert "No figure: seesaw.json is missing" in text(run)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"written {run}/report.md")
    assert {path: path.read_bytes() for path in before} == before


def test_the_report_is_the_same_every_time(run):
    main([str(run), "--rows=60"])
    first = {path: path.read_bytes() for path in (*(run / "report").iterdir(), run / "report.md")}
    main([str(run), "--rows", "60"])
    assert {path: path.read_bytes() for path in first} == first
    assert "t-SNE of 60 test rows" in text(run)


def test_the_last_weights_on_demand(run):
    main([str(run), "--checkpoint=last", "--rows=20"])
    assert "those of the run's checkpoint last" in text(run)


def test_a_killed_run_is_reported_as_far_as_it_came(run, capsys):
    (run / "metrics.json").unlink()
    (run / "fusion.csv").unlink()
    shutil.rmtree(run / "checkpoints" / "best")
    assert main([str(run)]) == 0
    assert figures(run) == {"curves", "fusion"}
    assert "The run has not ended: 2 epochs so far" in text(run)
    assert text(run).count("No figure: the run has no checkpoint best yet.") == 3
    missing = text(run).split("## What is missing")[1]
    assert "metrics.json is missing" in missing and "fusion.csv is missing" in missing
    assert "note: the run has no checkpoint best yet" in capsys.readouterr().out


def test_a_log_that_is_gone_costs_only_its_figures(run, tmp_path):
    config = (run / "config.yaml").read_text().replace("small", "gone")
    (run / "config.yaml").write_text(config.replace("cache_dir: ", f"cache_dir: {tmp_path}/empty"))
    assert main([str(run)]) == 0
    assert figures(run) == {"curves", "fusion"}
    assert "gone" in text(run)
    assert "test AUC" in text(run)


def test_a_log_named_on_the_line_is_taken_and_must_be_there(run, log, tmp_path):
    config = (run / "config.yaml").read_text().replace("small", "gone")
    (run / "config.yaml").write_text(config)
    place = log[0].removeprefix("--data=")
    assert main([str(run), "--data", place, "--rows=20"]) == 0
    assert figures(run) == FIGURES
    with pytest.raises(DataError, match="nowhere"):
        main([str(run), f"--data=recbole:{tmp_path}/nowhere"])


def test_rows_of_another_split_are_refused(run):
    with pytest.raises(CheckpointError, match="the run divided its rows with split_seed 0, not 7; drop --split_seed"):
        main([str(run), "--split_seed=7"])
    with pytest.raises(CheckpointError, match=r"does not fit recbole:small.*: domains is"):
        main([str(run), "--domain_bins=20,40"])


def test_without_config_the_log_must_be_named(run, log):
    (run / "config.yaml").unlink()
    assert main([str(run)]) == 0
    assert "name the log with --data" in text(run)
    assert figures(run) == {"curves", "fusion"}
    assert main([str(run), *log, "--rows=20"]) == 0
    assert figures(run) == FIGURES


def test_a_damaged_checkpoint_is_a_note(run):
    (run / "checkpoints" / "best" / "model.pt").write_bytes(b"no checkpoint")
    assert main([str(run)]) == 0
    assert "is damaged" in text(run)
    with pytest.raises(ConfigError, match="--seesaw needs the run's model and data"):
        main([str(run), "--seesaw=true"])


def test_the_seesaw_is_trained_kept_and_drawn(run, capsys, monkeypatch):
    assert main([str(run), "--seesaw=true", "--rows=20"]) == 0
    assert figures(run) == FIGURES | {"seesaw"}
    content = json.loads((run / "seesaw.json").read_text())
    assert len(content["pairs"]) == 6 and content["gain"] + content["lose"] + content["equal"] == 6
    assert len(list((run / "baselines").iterdir())) == 6
    assert capsys.readouterr().out.count("baseline ") == 6
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self: pytest.fail("a baseline was trained again"))
    assert main([str(run), "--seesaw=true", "--rows=20"]) == 0
    assert json.loads((run / "seesaw.json").read_text()) == content
    assert main([str(run), "--rows=20"]) == 0
    assert "6 pairs gain" in text(run)


@pytest.mark.parametrize("options", [["--domain_bins=25"], ["--labels=click=rating>3"], ["--shared_experts=0"]])
def test_other_numbers_of_domains_tasks_and_experts(log, tmp_path, options):
    run = tmp_path / "run"
    name = options[0].partition("=")[0]
    given = [word for word in (*log, *SMALL) if not word.startswith(f"{name}=")]
    train([*given, *options, "--epochs=1", f"--out={run}"])
    assert main([str(run), "--rows=30"]) == 0
    nothing_gated = options == ["--shared_experts=0"]
    assert figures(run) == FIGURES - ({"gates"} if nothing_gated else set())
    assert ("(K = 0)" in text(run)) == nothing_gated


def test_one_domain_and_one_task(log, tmp_path):
    run = tmp_path / "run"
    given = [word for word in log if not word.startswith(("--domain", "--labels"))]
    train([*given, *SMALL, "--labels=click=rating>3", "--epochs=1", f"--out={run}"])
    assert main([str(run), "--rows=30", "--seesaw=true"]) == 0
    assert figures(run) == FIGURES | {"seesaw"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ([], "name the run folder"),
        (["nowhere"], "nowhere is no folder"),
        (["{run}", "--rows=0"], "rows must be from 1 to 20,000, got 0"),
        (["{run}", "--checkpoint=third"], "--checkpoint must be one of best, last"),
        (["{run}", "--row=3"], "unknown option --row; did you mean --rows?"),
    ],
)
def test_errors_are_one_line(finished, line, said):
    with pytest.raises(ConfigError, match=said) as caught:
        main([word.format(run=finished) for word in line])
    assert "\n" not in str(caught.value)
    assert not (finished / "report.md").exists()


def test_a_missing_package_stops_it_before_anything_else(run, monkeypatch):
    monkeypatch.setattr("m3oe_fast.reporting.style.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'm3oe_fast\[report\]'"):
        main([str(run)])
    assert not (run / "report.md").exists()


def test_the_command_ends_as_all_commands_do(tmp_path):
    script = [sys.executable, "-m", "m3oe_fast.report", str(tmp_path / "nowhere")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/nowhere is no folder; name the folder that m3oe_fast.train wrote\n"


def test_help_shows_the_defaults():
    options, _ = COMMAND.parse(["runs/a"])
    assert (options.run, options.checkpoint, options.rows, options.seesaw) == ("runs/a", "best", build.ROWS, False)
