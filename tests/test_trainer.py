"""The loop: who moves which weights, exact resume, early stopping, Ctrl-C, true files."""

import csv
import dataclasses
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from rich.console import Console

from m3oe_fast import M3oE, M3oEConfig, backends, checkpoint, metrics
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import CheckpointError, ConfigError, DataError, UserError
from m3oe_fast.train import parse
from m3oe_fast.training import Trainer, TrainOptions, optimizers
from m3oe_fast.training.console import ConsoleDisplay, Display, print_result
from m3oe_fast.training.evaluation import evaluate
from m3oe_fast.training.history import Stopper
from m3oe_fast.training.options import Bilevel

OPTIONS = TrainOptions(epochs=3, batch_size=64, lr=1e-2, outer_every=2, patience=0)
MODES = get_args(Bilevel)
DOMAINS, TASKS = ("home", "live", "[b]odd"), ("click", "like")


pytestmark = pytest.mark.usefixtures("one_thread")


SCHEMA = Schema(("item", "domain"), (8, 3), ("age",), DOMAINS, TASKS)


def make_part(rows, schema, seed):
    return Part(make_columns(rows, schema, seed), schema, "made up")


def make_columns(rows, schema, seed):
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, len(schema.domains), rows).astype(np.uint8)
    item = rng.integers(0, 8, rows).astype(np.uint8)
    dense = rng.random((rows, 1), dtype=np.float32)
    logit = (item - 4.0) + 2 * dense[:, 0] - domain
    label = (rng.random((rows, len(schema.tasks))) < 1 / (1 + np.exp(-logit[:, None]))).astype(np.float32)
    label[rng.random(label.shape) < 0.1] = np.nan
    return {
        "id:item": item,
        "id:domain": domain,
        "domain": domain,
        "dense": dense,
        "label": label,
    }


def make_dataset(train=500, val=200, test=200, **changed):
    schema = SCHEMA
    facts = {
        "name": "made-up",
        "split": "random",
        "split_seed": 0,
        "schema": schema,
        "encoder": SimpleNamespace(to_dict=dict),
        "train": train if isinstance(train, Part) else make_part(train, schema, 1),
        "val": make_part(val, schema, 2),
        "test": make_part(test, schema, 3),
        "best_auc": None,
        "counts": {},
        "warnings": (),
        "identity": "0123",
        "folder": Path("nowhere"),
    }
    return Dataset(**(facts | changed))


def make_model(seed=0, backend="reference", **changed):
    torch.manual_seed(seed)
    sizes = {"embed_dim": 4, "star_dim": 8, "hidden_dim": 8, "expert_dims": (4,), "tower_dim": 4}
    config = M3oEConfig((8, 3), 1, 3, 2, **(sizes | {"shared_experts": 2} | changed))
    return M3oE(config, backend=backend)


def make_trainer(options=OPTIONS, out=None, model=None, dataset=None, display=None):
    return Trainer(
        model or make_model(),
        dataset or make_dataset(),
        options,
        out=out,
        display=display or Display(),
    )


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class Calls(Display):
    """Interrupts the run, as Ctrl-C does, after `steps` steps in all."""

    def __init__(self, steps):
        self.left = steps

    def advance(self, done, mean_loss):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt  # as a second Ctrl-C: nothing is written any more


class Listens(Display):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def message(self, text):
        self.said.append(text)


def compiled(*values):
    """A test case for the compiled backend, where it is built."""
    reasons = backends.reasons_against("cpu", torch.device("cpu"), torch.float32)
    return pytest.param(*values, "cpu", marks=pytest.mark.skipif(bool(reasons), reason=str(reasons)))


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", 1.5),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("fusion_lr", math.inf),
        ("weight_decay", -1.0),
        ("patience", -1),
        ("outer_every", 0),
        ("outer_fraction", 0.0),
        ("outer_fraction", 1.0),
        ("seed", -1),
        ("optimizer", "sgd"),
        ("embedding_optimizer", "sgd"),
        ("embedding_lr", 0.0),
        ("embedding_lr", math.nan),
        ("embedding_lr", 1e-3),  # embedding_optimizer is same
        ("bilevel", "darts"),
        ("cuda_graph", "maybe"),
        ("cuda_graph", True),
    ],
)
def test_impossible_option_is_named(field, value):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        TrainOptions(**{field: value})


def test_the_table_has_the_learning_rate_of_the_network_unless_it_is_given_one():
    assert TrainOptions(lr=0.5).table_lr == TrainOptions(lr=0.5, embedding_optimizer="lazy_adam").table_lr == 0.5
    assert TrainOptions(lr=0.5, embedding_optimizer="row_adagrad", embedding_lr=0.1).table_lr == 0.1


def test_empty_part_is_refused():
    with pytest.raises(DataError, match="leaves the val part of made-up empty"):
        make_trainer(dataset=make_dataset(val=0))


def test_model_of_another_log_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match="vocab_sizes"):
        make_trainer(model=M3oE(M3oEConfig((9, 3), 1, 3, 2), backend="reference"))


