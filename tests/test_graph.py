"""Captured steps: when they are used, and that they train as eager ones do. On a CPU a capture is simulated: its replay
runs the step again."""

import dataclasses

import numpy as np
import pytest
import torch

from m3oe_fast import checkpoint
from m3oe_fast.data.batch import Batch
from m3oe_fast.errors import ConfigError
from m3oe_fast.training import graph
from m3oe_fast.training.graph import WARM_UP, GraphedStep, StaticBatch
from m3oe_fast.training.optimizers import Optimizers
from m3oe_fast.training.options import TrainOptions
from tests.test_trainer import (
    OPTIONS,
    Listens,
    assert_same_bits,
    bits,
    compiled,
    make_dataset,
    make_model,
    make_trainer,
)
from tests.tolerance import GRADIENT, assert_close_to_oracle

EAGER = dataclasses.replace(OPTIONS, cuda_graph="off", fusion_lr=0.1)
GRAPHED = dataclasses.replace(EAGER, cuda_graph="auto")
CPU, GPU = torch.device("cpu"), torch.device("cuda")
BACKENDS = [pytest.param("reference"), compiled()]


pytestmark = pytest.mark.usefixtures("one_thread")


class Repeats:
    """A capture that keeps the step and runs it at each replay; like a real one, it does nothing while it captures."""

    def __init__(self, *_):
        self.events = []

    def warm_up(self, step):
        self.events.append("warm-up")
        step()

    def record(self, step):
        self.events.append("capture")

        def replay():
            self.events.append("replay")
            step()

        return replay


@pytest.fixture
def simulated(monkeypatch):
    """Trainers capture unless cuda_graph is off; the captures they made, in order."""
    made = []

    def make(*arguments):
        made.append(Repeats(*arguments))
        return made[-1]

    monkeypatch.setattr(graph, "CudaCapture", make)
    monkeypatch.setattr(graph, "is_used", lambda options, device, backend, bags: options.cuda_graph != "off")
    return made


def trained(options, backend, double=False, nudge=None):
    """The weights after training, and the result; `nudge` seeds a change of every first weight by its last bit."""
    model = make_model(backend=backend)
    if double:
        model.double()
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1 + 2.0**-23 * (2 * torch.randint(2, weight.shape, generator=generator) - 1))
    result = make_trainer(options, model=model).fit()
    return bits(model), result


def assert_same_training(actual, eager, oracle):
    """By the ratio rule, every tensor relative to its largest value.

    How far the steps of a run carry a rounding away is chance. So eager's error is the worst of any tensor, and of the
    several runs in `eager`, which differ in the last bits of their first weights.
    """
    scales = {name: weight.abs().max().clamp(min=1e-30) for name, weight in oracle.items() if weight.numel()}

    def relative(weights):
        return torch.cat([(weights[name].double() / scale).flatten() for name, scale in scales.items()])

    exact = relative(oracle)
    worst = max(map(relative, eager), key=lambda found: (found - exact).abs().max())
    assert_close_to_oracle(relative(actual).float(), worst.float(), exact, GRADIENT, "weights")


