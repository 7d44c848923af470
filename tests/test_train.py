"""The command: options, one-line errors, and whole runs on a small RecBole log."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml

import m3oe_fast
from m3oe_fast import M3oE, M3oEConfig, backends
from m3oe_fast.data import Schema
from m3oe_fast.errors import CheckpointError, ConfigError, UserError
from m3oe_fast.prepare import main as prepare
from m3oe_fast.train import _describe, main, parse
from m3oe_fast.training.device import choose_device

from .small_run import SMALL, write_small_log

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
SOURCE = Path(m3oe_fast.__file__).parents[1]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """Options that name a small RecBole log with three domains by age and two tasks."""
    return write_small_log(tmp_path_factory.mktemp("log") / "small", tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, so that what a run leaves behind is seen."""
    monkeypatch.chdir(tmp_path)


# Options -----------------------------------------------------------------------------------------


def test_defaults_are_the_documented_line():
    options = parse([])
    train, run, data, model = options.train, options.run, options.data, options.model
    assert (data.data, data.split, data.split_seed) == ("demo", "random", 0)
    assert (train.epochs, train.batch_size, train.lr, train.fusion_lr) == (10, 4096, 1e-3, 1e-3)
    assert (train.seed, train.weight_decay, train.patience) == (2022, 1e-5, 3)
    assert (train.bilevel, train.outer_every, train.optimizer) == ("alternating", 20, "adam")
    assert (train.embedding_optimizer, train.embedding_lr) == ("same", None)
    assert (run.device, run.backend, run.precision) == ("auto", "auto", "fp32")
    assert (run.out, run.resume, train.cuda_graph) == (None, None, "auto")
    config = model.config(Schema(("user", "domain"), (7, 8), ("age",), ("a", "b", "c"), ("click", "like")))
    assert (config.num_dense, config.num_domains, config.num_tasks) == (1, 3, 2)
    assert (config.shared_experts, config.embed_dim, config.expert_dims) == (4, 16, (64,))
    assert (config.star_dim, config.hidden_dim, config.tower_dim) == (512, 256, 64)
    assert (model.model, config.fusion_init, config.init) == ("m3oe", 1.0, "published")


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_names_of_the_published_code_work(form):
    given = {
        "--epoch": "3",
        "--learning_rate": "0.01",
        "--learning_rate_darts": "0.02",
        "--expert_num": "1",
        "--dataset_path": "somewhere",
        "--model_name": "m3oe",
        "--save_dir": "runs/x",
    }
    options = parse(" ".join(form.format(name, value) for name, value in given.items()).split())
    assert (options.train.epochs, options.train.lr, options.train.fusion_lr) == (3, 0.01, 0.02)
    assert (options.model.shared_experts, options.model.model) == (1, "m3oe")
    assert (options.data.data_path, options.run.out) == ("somewhere", "runs/x")


def test_the_line_wins_over_yaml():
    Path("c.yaml").write_text("epochs: 4\nlr: 1e-4\nexpert_dims: [32, 16]\ngate_detach: false\n")
    options = parse(["--config", "c.yaml", "--lr", "0.5"])
    assert (options.train.epochs, options.train.lr) == (4, 0.5)
    assert (options.model.expert_dims, options.model.gate_detach) == ((32, 16), False)


@pytest.mark.parametrize(
    "line",
    [
        "--lr 0.5 --epochs 7 --config c.yaml",
        "--lr=0.5 --config=c.yaml --epochs=7",
        "--learning_rate 0.5 --config d.yaml --epoch 7 --config c.yaml",
    ],
)
def test_the_line_wins_wherever_config_stands(line):
    Path("c.yaml").write_text("epochs: 4\nlr: 1e-4\nseed: 5\n")
    Path("d.yaml").write_text("seed: 6\nbatch_size: 9\n")
    train = parse(line.split()).train
    assert (train.epochs, train.lr, train.seed) == (7, 0.5, 5)
    assert train.batch_size == (9 if "d.yaml" in line else 4096)


def test_names_of_the_published_code_work_in_yaml():
    Path("c.yaml").write_text("epoch: 4\nlearning_rate_darts: 0.25\nexpert_num: 3\nlr: 0.5\n")
    options = parse(["--config", "c.yaml", "--epochs", "6"])
    assert (options.train.epochs, options.train.fusion_lr, options.train.lr) == (6, 0.25, 0.5)
    assert options.model.shared_experts == 3


@pytest.mark.parametrize(("text", "widths"), [("64", (64,)), ("128,64", (128, 64)), ("[8,4]", (8, 4))])
def test_expert_dims_are_widths(text, widths):
    assert parse(["--expert_dims", text]).model.expert_dims == widths