# Learning ----------------------------------------------------------------------------------------


def test_it_learns():
    trainer = make_trainer(dataclasses.replace(OPTIONS, epochs=12))
    before = evaluate(trainer.model, trainer.dataset.test, trainer.dataset).mean_auc
    result = trainer.fit()
    assert result.test.mean_auc > max(before, 0.5) + 0.2
    assert result.history[-1].train_loss < result.history[0].train_loss


@pytest.mark.parametrize("embedding_optimizer", ["same", "lazy_adam", "row_adagrad"])
@pytest.mark.parametrize("bilevel", ["off", "joint", "published", "alternating"])
def test_each_weight_has_one_optimizer(bilevel, embedding_optimizer):
    trainer = make_trainer(dataclasses.replace(OPTIONS, bilevel=bilevel, embedding_optimizer=embedding_optimizer))

    def held(optimizer):
        groups = [] if optimizer is None else optimizer.param_groups
        return [id(parameter) for group in groups for parameter in group["params"]]

    network, fusion = held(trainer.optimizers.network), held(trainer.optimizers.fusion)
    own = [] if bilevel == "off" else [id(p) for p in trainer.model.fusion_parameters()]
    assert fusion == own
    table = held(trainer.optimizers.embedding)
    assert table == ([] if embedding_optimizer == "same" else [id(trainer.model.embedding)])
    assert sorted(network + table) == sorted(id(p) for p in trainer.model.network_parameters())
    assert not set(network) & set(fusion)


@pytest.mark.parametrize(("bilevel", "moves"), [("off", False), *((mode, True) for mode in MODES if mode != "off")])
def test_fusion_weights_move_only_in_outer_steps(bilevel, moves):
    model = make_model()
    before = model.fusion_values()
    make_trainer(dataclasses.replace(OPTIONS, bilevel=bilevel, fusion_lr=0.1), model=model).fit()
    assert (model.fusion_values() != before) == moves
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_inner_steps_leave_fusion_and_outer_steps_leave_the_network():
    trainer = make_trainer(dataclasses.replace(OPTIONS, outer_every=10_000, epochs=1))
    before = bits(trainer.model)
    trainer.fit()
    for name in ("alpha_domain", "alpha_task", "beta_domain", "beta_task"):
        assert torch.equal(bits(trainer.model)[name], before[name])
    before = bits(trainer.model)
    trainer._outer_step(0, None)
    moved = {name for name, tensor in bits(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"alpha_domain", "alpha_task", "beta_domain", "beta_task"}
    assert all(parameter.grad is None for parameter in trainer.model.fusion_parameters())


def test_an_interruption_between_two_switches_of_gradients_leaves_none_off(monkeypatch):
    trainer = make_trainer(dataclasses.replace(OPTIONS, outer_every=1))
    require, calls = optimizers._require, []

    def interrupted(parameters, flags):
        calls.append(1)
        if len(calls) == 4:  # the network's weights of the first outer step, about to be switched on again
            raise KeyboardInterrupt
        require(parameters, flags)

    monkeypatch.setattr(optimizers, "_require", interrupted)
    assert trainer.fit().ended == "interrupted"
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())


def seen_rows(trainer):
    """Training rows of every batch, told apart by their dense value: (inner, outer)."""
    known = {value: row for row, value in enumerate(trainer.dataset.train.take(np.arange(500)).dense[:, 0].tolist())}
    inner, outer = [], []
    loss = trainer.model.loss

    def spy(ids, dense, *rest, **options):
        rows = [known[value] for value in dense[:, 0].tolist()]
        is_outer = trainer.model.alpha_domain.requires_grad
        (outer if is_outer else inner).append(rows)
        return loss(ids, dense, *rest, **options)

    trainer.model.loss = spy
    trainer.fit()
    return inner, outer


def test_no_inner_step_sees_a_held_out_row():
    trainer = make_trainer(dataclasses.replace(OPTIONS, outer_fraction=0.2, epochs=4))
    inner, outer = seen_rows(trainer)
    held_out = set(np.flatnonzero(trainer.held_out.mask).tolist())
    assert 70 < len(held_out) < 130
    assert {row for rows in outer for row in rows} <= held_out
    for epoch in range(4):
        steps = inner[epoch * trainer.steps_per_epoch : (epoch + 1) * trainer.steps_per_epoch]
        assert sorted(row for rows in steps for row in rows) == sorted(set(range(500)) - held_out)
    assert len(inner) == 4 * trainer.steps_per_epoch
    assert len(outer) == len(inner) // 2  # outer_every=2 counts on across epochs
    assert inner[:7] != inner[trainer.steps_per_epoch :][:7]


def test_published_takes_one_training_batch_an_epoch():
    trainer = make_trainer(dataclasses.replace(OPTIONS, bilevel="published"))
    inner, outer = seen_rows(trainer)
    assert [len(rows) for rows in outer] == [64, 64, 64]
    assert sum(map(len, inner)) == 3 * 500


