"""Baselines of single pairs that are trained once and compared with the run."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.data.restrict import labelled_rows, restrict
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.training import Trainer, TrainOptions
from m3oe_fast.training.console import Display
from m3oe_fast.training.seesaw import Place, compare

DOMAINS, TASKS = ("home", "<25", ">25"), ("click", "like")
SCHEMA = Schema(("item", "domain"), (8, 4), ("age",), DOMAINS, TASKS, ("tags",), (5,), ("mean",), weighted=True)
OPTIONS = TrainOptions(epochs=2, batch_size=64, lr=1e-2, outer_every=2, patience=0)
PLACE = Place(torch.device("cpu"), "reference", "fp32")


pytestmark = pytest.mark.usefixtures("one_thread")


def make_part(rows, seed, users=True):
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 3, rows).astype(np.uint8)
    item = rng.integers(0, 8, rows).astype(np.uint8)
    dense = rng.random((rows, 1), dtype=np.float32)
    logit = (item - 4.0) + 2 * dense[:, 0] - domain
    label = (rng.random((rows, 2)) < 1 / (1 + np.exp(-logit[:, None]))).astype(np.float32)
    label[rng.random(label.shape) < 0.2] = np.nan
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 4, rows))])
    columns = {"id:item": item, "id:domain": domain + np.uint8(1), "domain": domain, "dense": dense, "label": label}
    columns |= {"weight": rng.random(rows, dtype=np.float32)}
    columns["bag:tags"] = (rng.integers(0, 5, offsets[-1]).astype(np.uint32), offsets)
    if users:
        columns["user"] = rng.integers(-1, 20, rows)
    return Part(columns, SCHEMA, "made up")


def make_dataset(train=600, **changed):
    facts = {
        "name": "made-up",
        "split": "random",
        "split_seed": 0,
        "schema": SCHEMA,
        "encoder": SimpleNamespace(to_dict=dict),
        "train": make_part(train, 1),
        "val": make_part(300, 2),
        "test": make_part(300, 3),
        "best_auc": None,
        "counts": {},
        "warnings": (),
        "identity": "0123",
        "folder": Path("nowhere"),
    }
    return Dataset(**(facts | changed))


def make_config():
    sizes = {"embed_dim": 4, "star_dim": 8, "hidden_dim": 8, "expert_dims": (4,), "tower_dim": 4}
    bags = {"bag_vocab_sizes": (5,), "bag_pooling": ("mean",)}
    return M3oEConfig((8, 4), 1, 3, 2, shared_experts=2, **sizes, **bags)


def finished_run(root, dataset):
    """A folder that holds the metrics.json of a run."""
    keys = [f"{domain}/{task}" for domain in DOMAINS for task in TASKS]
    auc = {"mean": 0.7, **{key: 0.6 + 0.03 * place for place, key in enumerate(keys)}}
    root.mkdir()
    (root / "metrics.json").write_text(json.dumps({"best_epoch": 1, "test": {"auc": auc}}))
    return auc


# The comparison -------------------------------------------------------------------------------------------------------


def test_baselines_are_compared_with_the_run_and_trained_once(tmp_path, monkeypatch):
    dataset, root, said = make_dataset(), tmp_path / "run", []
    auc = finished_run(root, dataset)
    result = compare(root, dataset, make_config(), OPTIONS, PLACE, said.append)
    assert json.loads((root / "seesaw.json").read_text()) == result
    assert list(result["pairs"]) == [key for key in auc if key != "mean"]
    for key, entry in result["pairs"].items():
        assert entry["model"] == auc[key]
        assert entry["difference"] == pytest.approx(auc[key] - entry["baseline"])
        if entry["baseline"] > 0.5:
            expected = (auc[key] - 0.5) / (entry["baseline"] - 0.5) - 1
            assert entry["relative_improvement"] == pytest.approx(expected)
    changes = [entry["difference"] for entry in result["pairs"].values()]
    assert (result["gain"], result["lose"]) == (sum(c > 0 for c in changes), sum(c < 0 for c in changes))
    assert result["mean_difference"] == pytest.approx(np.mean(changes))
    assert len(said) == 6 and said[0].startswith("baseline 1/6  home/click  test AUC 0.")

    written = {path: path.stat().st_mtime_ns for path in (root / "baselines").rglob("*.*")}
    monkeypatch.setattr(Trainer, "_run_epoch", lambda self: pytest.fail("it was trained again"))
    assert compare(root, dataset, make_config(), OPTIONS, PLACE, said.append) == result
    assert {path: path.stat().st_mtime_ns for path in (root / "baselines").rglob("*.*")} == written


def test_a_baseline_is_the_model_trained_on_that_pair_alone(tmp_path):
    dataset, root = make_dataset(), tmp_path / "run"
    finished_run(root, dataset)
    result = compare(root, dataset, make_config(), OPTIONS, PLACE, lambda line: None)
    config = make_config().to_dict() | {"num_domains": 1, "num_tasks": 1}
    torch.manual_seed(OPTIONS.seed)
    model = M3oE(M3oEConfig.from_dict(config), backend="reference")
    pair = restrict(dataset, [2], [1], labelled_rows(dataset, [2], [1]))
    alone = Trainer(model, pair, OPTIONS, display=Display()).fit()
    assert result["pairs"][">25/like"]["baseline"] == alone.test.pairs[0].auc.value


def test_options_that_name_pairs_or_write_elsewhere_are_left_out(tmp_path, monkeypatch):
    dataset, root, seen = make_dataset(), tmp_path / "run", []
    finished_run(root, dataset)
    real = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self, resume=None: seen.append(self.options) or real(self, resume))
    options = dataclasses.replace(
        OPTIONS, loss_weighting="given", pair_weights="home/like=2", logger="tensorboard", profile=True
    )
    compare(root, dataset, make_config(), options, PLACE, lambda line: None)
    assert len(seen) == 6
    assert {(o.epochs, o.loss_weighting, o.pair_weights, o.logger, o.profile) for o in seen} == {
        (2, "sum", None, "", False)
    }


def test_what_cannot_be_trained_or_measured_has_a_reason(tmp_path):
    dataset, root = make_dataset(), tmp_path / "run"
    auc = finished_run(root, dataset)
    dataset.train.label[dataset.train.domain == 0, 0] = np.nan  # home/click: nothing to learn from
    dataset.test.label[dataset.test.domain == 1, 1] = 1.0  # <25/like: one class only
    auc["home/like"] = None
    (root / "metrics.json").write_text(json.dumps({"best_epoch": 1, "test": {"auc": auc}}))
    said = []
    pairs = compare(root, dataset, make_config(), OPTIONS, PLACE, said.append)["pairs"]
    assert pairs["home/click"]["reason"] == "no labelled row in train"
    assert pairs["<25/like"]["reason"] == "only positives"
    assert pairs["home/like"]["reason"] == "the model's AUC is undefined"
    assert said[0] == "baseline 1/6  home/click  no labelled row in train"
    assert all(pairs[key]["difference"] is None for key in ("home/click", "<25/like", "home/like"))
    assert pairs["home/click"]["baseline"] is None and pairs["home/like"]["baseline"] is not None


def test_ctrl_c_stops_and_the_next_call_goes_on(tmp_path, monkeypatch):
    dataset, root = make_dataset(), tmp_path / "run"
    finished_run(root, dataset)
    whole = compare(root, dataset, make_config(), OPTIONS, PLACE, lambda line: None)
    other = tmp_path / "other"
    finished_run(other, dataset)
    real, calls = Trainer.fit, []

    def third_is_interrupted(self, resume=None):
        calls.append(self)
        result = real(self, resume)
        if len(calls) == 3:
            return SimpleNamespace(ended="interrupted")
        return result

    monkeypatch.setattr(Trainer, "fit", third_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(other, dataset, make_config(), OPTIONS, PLACE, lambda line: None)
    assert len(calls) == 3
    assert not (other / "seesaw.json").exists()
    assert compare(other, dataset, make_config(), OPTIONS, PLACE, lambda line: None) == whole


def test_baselines_of_other_options_are_refused(tmp_path):
    dataset, root = make_dataset(), tmp_path / "run"
    finished_run(root, dataset)
    compare(root, dataset, make_config(), OPTIONS, PLACE, lambda line: None)
    with pytest.raises(CheckpointError, match=r"lr was 0\.01 and is now 0\.02"):
        compare(root, dataset, make_config(), TrainOptions(epochs=2, batch_size=64, lr=2e-2), PLACE, lambda line: None)


@pytest.mark.parametrize("content", [None, "{", '{"best_epoch": 0, "test": {"auc": {"mean": null}}}'])
def test_a_run_without_a_result_is_to_be_finished_first(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(ConfigError, match=r"finish the run with m3oe_fast\.train --resume last"):
        compare(tmp_path, make_dataset(), make_config(), OPTIONS, PLACE, lambda line: None)