@pytest.mark.parametrize(("bare", "word"), [("on", "on"), ("off", "off"), ("'off'", "off"), ("auto", "auto")])
def test_on_and_off_need_no_quotes_in_yaml(bare, word):
    Path("c.yaml").write_text(f"bilevel: off\ncuda_graph: {bare}\n")
    options = parse(["--config=c.yaml"]).train
    assert (options.bilevel, options.cuda_graph) == ("off", word)


def test_print_config_shows_resolved_options_that_config_reads_back(capsys):
    Path("c.yaml").write_text("epochs: 4\n")
    with pytest.raises(SystemExit) as done:
        main(["--config", "c.yaml", "--learning_rate", "0.5", "--print_config"])
    assert done.value.code in (0, None)
    text = capsys.readouterr().out
    shown = yaml.safe_load(text)
    assert (shown["epochs"], shown["lr"], shown["data"], shown["fusion"]) == (
        4,
        0.5,
        "demo",
        "scalar",
    )
    Path("d.yaml").write_text(text)
    assert parse(["--config", "d.yaml"]) == parse(["--epochs", "4", "--lr", "0.5"])


def test_help_names_every_option_with_its_default_and_no_python(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for words in (
        "--batch_size",
        "(default: 4096)",
        "--resume",
        "--learning_rate_darts         = --fusion_lr",
        "--gradient_accumulation_steps = --accumulate",
        "exit status: 0 done, 2 wrong input",
        "--device {auto,cpu,cuda}",
        "--cuda_graph {auto,on,off}",
    ):
        assert words in text
    for heading in ("data:", "model:", "training:", "run:"):
        assert f"\n{heading}\n" in text
    for word in ("Literal", "<class", "Optional", "NoneType"):
        assert word not in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--learning_rat 3", "unknown option --learning_rat; did you mean --lr"),
        ("--xyz=3", "unknown option --xyz; see --help"),
        ("--ep 3", "unknown option --ep; did you mean --epochs"),
        ("stray", "'stray' belongs to no option"),
        ("-e 3", "unknown option -e; see --help"),
        ("--epochs", "--epochs must be followed by a whole number"),
        ("--lr --epochs 3", "--lr must be followed by a number"),
        ("--profile maybe", "--profile must be true or false, got maybe"),
        ("--epochs x", "--epochs must be a whole number, got x"),
        ("--epochs 2.5", "--epochs must be a whole number, got 2.5"),
        ("--lr high", "--lr must be a number, got high"),
        ("--embedding_lr high", "--embedding_lr must be a number, got high"),
        ("--embedding_lr 0.1", r"embedding_lr must be left out with embedding_optimizer same, got 0\.1"),
        (
            "--embedding_optimizer sgd",
            "--embedding_optimizer must be one of same, lazy_adam, row_adagrad, got sgd",
        ),
        ("--device gpu", "--device must be one of auto, cpu, cuda, got gpu"),
        ("--cuda_graph maybe", "--cuda_graph must be one of auto, on, off, got maybe"),
        ("--gate_detach maybe", "--gate_detach must be true or false"),
        ("--split half", "--split must be one of random, temporal, user, official, got half"),
        ("--epochs -1", "epochs must be .* got -1"),
        ("--batch_size 0", "batch_size must be"),
        ("--lr 0", "lr must be above 0"),
        ("--model pile", "model 'pile' does not exist; there is mlp, shared_bottom, mmoe, ple"),
        ("--form mtml", "--form must be one of mdmt, mdl, mtl, single, got mtml"),
        ("--model mlp --form mdl", "form 'mdl' does not exist for model mlp; there is single"),
        ("--model mmoe --star_dim 64", "star_dim is no option of model mmoe; it has embed_dim, expert_dims"),
        ("--expert_dims wide", "expert_dims must be widths"),
        ("--config nowhere.yaml", r"config file nowhere\.yaml: No such file"),
        ("--lr 1 --config", "--config must be followed by"),
        ("--out=", "out must name a folder"),
        ("--resume=", "resume must name a folder"),
        ("--config .", r"config file \.: Is a directory"),
    ],
)
def test_wrong_option_is_one_line(argv, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(argv.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"learning_rat: 3\n", "unknown option learning_rat; did you mean lr"),
        (b"learning_rate: 3\nlr: 2\n", "lr is there twice"),
        (b"cuda_graph: 1\n", "--cuda_graph must be one of auto, on, off, got 1"),
        (b"config: other.yaml\n", "config works on the line only"),
        (b"epochs: many\n", "--epochs must be a whole number, got many"),
        (b"out: 3\n", "--out must be text .* got 3"),
        (b"expert_dims: [a]\n", "--expert_dims must be a whole number or a list"),
        (b"epochs: [3\nlr", "while parsing"),
        (b"epochs\n", "holds no options"),
        (b"", "holds no options"),
        (b"\xff\xfe\x00", "can't decode"),
    ],
)
def test_wrong_yaml_is_one_line_that_names_the_file(content, message):
    Path("c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config file c\.yaml: .*{message}") as caught:
        parse(["--config", "c.yaml"])
    assert "\n" not in str(caught.value)