def test_a_turn_of_outer_batches_repeats_no_row():
    trainer = make_trainer(dataclasses.replace(OPTIONS, outer_fraction=0.5))
    count = int(trainer.held_out.mask.sum()) // 64
    turn = [trainer.held_out.rows(number) for number in range(count)]
    rows = np.concatenate(turn)
    assert len(set(rows.tolist())) == len(rows) == count * 64
    assert not np.array_equal(trainer.held_out.rows(count), turn[0])


def test_same_seed_same_bits_and_another_seed_others():
    first, second, other = make_model(), make_model(), make_model()
    make_trainer(model=first).fit()
    torch.manual_seed(99)
    make_trainer(model=second, display=ConsoleDisplay(Console(file=io.StringIO(), force_terminal=True))).fit()
    make_trainer(dataclasses.replace(OPTIONS, seed=7), model=other).fit()
    assert_same_bits(bits(first), bits(second))
    assert not torch.equal(first.embedding, other.embedding)


@pytest.mark.parametrize(("bilevel", "backend"), [compiled("published"), compiled("alternating")])
def test_outer_steps_of_the_compiled_backend_agree_with_the_oracle(bilevel, backend):
    values = []
    for name in (backend, "reference"):
        model = make_model(backend=name)
        make_trainer(dataclasses.replace(OPTIONS, bilevel=bilevel, fusion_lr=0.1), model=model).fit()
        values.append(model.fusion_values())
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    assert values[0] != make_model().fusion_values()


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_optimizers_are_fused(optimizer):
    trainer = make_trainer(dataclasses.replace(OPTIONS, optimizer=optimizer))
    assert trainer.optimizers.network.defaults["fused"]
    assert type(trainer.optimizers.network).__name__.lower() == optimizer


def test_diverging_is_one_line():
    dataset = make_dataset()
    model = make_model()
    with torch.no_grad():
        model.head_bias.fill_(math.nan)
    with pytest.raises(ConfigError, match=r"diverged in epoch 1 .*lower lr \(now 0\.01\)"):
        make_trainer(model=model, dataset=dataset).fit()


def test_weights_that_the_last_step_ruined_are_no_best_epoch(tmp_path):
    class Ruins(Display):
        """Ruins a weight after the last step, when the loss has been counted."""

        steps = 0

        def advance(self, done, mean_loss):
            self.steps += 1
            if self.steps == 16:  # the last of epoch 2
                with torch.no_grad():
                    trainer.model.alpha_task.fill_(math.inf)

    trainer = make_trainer(out=tmp_path, display=Ruins())
    with pytest.raises(ConfigError, match=r"diverged in epoch 2 \(weights are not finite\): lower lr"):
        trainer.fit()
    assert len(checkpoint.read(tmp_path)["trainer"]["history"]) == 1
    assert all(weight.isfinite().all() for weight in trainer.model.state_dict().values())


def test_scores_that_overflow_are_no_best_epoch(monkeypatch):
    def overflown(model, part, dataset, clock):
        schema = dataset.schema
        logits = np.full((len(part), len(schema.tasks)), np.inf, np.float32)
        return metrics.evaluate(logits, part.domain, part.label, schema.domains, schema.tasks)

    monkeypatch.setattr("m3oe_fast.training.trainer.evaluate", overflown)
    with pytest.raises(ConfigError, match=r"diverged in epoch 1 \(validation scores are not finite\)"):
        make_trainer().fit()


def test_diverging_names_the_learning_rate_of_the_table_too():
    model = make_model()
    with torch.no_grad():
        model.head_bias.fill_(math.nan)
    options = dataclasses.replace(OPTIONS, embedding_optimizer="row_adagrad", embedding_lr=0.5)
    with pytest.raises(ConfigError, match=r"lower lr \(now 0\.01\) or embedding_lr \(now 0\.5\)$"):
        make_trainer(options, model=model).fit()


# The embedding table ------------------------------------------------------------------------------

BACKENDS = [pytest.param("reference"), compiled()]
OWN = ["lazy_adam", "row_adagrad"]


