"""The command: the same scores as the run itself, what does not fit is refused, strict JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import m3oe_fast
from m3oe_fast import M3oE, M3oEConfig
from m3oe_fast.errors import CheckpointError, ConfigError, DataError
from m3oe_fast.evaluate import main
from m3oe_fast.train import main as train

from .small_run import SMALL, write_small_log

SOURCE = Path(m3oe_fast.__file__).parents[1]
REFERENCE = ["--backend=reference"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of two epochs."""
    place = tmp_path_factory.mktemp("evaluate")
    log = write_small_log(place / "small", place / "cache")
    assert train([*log, *SMALL, "--epochs=2", f"--out={place / 'run'}"]) == 0
    return place / "run"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("part", ["val", "test"])
def test_scores_are_those_of_the_run(run, part, capsys):
    assert main(["--checkpoint", str(run), "--part", part, "--json", "new/s.json", *REFERENCE]) == 0
    text = capsys.readouterr().out
    found = json.loads(Path("new/s.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    theirs = json.loads((run / "metrics.json").read_text())
    for metric, values in theirs[part].items():
        assert found[metric] == values
    assert found["data"]["part"] == part and found["data"]["rows"] == theirs["data"]["rows"][part]
    assert (found["backend"], found["precision"], found["checkpoint"]) == ("reference", "fp32", str(run))
    row = next(line for line in text.splitlines() if line.startswith("| 25-34") and "like" in line)
    assert f"{found['auc']['25-34/like']:.4f}" in row and "val AUC" not in text
    assert "written   new/s.json" in text


def test_any_checkpoint_of_the_run_knows_its_log(run, capsys):
    for path in ("checkpoints/last", "checkpoints/last/model.pt"):
        assert main(["--checkpoint", str(run / path), "--part=train", *REFERENCE]) == 0
        assert "rows      train, 1,200" in capsys.readouterr().out
    assert list(Path().iterdir()) == []


def test_a_checkpoint_without_a_run_needs_the_log(run, tmp_path, capsys):
    M3oE.load(run, backend="reference").save(tmp_path / "moved")
    with pytest.raises(ConfigError, match=r"moved lies in no run folder with a config\.yaml.*name it with --data"):
        main(["--checkpoint=moved"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    named = [f"--{name}={config[name]}" for name in ("data", "domain_column", "domain_bins", "labels", "cache_dir")]
    assert main(["--checkpoint=moved", *named, *REFERENCE]) == 0
    assert "| mean" in capsys.readouterr().out


def test_another_division_of_the_rows_is_refused_or_said(run, capsys):
    try:
        main(["--checkpoint", str(run), "--split=official", *REFERENCE])
    except CheckpointError as error:
        assert "does not fit" in str(error)
    else:
        assert "warning: the run divided its rows otherwise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            "--labels=click=rating>3",
            r"does not fit .*: tasks is \['click', 'like'\] in the model and \['click'\]",
        ),
        ("--domain_bins=30", r"vocab_sizes is .* in the model and .* in the data"),
        ("--labels=click=rating>2,like=rating>4", "label_rules is .* in the model"),
        ("--data=demo", "fields is .* in the model"),
    ],
)
def test_another_log_is_named_by_what_differs(run, changed, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        main(["--checkpoint", str(run), changed, "--cache_dir=cache", *REFERENCE, "--json=s.json"])
    assert "\n" not in str(caught.value)
    assert not Path("s.json").exists()


def test_other_vocabularies_of_the_same_size_are_another_log(run, tmp_path):
    model = M3oE.load(run, backend="reference")
    ids = model.encoder.vocabularies["item_id"]
    model.encoder.vocabularies["item_id"] = tuple(reversed(ids))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text((run / "config.yaml").read_text())
    model.save(tmp_path / "run" / "checkpoints" / "best")
    with pytest.raises(CheckpointError, match=r"vocabularies: item_id has .* not the same ones"):
        main(["--checkpoint=run", *REFERENCE])


def test_a_model_without_vocabularies_is_refused(run, tmp_path):
    M3oE(M3oEConfig((3,), 0, 1, 1, star_dim=2, hidden_dim=2), backend="reference").save(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="bare holds no vocabularies"):
        main(["--checkpoint=bare", "--data=demo", "--cache_dir=cache", *REFERENCE])


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ([], ConfigError, "name the model with --checkpoint"),
        (["--checkpoint=nowhere"], CheckpointError, "no checkpoint at nowhere"),
        (["--checkpoint=RUN", "--part=all"], ConfigError, "--part must be one of train, val, test, got all"),
        (["--checkpoint=RUN", "--json="], ConfigError, "json must name a file"),
        (["--checkpoint=RUN", "--json=RUN"], ConfigError, "is a folder; name a file"),
        (["--checkpoint=RUN", "--json=RUN/config.yaml/s"], ConfigError, "cannot write --json"),
        (["--checkpoint=RUN", "--backend=cuda"], Exception, "backend 'cuda' cannot run here"),
        (["--checkpoint=RUN", "--lr=1"], ConfigError, "unknown option --lr"),
        (["--checkpoint=RUN", "--data=recbole:nowhere"], DataError, "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_no_file(run, argv, error, message):
    with pytest.raises(error, match=message) as caught:
        main([word.replace("RUN", str(run)) for word in argv])
    assert "\n" not in str(caught.value)
    assert list(Path().iterdir()) == []


def test_the_command_exits_2_on_a_damaged_checkpoint(run):
    Path("model.pt").write_bytes((run / "checkpoints/best/model.pt").read_bytes()[:500])
    command = [sys.executable, "-m", "m3oe_fast.evaluate", "--checkpoint=model.pt", "--data=demo"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: model.pt is damaged") and done.stderr.count("\n") == 1