# Before any work ---------------------------------------------------------------------------------


@pytest.fixture
def no_data(monkeypatch):
    """Fails the test if the command goes as far as opening a log."""
    monkeypatch.setattr("m3oe_fast.train.load_options", lambda options: pytest.fail("opened the log"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--out file/a", "cannot write to the run folder file/a"),
        ("--out full", "full already holds a run"),
        ("--backend cuda", "backend 'cuda' cannot run here"),
        ("--hidden_dim 0", "hidden_dim must be"),
        ("--cuda_graph on --device cpu", "cuda_graph on is impossible here: the model is on cpu"),
        pytest.param("--device cuda", "device cuda cannot be used here: torch", marks=without_gpu),
    ],
)
def test_refused_before_any_work_and_without_a_trace(no_data, argv, message):
    Path("file").write_text("")
    Path("full").mkdir()
    Path("full/config.yaml").write_text("epochs: 1\n")
    before = sorted(Path().rglob("*"))
    with pytest.raises(UserError, match=message):
        main(argv.split())
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("built", "found", "reason"), [(False, False, "is built without CUDA"), (True, False, "torch sees no GPU")]
)
def test_cuda_without_a_gpu_says_why(monkeypatch, built, found, reason):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    with pytest.raises(ConfigError, match=f"device cuda cannot be used here: .*{reason}$"):
        choose_device("cuda", "auto", "fp32")
    assert choose_device("auto", "auto", "fp32").type == choose_device("cpu", "auto", "fp32").type == "cpu"


@pytest.mark.parametrize(
    ("device", "backend", "refused", "chosen"),
    [
        ("auto", "auto", [], "cuda"),
        ("auto", "triton", [], "cuda"),
        ("auto", "auto", ["Triton is not installed"], "cpu"),
        ("auto", "triton", ["Triton is not installed"], "cpu"),
        ("auto", "cpu", [], "cpu"),
        ("auto", "reference", [], "cpu"),
        ("cpu", "auto", [], "cpu"),
        ("cuda", "reference", ["Triton is not installed"], "cuda"),
    ],
)
def test_auto_takes_the_gpu_where_triton_can_use_it(monkeypatch, device, backend, refused, chosen):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "reasons_against", lambda *_: refused)
    assert choose_device(device, backend, "fp32").type == chosen


def test_wrong_data_leaves_no_run_folder(log):
    with pytest.raises(UserError):
        main(["--data=recbole:nowhere", "--out=runs/a"])
    assert not Path("runs").exists()


# Whole runs --------------------------------------------------------------------------------------


def test_a_run_from_start_to_serving(log, capsys):
    assert main([*log, *SMALL, "--epochs=3", "--out=runs/a"]) == 0
    text = capsys.readouterr().out
    metrics = json.loads(Path("runs/a/metrics.json").read_text())
    assert sorted(path.name for path in Path("runs/a").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "fusion.csv",
        "metrics.csv",
        "metrics.json",
        "metrics.jsonl",
    ]
    assert metrics["data"]["domains"] == ["<25", "25-34", ">=35"]
    assert metrics["backend"] == "reference"
    assert metrics["train"]["epochs"] == 3
    for words in (
        "split random",
        "parameters",
        "reference",
        "fp32",
        "threads",
        "runs/a",
        "epoch 3/3",
    ):
        assert words in text
    row = next(line for line in text.splitlines() if line.startswith("| 25-34") and "like" in line)
    assert f"{metrics['test']['auc']['25-34/like']:.4f}" in row
    model = M3oE.load("runs/a", backend="reference")
    frame = pd.DataFrame({"user_id": [1, 999], "item_id": ["3", "x"], "age": [20.0, 40.0], "timestamp": [5.0, 6.0]})
    scores = model.score(frame)
    assert scores.shape == (2, 2)
    assert ((scores > 0) & (scores < 1)).all()