# Training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bilevel", ["off", "published", "alternating"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_steps_train_as_eager_ones(simulated, backend, bilevel):
    eager_options, graphed_options = (dataclasses.replace(o, bilevel=bilevel, epochs=4) for o in (EAGER, GRAPHED))
    actual, result = trained(graphed_options, backend)
    eager, expected = trained(eager_options, backend)
    nudged = [trained(eager_options, backend, nudge=seed)[0] for seed in range(3)]
    oracle, _ = trained(eager_options, "reference", double=True)
    assert_same_training(actual, [eager, *nudged], oracle)
    losses = [[epoch.train_loss for epoch in r.history] for r in (result, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    (capture,) = simulated
    assert capture.events.count("capture") == (1 if bilevel == "off" else 2)
    assert (result.metrics["fusion"] != make_model().fusion_values()) == (bilevel != "off")


def test_every_captured_batch_has_the_same_rows_and_the_short_one_is_filled_up(simulated):
    trainer = make_trainer(dataclasses.replace(GRAPHED, epochs=2))
    sizes = []
    loss = trainer.model.loss

    def spy(ids, dense, domain, label, *rest):
        real = int((~label.isnan().all(dim=1)).sum())
        sizes.append((trainer.model.alpha_domain.requires_grad, len(domain), real))
        return loss(ids, dense, domain, label, *rest)

    trainer.model.loss = spy
    trainer.fit()
    assert {rows for is_outer, rows, _ in sizes if not is_outer} == {64}
    held_out = int(trainer.held_out.mask.sum())
    assert {rows for is_outer, rows, _ in sizes if is_outer} == {held_out}  # all the outer rows there are
    short = (500 - held_out) % 64
    assert 0 < short < 64
    # A real row may happen to have no label either.
    assert all(0.7 * short <= real <= short for _, _, real in [s for s in sizes if not s[0]][7::8])


def test_the_log_may_be_shorter_than_a_batch(simulated):
    options = dataclasses.replace(GRAPHED, batch_size=4096, epochs=6, outer_every=1)
    trainer = make_trainer(options)
    assert len(trainer.fit().history) == 6
    assert simulated[0].events.count("replay") == 2 * (6 - WARM_UP)


def test_the_loss_of_an_epoch_counts_real_rows_only(simulated):
    trainer = make_trainer(GRAPHED)
    with trainer.optimizers.training(), trainer.steps.running():
        trainer.steps.begin_epoch(0.0)
        total = 0.0
        for rows in (64, 64, 64, 64, 7, 64, 1):
            batch = trainer.dataset.train.take(np.arange(rows))
            with torch.no_grad():
                total += rows * trainer.model.loss(*batch).item()
            trainer.steps.inner([batch])
            assert trainer.steps.loss_sum() == pytest.approx(total, rel=1e-5)
        trainer.steps.begin_epoch(0.0)
        assert trainer.steps.loss_sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_fill_up_weigh_nothing(backend):
    batch = make_dataset().train.take(np.arange(27))
    padded = StaticBatch(64, make_model().config, CPU)
    padded.fill(make_dataset().train.take(np.arange(64)))
    padded.fill(batch)
    gradients = {}
    for name, rows in (("actual", padded.batch), ("eager", batch), ("oracle", batch)):
        model = make_model(backend="reference" if name == "oracle" else backend)
        if name == "oracle":
            model.double()
        loss = model.loss(*rows)
        loss.backward()
        gradients[name] = {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}}
    for name, gradient in gradients["actual"].items():
        assert_close_to_oracle(gradient, gradients["eager"][name], gradients["oracle"][name], GRADIENT, name)


def addresses(trainer):
    """Where everything lies that a captured step reads and writes, gradients apart."""
    optimizers = [trainer.optimizers.network, trainer.optimizers.fusion]
    tensors = list(trainer.model.parameters())
    for optimizer in optimizers:
        tensors += [tensor for state in optimizer.state.values() for tensor in state.values()]
        tensors += [group["lr"] for group in optimizer.param_groups]
    return [tensor.data_ptr() for tensor in tensors]


def test_nothing_moves_between_a_capture_and_the_last_replay(simulated, tmp_path):
    trainer = make_trainer(dataclasses.replace(GRAPHED, epochs=4), out=tmp_path)
    (capture,) = simulated
    seen = []
    record = capture.record

    def watched(step):
        replay = record(step)
        return lambda: (seen.append(addresses(trainer)), replay())

    capture.record = watched
    trainer.fit()
    assert len(seen) > 30
    # The state of the fusion weights is made in their first outer step, before the second capture.
    assert all(one == seen[-1] for one in seen)
    assert addresses(trainer) == seen[-1]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_new_rate_holds_from_the_next_replay(simulated):
    trainer = make_trainer(GRAPHED)
    inner, outer = (trainer.dataset.train.take(np.arange(rows)) for rows in (64, trainer.held_out.batch_rows))
    network, fusion = (o.param_groups[0]["lr"] for o in (trainer.optimizers.network, trainer.optimizers.fusion))
    with trainer.optimizers.training(), trainer.steps.running():
        for _ in range(WARM_UP + 2):
            trainer.steps.inner([inner])
            trainer.steps.outer(outer, inner)
        for rates, moves in (((0.0, 0.0), (False, False)), ((0.5, 0.0), (True, False)), ((0.0, 0.5), (False, True))):
            for rate, value in zip((network, fusion), rates, strict=True):
                rate.fill_(value)
            before = bits(trainer.model)
            trainer.steps.inner([inner])
            trainer.steps.outer(outer, inner)
            after = bits(trainer.model)
            moved = tuple(not torch.equal(before[name], after[name]) for name in ("embedding", "alpha_task"))
            assert moved == moves
    assert simulated[0].events.count("capture") == 2


def test_rates_are_written_by_the_schedulers_of_torch():
    optimizers = Optimizers(make_model(), GRAPHED, tensor_lr=True)
    rate = optimizers.network.param_groups[0]["lr"]
    torch.optim.lr_scheduler.LambdaLR(optimizers.network, lambda step: 0.5)
    assert optimizers.network.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(GRAPHED.lr / 2)


# One step ----------------------------------------------------------------------------------------


def test_a_step_is_warmed_up_captured_and_replayed_and_every_call_is_a_step():
    model, capture, seen = make_model(), Repeats(), []
    static = StaticBatch(8, model.config, CPU)
    step = GraphedStep(lambda: seen.append(static.batch.domain.tolist()), static, capture)
    batches = [make_dataset().train.take(np.arange(at, at + 8)) for at in range(10)]
    for _ in range(2):
        for batch in batches[len(seen) : len(seen) + 5]:
            step(batch)
        assert capture.events == ["warm-up"] * WARM_UP + ["capture", "replay", "replay"]
        capture.events.clear()
        step.release()
    assert seen == [batch.domain.tolist() for batch in batches]


def test_a_shorter_batch_leaves_no_row_of_a_longer_one():
    static = StaticBatch(8, make_model().config, CPU)
    kept = [tensor.data_ptr() for tensor in static.batch[:4]]
    part = make_dataset().train
    static.fill(part.take(np.arange(8)))
    batch = part.take(np.arange(10, 13))
    static.fill(batch)
    for own, new in zip(static.batch[:4], batch[:4], strict=True):
        assert own.dtype == new.dtype
        torch.testing.assert_close(own[:3], new, rtol=0, atol=0, equal_nan=True)
    assert not static.batch.ids[3:].any()
    assert not static.batch.dense[3:].any()
    assert not static.batch.domain[3:].any()
    assert static.batch.label[3:].isnan().all()
    assert static.rows.item() == 3
    assert [tensor.data_ptr() for tensor in static.batch[:4]] == kept


def test_a_batch_may_lack_ids_and_dense_columns_but_not_be_too_long():
    config = dataclasses.replace(make_model().config, vocab_sizes=(), num_dense=1)
    static = StaticBatch(2, config, CPU)
    batch = Batch(torch.zeros((3, 0), dtype=torch.int32), torch.ones(3, 1), torch.zeros(3).long(), torch.ones(3, 2))
    static.fill(Batch(*(tensor[:1] for tensor in batch[:4])))
    assert static.batch.dense.tolist() == [[1], [0]]
    with pytest.raises(ValueError, match="a batch of 3 rows does not fit a step captured for 2"):
        static.fill(batch)


def test_the_flag_for_captures_is_set_inside_only():
    optimizers = Optimizers(make_model(), GRAPHED, tensor_lr=True)

    def flags():
        return [o.param_groups[0]["capturable"] for o in (optimizers.network, optimizers.fusion)]

    with pytest.raises(RuntimeError, match="capture failed"), optimizers.capturable():
        assert flags() == [True, True]
        raise RuntimeError("capture failed")
    assert flags() == [False, False]


# Resume ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(GRAPHED, EAGER), (EAGER, GRAPHED)])
def test_a_run_goes_on_with_captured_steps_and_without(simulated, tmp_path, first, second):
    make_trainer(dataclasses.replace(first, epochs=2), out=tmp_path).fit()
    resumed = make_trainer(dataclasses.replace(second, epochs=4), out=tmp_path, model=make_model(seed=5))
    assert len(resumed.fit(resume="last").history) == 4
    options = dataclasses.replace(EAGER, epochs=4)
    straight = [trained(options, "reference", nudge=seed)[0] for seed in (None, 0, 1, 2)]
    oracle, _ = trained(options, "reference", double=True)
    assert_same_training(bits(resumed.model), straight, oracle)


def test_captured_two_and_two_epochs_are_four_bit_for_bit(simulated, tmp_path):
    make_trainer(dataclasses.replace(GRAPHED, epochs=2), out=tmp_path).fit()
    resumed = make_trainer(dataclasses.replace(GRAPHED, epochs=4), out=tmp_path, model=make_model(seed=5))
    rates = [o.param_groups[0]["lr"] for o in (resumed.optimizers.network, resumed.optimizers.fusion)]
    resumed.fit(resume="last")
    straight, _ = trained(dataclasses.replace(GRAPHED, epochs=4), "reference")
    assert_same_bits(bits(resumed.model), straight)
    for rate, optimizer in zip(rates, (resumed.optimizers.network, resumed.optimizers.fusion), strict=True):
        assert optimizer.param_groups[0]["lr"] is rate


def test_a_checkpoint_of_a_captured_run_has_the_state_of_an_eager_one(simulated, tmp_path):
    options = [dataclasses.replace(o, epochs=1, lr=1e-3) for o in (GRAPHED, EAGER)]
    for name, own in zip(("graphed", "eager"), options, strict=True):
        make_trainer(own, out=tmp_path / name).fit()
    graphed, eager = (
        checkpoint.read(tmp_path / name / "checkpoints" / "last")["trainer"] for name in ("graphed", "eager")
    )
    assert graphed["options"] == eager["options"]
    for key in ("network_optimizer", "fusion_optimizer"):
        assert graphed[key]["param_groups"] == eager[key]["param_groups"]
        assert isinstance(graphed[key]["param_groups"][0]["lr"], float)
        for one, other in zip(graphed[key]["state"].values(), eager[key]["state"].values(), strict=True):
            assert torch.equal(one["step"], other["step"])


# When --------------------------------------------------------------------------------------------


def test_a_gpu_with_backend_triton_and_one_optimizer_has_graphs():
    assert graph.reasons_against(TrainOptions(), GPU, "triton") == []
    assert graph.is_used(TrainOptions(), GPU, "triton")
    assert graph.is_used(TrainOptions(cuda_graph="on"), GPU, "triton")
    assert not graph.is_used(TrainOptions(cuda_graph="off"), GPU, "triton")
    assert graph.notice(TrainOptions(), GPU, "triton") is None


@pytest.mark.parametrize(
    ("device", "backend", "embedding_optimizer", "reason"),
    [
        (CPU, "triton", "same", "the model is on cpu"),
        (GPU, "reference", "same", "backend reference is not made for it"),
        (GPU, "triton", "lazy_adam", "embedding_optimizer is lazy_adam"),
        (GPU, "triton", "row_adagrad", "embedding_optimizer is row_adagrad"),
    ],
)
def test_each_reason_is_given(device, backend, embedding_optimizer, reason):
    auto, on, off = (
        TrainOptions(cuda_graph=choice, embedding_optimizer=embedding_optimizer) for choice in ("auto", "on", "off")
    )
    (given,) = graph.reasons_against(auto, device, backend)
    assert given.startswith(reason)
    assert not graph.is_used(auto, device, backend)
    with pytest.raises(ConfigError, match=f"^cuda_graph on is impossible here: {reason}"):
        graph.is_used(on, device, backend)
    notice = graph.notice(auto, device, backend)
    assert notice is None if device == CPU else reason in notice
    assert graph.notice(off, device, backend) is None


@pytest.mark.parametrize(
    ("changed", "bags", "reason"),
    [
        ({"accumulate": 2}, False, "accumulate is 2"),
        ({"bilevel": "unrolled"}, False, "bilevel is unrolled"),
        ({"bilevel": "implicit"}, False, "bilevel is implicit"),
        ({}, True, "the log has multi-hot fields"),
    ],
)
def test_what_has_no_fixed_shape_or_looks_at_values_is_not_captured(changed, bags, reason):
    (given,) = graph.reasons_against(TrainOptions(**changed), GPU, "triton", bags)
    assert given.startswith(reason)


def test_rows_have_their_weights_in_a_captured_batch_and_those_that_fill_up_none():
    static = StaticBatch(4, make_model().config, CPU, weighted=True)
    batch = make_dataset().train.take(np.arange(3))._replace(row_weight=torch.tensor([1.0, 2.0, 3.0]))
    static.fill(batch)
    assert static.batch.row_weight.tolist() == [1.0, 2.0, 3.0, 0.0]


def test_on_names_every_reason():
    options = dataclasses.replace(OPTIONS, cuda_graph="on", embedding_optimizer="lazy_adam")
    with pytest.raises(ConfigError, match=r"on cpu.*; backend reference.*; embedding_optimizer is lazy_adam"):
        make_trainer(options)


@pytest.mark.parametrize(("device", "times"), [(CPU, 0), (GPU, 1)])
def test_auto_says_once_on_a_gpu_why_there_is_no_graph(monkeypatch, device, times):
    monkeypatch.setattr("m3oe_fast.training.trainer.device_of", lambda model: device)
    display = Listens()
    make_trainer(display=display).fit()
    assert [text.startswith("steps run without a CUDA graph: backend reference") for text in display.said] == [
        True
    ] * times


def test_inputs_are_checked_once_an_epoch(monkeypatch):
    trainer, calls = make_trainer(), []
    monkeypatch.setattr(trainer.model, "check_inputs", lambda: calls.append(trainer.progress.epoch))
    trainer.fit()
    assert calls == [0, 1, 2]


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bilevel", ["published", "alternating"])
def test_cuda_graphs_train_as_eager_steps(tmp_path, bilevel):
    torch.use_deterministic_algorithms(False)  # cuBLAS refuses it unless a variable was set before the start
    weights = []
    for choice in ("on", "off"):
        model = make_model().cuda()
        model.backend = "triton"
        options = dataclasses.replace(EAGER, bilevel=bilevel, epochs=5, cuda_graph=choice)
        make_trainer(dataclasses.replace(options, epochs=2), model=model, out=tmp_path / choice).fit()
        make_trainer(options, model=model, out=tmp_path / choice).fit(resume="last")
        weights.append({name: weight.cpu() for name, weight in bits(model).items()})
    oracle, _ = trained(dataclasses.replace(EAGER, bilevel=bilevel, epochs=5), "reference", double=True)
    captured, eager = weights
    assert_same_training(captured, [eager], oracle)