def with_item_for_outer_rows_only(options):
    """A dataset whose item 7, in the training part, is that of the rows of the outer level and of no other."""
    mask = make_trainer(options).held_out.mask
    columns = make_columns(500, SCHEMA, 1)
    columns["id:item"] = np.where(mask, 7, columns["id:item"] % 7).astype(np.uint8)
    return make_dataset(train=Part(columns, SCHEMA, "made up"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("embedding_optimizer", ["same", *OWN])
def test_own_optimizer_moves_the_rows_of_inner_batches_only(embedding_optimizer, backend):
    options = dataclasses.replace(OPTIONS, embedding_optimizer=embedding_optimizer, weight_decay=0.1)
    model = make_model(backend=backend)
    before = model.embedding.detach().clone()
    make_trainer(options, model=model, dataset=with_item_for_outer_rows_only(options)).fit()
    stayed = (model.embedding == before).all(dim=1)
    assert stayed.tolist() == [row == 7 and embedding_optimizer != "same" for row in range(11)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bilevel", ["published", "alternating"])
@pytest.mark.parametrize("embedding_optimizer", OWN)
def test_outer_steps_leave_the_table_its_gradient_and_its_state(monkeypatch, embedding_optimizer, bilevel, backend):
    options = dataclasses.replace(OPTIONS, embedding_optimizer=embedding_optimizer, bilevel=bilevel)
    trainer = make_trainer(options, model=make_model(backend=backend))
    table, outer_step, seen = trainer.model.embedding, trainer._outer_step, []

    def state():
        return [table.detach(), table.grad.to_dense(), *trainer.optimizers.embedding.state[table].values()]

    def watched(number, training):
        assert table.grad.is_sparse
        before = [torch.as_tensor(value).clone() for value in state()]
        outer_step(number, training)
        assert all(torch.equal(one, torch.as_tensor(other)) for one, other in zip(before, state(), strict=True))
        seen.append(number)

    monkeypatch.setattr(trainer, "_outer_step", watched)
    trainer.fit()
    assert len(seen) == trainer.outer_steps > 0
    if embedding_optimizer == "lazy_adam":
        assert trainer.optimizers.embedding.state[table]["step"] == 3 * trainer.steps_per_epoch


@pytest.mark.parametrize("backend", BACKENDS)
def test_lazy_adam_is_adam_where_every_batch_holds_every_row(backend):
    options = dataclasses.replace(OPTIONS, batch_size=500, bilevel="off", weight_decay=1e-2)
    models = {name: make_model(backend=backend) for name in ("same", "lazy_adam")}
    for name, model in models.items():
        make_trainer(dataclasses.replace(options, embedding_optimizer=name), model=model).fit()
    assert not torch.equal(models["same"].embedding, make_model().embedding)
    torch.testing.assert_close(models["same"].embedding, models["lazy_adam"].embedding, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_adagrad_has_the_learning_rate_of_the_table_and_the_decay_of_the_network(backend):
    options = dataclasses.replace(
        OPTIONS,
        epochs=1,
        batch_size=500,
        bilevel="off",
        weight_decay=0.1,
        embedding_optimizer="row_adagrad",
        embedding_lr=0.25,
    )
    model, oracle = make_model(backend=backend), make_model()
    trainer = make_trainer(options, model=model)
    oracle.loss(*trainer.dataset.train.take(np.arange(500))).backward()
    trainer.fit()
    table = oracle.embedding.detach()
    gradient = oracle.embedding.grad + 0.1 * table
    expected = table - 0.25 * gradient / gradient.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(model.embedding.detach(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("embedding_optimizer", OWN)
@pytest.mark.parametrize("bilevel", ["published", "alternating"])
@pytest.mark.parametrize("backend", [compiled()])
def test_own_optimizer_on_the_compiled_backend_agrees_with_the_oracle(embedding_optimizer, bilevel, backend):
    options = dataclasses.replace(
        OPTIONS, bilevel=bilevel, fusion_lr=0.1, embedding_optimizer=embedding_optimizer, embedding_lr=0.02
    )
    results = [make_trainer(options, model=make_model(backend=name)).fit() for name in (backend, "reference")]
    logloss, fusion = zip(*((r.metrics["test"]["logloss"], r.metrics["fusion"]) for r in results), strict=True)
    assert logloss[0] == pytest.approx(logloss[1], rel=1e-3)
    assert fusion[0] == pytest.approx(fusion[1], rel=1e-3)


@pytest.mark.parametrize("embedding_optimizer", ["same", *OWN])
@pytest.mark.parametrize("before", [False, True])
def test_training_leaves_the_model_no_gradient_and_its_kind_as_it_was(embedding_optimizer, before):
    model = make_model()
    model.sparse_grad = before
    options = dataclasses.replace(OPTIONS, epochs=1, embedding_optimizer=embedding_optimizer)
    assert make_trainer(options, model=model).fit().best_epoch == 1
    assert model.sparse_grad is before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("embedding_optimizer", OWN)
def test_own_optimizer_learns(embedding_optimizer):
    options = dataclasses.replace(OPTIONS, epochs=12, embedding_optimizer=embedding_optimizer, embedding_lr=0.01)
    assert make_trainer(options).fit().test.mean_auc > 0.7


# Outer steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bilevel", "outer_every", "steps"),
    [("alternating", 24, 1), ("alternating", 25, 0), ("alternating", 5, 4), ("published", 50, 3), ("off", 1, 0)],
)
def test_outer_steps_are_counted_ahead_and_none_is_a_warning(monkeypatch, bilevel, outer_every, steps):
    display = Listens()
    trainer = make_trainer(dataclasses.replace(OPTIONS, bilevel=bilevel, outer_every=outer_every), display=display)
    done = []
    monkeypatch.setattr(trainer, "_outer_step", lambda number, training: done.append(number))
    trainer.fit()
    assert trainer.outer_steps == len(done) == steps
    warned = [text for text in display.said if "no outer step" in text and "24 steps" in text]
    assert len(warned) == (bilevel == "alternating" and not steps)


# Early stopping ----------------------------------------------------------------------------------


def run_stopper(scores, patience):
    stopper = Stopper()
    for epoch, score in enumerate(scores, start=1):
        stopper = stopper.after(epoch, score)
        if stopper.exhausted(patience):
            return epoch, stopper.best_epoch
    return None, stopper.best_epoch


@pytest.mark.parametrize(
    ("scores", "patience", "stopped", "best"),
    [
        ([0.6, 0.7, 0.7, 0.69], 2, 4, 2),
        ([0.6, 0.7, 0.65, 0.8, 0.7], 2, None, 4),
        ([0.9, 0.1, 0.1, 0.1], 0, None, 1),
        ([None, None, None, None], 2, None, 4),
        ([None, 0.5, None, None], 2, 4, 2),
    ],
)
def test_stopper(scores, patience, stopped, best):
    assert run_stopper(scores, patience) == (stopped, best)


class Peaks(Trainer):
    """A trainer whose validation AUC is best in epoch 2."""

    def _run_epoch(self):
        super()._run_epoch()
        self.weights = getattr(self, "weights", [])
        self.weights.append(bits(self.model))


def with_scores(monkeypatch, scores):
    """Let validation report these mean AUCs, epoch by epoch."""
    left = iter(scores)

    def fake(model, part, dataset, clock=None):
        real = evaluate(model, part, dataset)
        value = next(left, None)
        return real if value is None else SimpleNamespace(mean_auc=value, finite=True, to_dict=real.to_dict)

    monkeypatch.setattr("m3oe_fast.training.trainer.evaluate", fake)


@pytest.mark.parametrize(("patience", "ended", "done"), [(2, "patience", 4), (0, "epochs", 5)])
def test_best_weights_are_restored_whatever_ends_the_run(monkeypatch, tmp_path, patience, ended, done):
    with_scores(monkeypatch, [0.6, 0.8, 0.7, 0.7, 0.7][:done])
    options = dataclasses.replace(OPTIONS, epochs=5, patience=patience)
    trainer = Peaks(make_model(), make_dataset(), options, out=tmp_path, display=Display())
    result = trainer.fit()
    assert (result.ended, len(result.history), result.best_epoch) == (ended, done, 2)
    assert_same_bits(bits(trainer.model), trainer.weights[1])
    assert_same_bits(dict(checkpoint.read(tmp_path)["weights"]), trainer.weights[1])
    last = checkpoint.read(tmp_path / "checkpoints" / "last")
    assert_same_bits(dict(last["weights"]), trainer.weights[-1])


def test_undefined_pairs_never_reach_the_stopper():
    dataset = make_dataset()
    dataset.val.label[:, :] = 1
    result = make_trainer(dataclasses.replace(OPTIONS, patience=1), dataset=dataset).fit()
    assert result.val.mean_auc is None
    assert result.metrics["val"]["auc"] == dict.fromkeys(result.metrics["val"]["auc"])
    assert (result.ended, result.best_epoch) == ("epochs", 3)


# Ctrl-C and resume -------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_best_weights_and_writes_metrics(tmp_path):
    whole = make_trainer(dataclasses.replace(OPTIONS, epochs=1))
    whole.fit()
    trainer = make_trainer(out=tmp_path, display=Calls(10))  # an epoch has 8 steps
    result = trainer.fit()
    assert (result.ended, len(result.history), result.best_epoch) == ("interrupted", 1, 1)
    assert_same_bits(bits(trainer.model), bits(whole.model))
    assert json.loads((tmp_path / "metrics.json").read_text())["train"]["epochs"] == 1


def test_ctrl_c_in_the_first_epoch_still_tells_where_it_stands(tmp_path):
    result = make_trainer(out=tmp_path, display=Calls(3)).fit()
    assert (result.ended, result.best_epoch) == ("interrupted", 0)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["train"]["epochs"], written["train"]["samples_per_second"]) == (0, None)
    # No file holds the half-trained weights: their scores would be of nothing.
    for values in (written["val"]["auc"], written["test"]["logloss"], written["fusion"]):
        assert values == dict.fromkeys(values)
    assert {pair.auc.reason for pair in result.test.pairs} == {"no epoch was finished"}
    assert sum(pair.rows for pair in result.val.pairs) > 0
    resumed = make_trainer(out=tmp_path)
    resumed.fit(resume="last")
    straight = make_trainer()
    straight.fit()
    assert_same_bits(bits(resumed.model), bits(straight.model))


def test_ctrl_c_while_an_epoch_is_written_keeps_that_epoch(tmp_path, monkeypatch):
    trainer = make_trainer(out=tmp_path)
    save, calls = trainer.model.save, []

    def interrupted_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        save(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "save", interrupted_once)
    assert trainer.fit().ended == "interrupted"
    assert len(checkpoint.read(tmp_path / "checkpoints" / "last")["trainer"]["history"]) == 1


@pytest.mark.parametrize(
    ("bilevel", "embedding_optimizer", "backend"),
    [
        ("off", "same", "reference"),
        ("published", "same", "reference"),
        ("alternating", "same", "reference"),
        ("published", "row_adagrad", "reference"),
        ("alternating", "lazy_adam", "reference"),
        compiled("alternating", "same"),
        compiled("alternating", "row_adagrad"),
        compiled("published", "lazy_adam"),
    ],
)
def test_two_and_two_epochs_are_four_bit_for_bit(tmp_path, bilevel, embedding_optimizer, backend):
    four = dataclasses.replace(
        OPTIONS, bilevel=bilevel, epochs=4, outer_every=3, embedding_optimizer=embedding_optimizer
    )
    straight = make_trainer(four, out=tmp_path / "straight", model=make_model(backend=backend))
    expected = straight.fit()
    two = dataclasses.replace(four, epochs=2)
    make_trainer(two, out=tmp_path / "halves", model=make_model(backend=backend)).fit()
    other = make_model(seed=5, backend=backend)
    resumed = make_trainer(four, out=tmp_path / "halves", model=other)
    result = resumed.fit(resume="last")
    assert_same_bits(bits(resumed.model), bits(straight.model))
    assert result.metrics["test"] == expected.metrics["test"]
    assert [e.train_loss for e in result.history] == [e.train_loss for e in expected.history]
    assert [e.fusion for e in result.history] == [e.fusion for e in expected.history]
    for name in ("last", "best"):
        one, other = (checkpoint.read(tmp_path / run / "checkpoints" / name) for run in ("straight", "halves"))
        assert_same_bits(dict(one["weights"]), dict(other["weights"]))
        for key in ("network_optimizer", "embedding_optimizer", "fusion_optimizer", "stopper", "rng"):
            torch.testing.assert_close(one["trainer"][key], other["trainer"][key], rtol=0, atol=0)


def test_interrupted_at_any_step_and_resumed_is_the_same_run(tmp_path):
    straight = make_trainer()
    straight.fit()
    for steps in (9, 13):
        out = tmp_path / str(steps)
        make_trainer(out=out, display=Calls(steps)).fit()
        resumed = make_trainer(out=out, model=make_model(seed=5))
        resumed.fit(resume="last")
        assert_same_bits(bits(resumed.model), bits(straight.model))


def test_killed_between_best_and_last_goes_on_from_the_newer(tmp_path):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    older = (tmp_path / "checkpoints" / "last" / "model.pt").read_bytes()
    make_trainer(out=tmp_path).fit(resume="last")
    newest = checkpoint.read(tmp_path / "checkpoints" / "best")["trainer"]["history"]
    (tmp_path / "checkpoints" / "last" / "model.pt").write_bytes(older)
    trainer = make_trainer(out=tmp_path)
    trainer._resume("last")
    assert trainer.progress.epoch == len(newest) > 1


class Killed(BaseException):
    """Stands for the end of the process."""


class Files:
    """Counts file operations; at number `last` and ever after nothing happens to a file any more."""

    def __init__(self, monkeypatch, last):
        self.left = last
        for owner, name in ((Path, "mkdir"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
            monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, operation):
        def perform(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return operation(*args, **kwargs)

        return perform


def state_of(out):
    """What a finished run must have left, whatever happened on the way."""
    found = {}
    for name in ("last", "best"):
        content = checkpoint.read(out / "checkpoints" / name)
        found[name] = len(content["trainer"]["history"]), {k: v.tolist() for k, v in content["weights"].items()}
    with (out / "metrics.csv").open(newline="") as stream:
        found["losses"] = [row["train_loss"] for row in csv.DictReader(stream)]
    result = json.loads((out / "metrics.json").read_text())
    return found | {key: result[key] for key in ("best_epoch", "val", "test", "fusion")}


def test_killed_between_any_two_file_operations_and_resumed_is_the_same_run(tmp_path, monkeypatch):
    options = dataclasses.replace(OPTIONS, epochs=2)
    dataset = make_dataset(train=130, val=40, test=40)

    def fit(out, resume=None):
        make_trainer(options, out=out, dataset=dataset).fit(resume)

    with monkeypatch.context() as patch:
        files = Files(patch, 10**6)
        fit(tmp_path / "whole")
    operations, expected = 10**6 - files.left, state_of(tmp_path / "whole")
    assert operations > 20
    for number in range(operations):
        out = tmp_path / str(number)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            Files(patch, number)
            fit(out)
        fit(out, resume="last")
        assert state_of(out) == expected, number


@pytest.mark.parametrize("gone", ["checkpoints/best/model.pt", "checkpoints/last/model.pt", "metrics.csv"])
def test_finished_run_gets_the_files_that_a_kill_took(tmp_path, gone):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    (tmp_path / gone).unlink()
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit(resume="last")
    assert (tmp_path / gone).is_file()


def test_empty_folders_of_a_kill_are_free_for_a_new_run(tmp_path):
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    assert make_trainer(out=tmp_path).fit().ended == "epochs"


def test_resume_of_a_run_does_not_overwrite_the_one_around_it(tmp_path):
    make_trainer(out=tmp_path).fit()
    before = checkpoint.read(tmp_path)["weights"]
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path / "inner").fit()
    for source in ("inner", "inner/checkpoints/last", "inner/checkpoints/last/model.pt"):
        with pytest.raises(ConfigError, match="already holds a run"):
            make_trainer(out=tmp_path).fit(resume=tmp_path / source)
    assert_same_bits(dict(checkpoint.read(tmp_path)["weights"]), dict(before))


def test_resume_from_inside_the_run_folder_stays_there(tmp_path, monkeypatch):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    monkeypatch.chdir(tmp_path / "checkpoints" / "last")
    assert len(make_trainer(out=tmp_path).fit(resume=".").history) == 3


def test_checkpoint_closed_to_us_is_one_line(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("m3oe_fast.checkpoint.locate", refuse)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint closed: Permission denied"):
        make_trainer().fit(resume="closed")


def test_finished_run_is_left_as_it_is(tmp_path):
    first = make_trainer(out=tmp_path).fit()
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()}
    again = make_trainer(out=tmp_path, model=make_model(seed=5)).fit(resume="last")
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    assert again.ended == "epochs"
    assert again.metrics["test"] == first.metrics["test"]


def test_finished_run_without_metrics_gets_them(tmp_path):
    make_trainer(out=tmp_path).fit()
    before = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").unlink()
    make_trainer(out=tmp_path).fit(resume="last")
    assert json.loads((tmp_path / "metrics.json").read_text())["test"] == before["test"]


def test_resume_last_without_a_checkpoint_starts_afresh_and_says_so(tmp_path):
    display = Listens()
    resumed = make_trainer(out=tmp_path, display=display)
    resumed.fit(resume="last")
    straight = make_trainer()
    straight.fit()
    assert any("afresh" in text for text in display.said)
    assert_same_bits(bits(resumed.model), bits(straight.model))


def test_resume_best_goes_back_to_the_best_epoch(tmp_path, monkeypatch):
    with_scores(monkeypatch, [0.6, 0.8, 0.7])
    make_trainer(out=tmp_path).fit()
    trainer = make_trainer(out=tmp_path)
    trainer._resume("best")
    assert trainer.progress.epoch == 2


def test_resume_from_a_path_into_a_new_folder(tmp_path):
    make_trainer(dataclasses.replace(OPTIONS, epochs=2), out=tmp_path / "a").fit()
    straight = make_trainer()
    straight.fit()
    for number, source in enumerate(("a", "a/checkpoints/last", "a/checkpoints/last/model.pt")):
        out = tmp_path / f"b{number}"
        resumed = make_trainer(out=out)
        resumed.fit(resume=tmp_path / source)
        assert_same_bits(bits(resumed.model), bits(straight.model))
        assert_same_bits(bits(resumed.model), dict(checkpoint.read(out)["weights"]))


def test_resume_from_a_path_does_not_overwrite_a_third_run(tmp_path):
    make_trainer(out=tmp_path / "a").fit()
    make_trainer(out=tmp_path / "b").fit()
    with pytest.raises(ConfigError, match="already holds a run"):
        make_trainer(out=tmp_path / "b").fit(resume=tmp_path / "a")


@pytest.mark.parametrize("resume", ["best", "nowhere"])
def test_missing_checkpoint_is_one_line(tmp_path, resume):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        make_trainer(out=tmp_path / "a").fit(resume=resume)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_is_one_line(tmp_path):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    file = tmp_path / "checkpoints" / "last" / "model.pt"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"last/model\.pt is damaged") as caught:
        make_trainer(out=tmp_path).fit(resume="last")
    assert "\n" not in str(caught.value)


def test_resume_best_mends_a_damaged_last(tmp_path):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    (tmp_path / "checkpoints" / "last" / "model.pt").write_bytes(b"half")
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit(resume="best")
    assert len(checkpoint.read(tmp_path / "checkpoints" / "last")["trainer"]["history"]) == 1


def test_checkpoint_without_training_state_is_refused(tmp_path):
    model = make_model()
    model.save(tmp_path / "weights")
    with pytest.raises(CheckpointError, match="no training state"):
        make_trainer().fit(resume=tmp_path / "weights")


@pytest.mark.parametrize(
    ("model", "options", "data", "field"),
    [
        ({"hidden_dim": 9}, {}, {}, "hidden_dim was 8 and is now 9"),
        ({"shared_experts": 1}, {}, {}, "shared_experts was 2 and is now 1"),
        ({}, {"lr": 0.5}, {}, r"lr was 0\.01 and is now 0\.5"),
        ({}, {"embedding_optimizer": "lazy_adam"}, {}, "embedding_optimizer was 'same' and is now 'lazy_adam'"),
        ({}, {"seed": 3}, {}, "seed was 2022 and is now 3"),
        ({}, {"bilevel": "off"}, {}, "bilevel was 'alternating' and is now 'off'"),
        ({}, {}, {"identity": "9", "split_seed": 4}, "split_seed was 0 and is now 4"),
        ({}, {}, {"identity": "9"}, "digest of the rows"),
    ],
)
def test_checkpoint_of_another_configuration_names_the_field(tmp_path, model, options, data, field):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    trainer = make_trainer(
        dataclasses.replace(OPTIONS, **options),
        out=tmp_path,
        model=make_model(**model),
        dataset=make_dataset(**data),
    )
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=field):
        trainer.fit(resume="last")
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_the_same_rows_under_another_name_are_the_same_run(tmp_path):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    moved = make_trainer(out=tmp_path, dataset=make_dataset(name="moved"))
    assert len(moved.fit(resume="last").history) == 3


# Files -------------------------------------------------------------------------------------------


def test_metrics_json_has_the_documented_keys(tmp_path):
    trainer = make_trainer(out=tmp_path)
    result = trainer.fit()
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == result.metrics
    pairs = {f"{domain}/{task}" for domain in DOMAINS for task in TASKS}
    keys = "data model backend isa precision train best_epoch val test fusion"
    assert " ".join(written) == keys
    assert written["data"] == {
        "name": "made-up",
        "split": "random",
        "rows": {
            "train": 500,
            "val": 200,
            "test": 200,
        },  # the held-out outer rows count as training rows
        "domains": list(DOMAINS),
        "tasks": list(TASKS),
    }
    assert set(written["model"]) == {"name", "form", "parameters", "multiply_adds"}
    train = written["train"]
    assert set(train) == {
        "epochs",
        "seconds",
        "cpu_seconds",
        "samples_per_second",
        "peak_rss_bytes",
    }
    assert train["samples_per_second"] == pytest.approx(3 * trainer.inner_rows / train["seconds"])
    assert 50e6 < train["peak_rss_bytes"] < 50e9
    for part in ("val", "test"):
        assert set(written[part]) == {"auc", "logloss", "calibration", "gauc", "overall"}
        for metric in ("auc", "logloss", "calibration", "gauc"):
            assert set(written[part][metric]) == {"mean", *pairs}
            assert set(written[part]["overall"][metric]) == set(TASKS)
    assert set(written["fusion"]) == {"alpha_domain", "alpha_task", "beta_domain", "beta_task"}


def test_history_tells_of_every_epoch(tmp_path):
    result = make_trainer(out=tmp_path, model=make_model(fusion="per_index")).fit()
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["train_loss"]) == result.history[2].train_loss
    assert float(rows[0]["val_auc/home/like"]) == result.history[0].val["auc"]["home/like"]
    assert {"seconds", "samples_per_second", "val_auc/mean", "val_logloss/mean"} <= set(rows[0])
    assert {"alpha_domain/[b]odd", "beta_task/like"} <= set(rows[0])


def test_config_of_a_run_from_python_is_one_for_the_command(tmp_path):
    dataset = make_dataset(split="user", split_seed=7)
    make_trainer(out=tmp_path, model=make_model(fusion="per_index"), dataset=dataset).fit()
    options = parse(["--config", str(tmp_path / "config.yaml")])
    assert options.train == OPTIONS
    assert (options.data.split, options.data.split_seed) == ("user", 7)
    assert options.model.config(SCHEMA) == make_model(fusion="per_index").config
    assert (options.data.data, options.run.out) == ("prepared:nowhere", str(tmp_path))


def test_config_of_a_run_with_an_optimizer_for_the_table_is_one_for_the_command(tmp_path):
    options = dataclasses.replace(OPTIONS, epochs=1, embedding_optimizer="row_adagrad", embedding_lr=0.01)
    make_trainer(options, out=tmp_path).fit()
    assert parse(["--config", str(tmp_path / "config.yaml")]).train == options


def test_nothing_is_written_without_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer().fit()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    make_trainer(dataclasses.replace(OPTIONS, epochs=1), out=tmp_path).fit()
    file = tmp_path / "checkpoints" / "last" / "model.pt"
    before = file.read_bytes()
    trainer = make_trainer(out=tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        trainer.fit(resume="last")
    assert file.read_bytes() == before
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


# What a person sees ------------------------------------------------------------------------------


def printed(terminal, best_auc=None):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120, highlight=False)
    result = make_trainer(display=ConsoleDisplay(console)).fit()
    print_result(console, result, best_auc)
    return file.getvalue(), result


def test_plain_output_is_a_line_per_epoch_and_a_table_without_control_codes():
    text, result = printed(terminal=False, best_auc={"mean": 0.9, "home/click": 0.91})
    lines = text.splitlines()
    assert "\x1b" not in text
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/3", "2/3", "3/3"]
    row = next(line for line in lines if line.startswith("| home") and "click" in line)
    assert f"{result.test.pairs[0].auc.value:.4f}" in row
    assert "0.9100" in row
    assert any("[b]odd" in line for line in lines)
    assert lines[-1].startswith("| mean")


def test_terminal_output_has_a_bar():
    text, _ = printed(terminal=True)
    assert "rows/s" in text
    assert "\x1b" in text


def test_table_says_why_a_value_is_missing():
    dataset = make_dataset()
    dataset.test.label[:, 0] = 1
    file = io.StringIO()
    console = Console(file=file, width=120)
    print_result(console, make_trainer(dataset=dataset).fit(), None)
    assert "undefined: test AUC of home/click: only positives" in file.getvalue()