def test_config_yaml_repeats_the_run(log):
    main([*log, *SMALL, "--epochs=2", "--out=runs/a"])
    assert main(["--config=runs/a/config.yaml", "--out=runs/b"]) == 0
    one, other = (json.loads(Path(f"runs/{name}/metrics.json").read_text()) for name in "ab")
    assert one["test"] == other["test"]
    configs = [yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text()) for name in "ab"]
    assert configs[0] | {"out": "runs/b"} == configs[1]


def test_files_tell_the_split_of_a_prepared_log(log):
    assert prepare([*log, "--split=user", "--split_seed=4", "--out=prepared"]) == 0
    # Neither is typed here: the rows were divided when they were prepared.
    main(["--data=prepared:prepared", *SMALL, "--epochs=1", "--out=runs/a"])
    written = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert (written["split"], written["split_seed"]) == ("user", 4)
    data = json.loads(Path("runs/a/metrics.json").read_text())["data"]
    assert data["split"] == "user"
    assert main(["--config=runs/a/config.yaml", "--out=runs/b"]) == 0


def test_start_says_how_many_outer_steps_there_are_at_most(log, capsys):
    main([*log, *SMALL, "--epochs=2", "--out=runs/a"])
    assert "an outer step every 3 steps, at most 6, lr 0.001" in capsys.readouterr().out
    main([*log, *SMALL, "--epochs=2", "--outer_every=500", "--out=runs/b"])
    assert "warning: no outer step will be done" in capsys.readouterr().out


def test_start_names_the_optimizer_of_the_table_and_config_yaml_keeps_it(log, capsys):
    own = ["--embedding_optimizer=row_adagrad", "--embedding_lr=0.02"]
    main([*log, *SMALL, *own, "--epochs=1", "--out=runs/a"])
    assert "seed 2022; embedding: row_adagrad, lr 0.02, only the rows in the batch; fusion" in capsys.readouterr().out
    main(["--config=runs/a/config.yaml", "--out=runs/b"])
    for name in "ab":
        written = yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text())
        assert (written["embedding_optimizer"], written["embedding_lr"]) == ("row_adagrad", 0.02)
    capsys.readouterr()
    main([*log, *SMALL, "--epochs=1", "--out=runs/c"])
    assert "embedding:" not in capsys.readouterr().out
    assert yaml.safe_load(Path("runs/c/config.yaml").read_text())["embedding_lr"] is None


@pytest.mark.parametrize(
    ("asked", "computed", "words"),
    [
        ("fp32", "fp32", "avx512, fp32, "),
        ("bf16x3", "fp32", "avx512, bf16x3 (computed in fp32 here), "),
        ("bf16", "bf16", "avx512, bf16, "),
    ],
)
def test_start_says_what_the_products_are_computed_in(asked, computed, words):
    weights = [torch.zeros(3)]
    model = SimpleNamespace(
        backend_name="cpu",
        isa_name="avx512",
        precision=asked,
        compute_precision=computed,
        parameters=lambda: iter(weights),
        config=SimpleNamespace(bag_vocab_sizes=(), name="m3oe"),
        multiply_adds=lambda: 5,
        fusion_parameters=lambda: weights,
    )
    (line,) = [
        line for line in _describe(SimpleNamespace(model=model, outer_steps=1), parse([])) if line.startswith("backend")
    ]
    assert line.startswith(f"backend   cpu, instruction set {words}")


@pytest.mark.parametrize(("choice", "words"), [("auto", "seed 2022, steps as CUDA graphs;"), ("off", "seed 2022;")])
def test_start_names_the_gpu_and_says_whether_there_are_graphs(monkeypatch, choice, words):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU of {device}")
    weight = SimpleNamespace(device=torch.device("cuda:0"), numel=lambda: 3)
    model = SimpleNamespace(
        backend_name="triton",
        isa_name=None,
        precision="tf32",
        compute_precision="tf32",
        parameters=lambda: iter([weight]),
        config=SimpleNamespace(bag_vocab_sizes=(), name="m3oe"),
        multiply_adds=lambda: 5,
        fusion_parameters=lambda: [weight],
    )
    trainer = SimpleNamespace(model=model, outer_steps=1)
    _, backend, training = _describe(trainer, parse([f"--cuda_graph={choice}"]))
    assert backend == "backend   triton, tf32, GPU of cuda:0"
    assert words in training


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--bilevel=off", "fusion weights: fixed"),
        ("--bilevel=joint --fusion_lr=0.5", "fusion weights: with the network, lr 0.5"),
        ("--bilevel=published", "fusion weights: one outer step an epoch, at most 7, lr 0.001"),
        ("--bilevel=implicit", "fusion weights: implicit, an outer step every 20 steps, at most 7, lr 0.001"),
        ("--accumulate=4 --schedule=cosine", "batch 4,096 x 4, adam, lr 0.001 (cosine), seed"),
    ],
)
def test_start_says_how_it_trains(line, words):
    model = M3oE(M3oEConfig((3,), 0, 1, 1, star_dim=2, hidden_dim=2), backend="reference")
    assert words in _describe(SimpleNamespace(model=model, outer_steps=7), parse(line.split()))[-1]


def test_ctrl_c_in_the_first_epoch_prints_no_table(log, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("m3oe_fast.training.trainer.Trainer._train_epoch", interrupt)
    assert main([*log, *SMALL, "--out=runs/a"]) == 130
    text = capsys.readouterr().out
    assert "interrupted before the first epoch was finished" in text
    assert "test AUC" not in text
    assert "undefined" not in text


def test_default_run_folder_leaves_nothing_after_an_error():
    with pytest.raises(UserError):
        main(["--data=recbole:nowhere"])
    assert list(Path().iterdir()) == []


def test_default_run_folder_is_printed(log, capsys):
    main([*log, *SMALL, "--epochs=1"])
    (root,) = Path("runs").iterdir()
    assert root.name.startswith("small-")
    assert str(root) in capsys.readouterr().out


def test_resume_last_goes_on_and_a_finished_run_is_left_alone(log, capsys):
    first = [*log, *SMALL, "--out=runs/a", "--resume=last"]
    assert main([*first, "--epochs=2"]) == 0
    assert "afresh" in capsys.readouterr().out
    assert main([*first, "--epochs=4"]) == 0
    assert "resuming after epoch 2" in capsys.readouterr().out
    before = Path("runs/a/metrics.json").read_bytes()
    assert main([*first, "--epochs=4"]) == 0
    assert "finished run: nothing to train" in capsys.readouterr().out
    assert Path("runs/a/metrics.json").read_bytes() == before
    main([*log, *SMALL, "--epochs=4", "--out=runs/b"])
    one, other = (json.loads(Path(f"runs/{name}/metrics.json").read_text()) for name in "ab")
    assert (one["val"], one["test"], one["fusion"]) == (
        other["val"],
        other["test"],
        other["fusion"],
    )


def test_resume_of_a_path_stays_in_its_run_folder(log):
    main([*log, *SMALL, "--epochs=1", "--out=runs/a"])
    main([*log, *SMALL, "--epochs=2", "--resume=runs/a/checkpoints/last"])
    assert [path.name for path in Path("runs").iterdir()] == ["a"]
    assert json.loads(Path("runs/a/metrics.json").read_text())["train"]["epochs"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("--tower_dim=5", "tower_dim was 4 and is now 5"),
        ("--lr=0.5", r"lr was 0\.01 and is now 0\.5"),
        ("--embedding_optimizer=row_adagrad", "embedding_optimizer was 'same' and is now 'row_adagrad'"),
        ("--split_seed=3", "split_seed was 0 and is now 3"),
        ("--domain_bins=30", "domains was"),
    ],
)
def test_resume_with_another_configuration_names_the_field(log, changed, message):
    main([*log, *SMALL, "--epochs=1", "--out=runs/a"])
    with pytest.raises(CheckpointError, match=message):
        main([*log, *SMALL, "--epochs=2", "--out=runs/a", "--resume=last", changed])


def run_command(argv, **kwargs):
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "m3oe_fast.train", *argv]
    return subprocess.Popen(command, env=environment, text=True, **kwargs)


def test_command_exits_2_with_one_line_and_no_traceback():
    process = run_command(["--epochs=-1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err == "error: epochs must be an integer of at least 1, got -1\n"


def test_ctrl_c_exits_130_with_metrics_and_the_run_goes_on(log):
    argv = [*log, *SMALL, "--out=runs/a", "--epochs=100000"]
    process = run_command(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    seen = io.StringIO()
    for line in process.stdout:
        seen.write(line)
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, seen.getvalue() + out + err
    assert "Traceback" not in err
    assert "--resume last" in out
    done = json.loads(Path("runs/a/metrics.json").read_text())["train"]["epochs"]
    assert done >= 2
    assert main([*log, *SMALL, "--out=runs/a", f"--epochs={done + 1}", "--resume=last"]) == 0
    assert json.loads(Path("runs/a/metrics.json").read_text())["train"]["epochs"] == done + 1
