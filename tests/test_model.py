"""M3oE: both backends agree, inputs are checked by name, training and files work, compile and export do too."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig, _extension, kernels, reference
from m3oe_fast.errors import BackendError, CheckpointError, ConfigError
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

CONFIG = M3oEConfig(
    [50, 30, 4], 2, 3, 2, shared_experts=4, embed_dim=8, star_dim=32, hidden_dim=48, expert_dims=(24,), tower_dim=16
)
SWITCHED = M3oEConfig(
    [7], 0, 5, 3, shared_experts=1, star_dim=16, hidden_dim=17, expert_dims=(9, 33), star_activation="linear",
    gate_detach=False, fusion="per_index",
)  # fmt: skip
PER_PAIR = dataclasses.replace(CONFIG, fusion="per_pair")


def batch(config: M3oEConfig, rows: int = 200, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(v, (rows,), generator=g) for v in config.vocab_sizes], dim=1)
    dense = torch.randn(rows, config.num_dense, generator=g)
    domain = torch.randint(config.num_domains, (rows,), generator=g)
    label = torch.randint(2, (rows, config.num_tasks), generator=g).float()
    label[torch.rand(label.shape, generator=g) < 0.2] = float("nan")
    return ids, dense, domain, label


def make(config: M3oEConfig = CONFIG, backend: str = "cpu") -> M3oE:
    torch.manual_seed(0)
    model = M3oE(config, backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        SWITCHED,
        PER_PAIR,
        dataclasses.replace(PER_PAIR, num_domains=1),
        dataclasses.replace(PER_PAIR, num_tasks=1),
        dataclasses.replace(PER_PAIR, num_domains=1, num_tasks=1),
    ],
    ids=["default", "switched", "per_pair", "per_pair-D1", "per_pair-T1", "per_pair-D1T1"],
)
def test_loss_and_every_gradient_against_the_oracle(config):
    ours = make(config)
    eager, oracle = copy.deepcopy(ours), copy.deepcopy(ours).double()
    eager.backend = oracle.backend = "reference"
    ids, dense, domain, label = batch(config)
    losses = [m.loss(ids, dense, domain, label) for m in (ours, eager, oracle)]
    assert_close_to_oracle(*losses, FORWARD, "loss")
    for loss in losses:
        loss.backward()
    for (name, a), b, c in zip(ours.named_parameters(), eager.parameters(), oracle.parameters(), strict=True):
        if c.grad is None:  # a linear star term has no LayerNorm, a single shared expert no choice
            assert name in ("star_gain", "star_offset") and not a.grad.any()
        else:
            assert_close_to_oracle(a.grad, b.grad, c.grad, GRADIENT, name)


def test_default_backend_on_a_cpu_is_the_compiled_one():
    model = M3oE(CONFIG)
    assert model.backend_name == "cpu"
    assert model.isa_name == _extension.load().cpu_isa()
    assert model.double().isa_name == "scalar"


def test_published_initialisation():
    torch.manual_seed(0)
    model = M3oE(M3oEConfig([1000], 1, 2, 2))
    assert model.embedding.std().item() == pytest.approx(1e-4, rel=0.05)
    assert not model.star_bias.any() and (model.star_gain == 1).all()
    bound = (6 / (17 + 512)) ** 0.5
    assert bound * 0.99 < model.star_weight.abs().max().item() <= bound
    assert model.skip_bias.abs().max().item() <= 17**-0.5
    assert model.fusion_values()["beta_task"] == pytest.approx(0.7311, abs=1e-4)
    assert (M3oE(M3oEConfig([9], 1, 2, 2, init="star")).star_weight == 1).all()


def test_fusion_and_network_parameters_are_disjoint_and_complete():
    model = M3oE(CONFIG)
    fusion, network = model.fusion_parameters(), model.network_parameters()
    assert {id(p) for p in fusion} | {id(p) for p in network} == {id(p) for p in model.parameters()}
    assert len(fusion) + len(network) == len(list(model.parameters())) and len(fusion) == 4


@pytest.mark.parametrize(
    ("fusion", "shapes"),
    [("scalar", [(), ()]), ("per_index", [(3,), (2,)]), ("per_pair", [(3, 2), (3, 2)])],
)
def test_fusion_values_have_the_shape_of_the_logits_and_the_published_start(fusion, shapes):
    model = M3oE(dataclasses.replace(CONFIG, fusion=fusion))
    for name, value in model.fusion_values().items():
        expected = torch.full(shapes[name.endswith("task")], 0.7310586)
        torch.testing.assert_close(torch.tensor(value), expected)
        assert getattr(model, name).shape == expected.shape


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_fusion_weights_of_all_pairs_are_the_scalar_ones(backend):
    scalar, pairs = make(backend=backend), make(PER_PAIR, backend=backend)
    state = scalar.state_dict()
    state |= {name: state[name].expand(3, 2) for name in scalar.fusion_values()}
    pairs.load_state_dict(state)
    inputs = batch(CONFIG)
    losses = [m.loss(*inputs) for m in (scalar, pairs)]
    assert torch.equal(*losses) and torch.equal(scalar(*inputs[:3]), pairs(*inputs[:3]))
    for loss in losses:
        loss.backward()
    for name in scalar.fusion_values():
        torch.testing.assert_close(getattr(pairs, name).grad.sum(), getattr(scalar, name).grad, rtol=1e-4, atol=1e-7)


def test_fusion_weights_of_every_pair_are_saved_and_another_kind_is_refused(tmp_path):
    model = make(PER_PAIR)
    model.save(tmp_path)
    assert M3oE.load(tmp_path).fusion_values() == model.fusion_values()
    with pytest.raises(CheckpointError, match=r"weight 'alpha_domain' is \[3, 2\], this model needs \[\]"):
        make().load_weights(model.state_dict(), source="other")


@pytest.mark.parametrize("ids_type", [torch.int32, torch.int64])
def test_narrow_and_wide_ids(ids_type):
    model = make()
    ids, dense, domain, _ = batch(CONFIG)
    expected = model.predict(ids, dense, domain)
    assert torch.equal(model.predict(ids.to(ids_type), dense, domain.to(ids_type)), expected)
    assert expected.dtype == torch.float32 and not expected.requires_grad
    assert ((expected > 0) & (expected < 1)).all()


def test_every_id_is_a_real_row_and_fields_do_not_mix():
    model = make()
    ids, dense, _, _ = batch(CONFIG, rows=1)
    x = model.embed(ids, dense)
    first = [0, 50, 80]
    expected = [model.embedding[first[f] + ids[0, f]] for f in range(3)]
    assert torch.equal(x[0], torch.cat([*expected, dense[0]]))


@pytest.mark.parametrize("rows", [0, 1])
def test_tiny_batches(rows):
    model = make()
    ids, dense, domain, label = batch(CONFIG, rows)
    assert model(ids, dense, domain).shape == (rows, 2)
    loss = model.loss(ids, dense, domain, label)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_all_labels_missing_gives_zero_loss_and_zero_gradients():
    model = make()
    ids, dense, domain, label = batch(CONFIG)
    loss = model.loss(ids, dense, domain, torch.full_like(label, float("nan")))
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: (b[0][:, :2], *b[1:]), ValueError, r"ids must be \[B, F\] with F = 3"),
        (lambda b: (b[0], b[1][:, :1], *b[2:]), ValueError, "dense must be"),
        (lambda b: (b[0], b[1], b[2][:-1], b[3]), ValueError, "domain must be"),
        (lambda b: (b[0].float(), *b[1:]), TypeError, "ids must be int32"),
        (lambda b: (b[0], b[1].long(), *b[2:]), TypeError, "dense must be floating"),
        (lambda b: (*b[:3], b[3][:, :1]), ValueError, "label must be"),
        (lambda b: (b[0] + 50, *b[1:]), ValueError, r"ids\[0, 0\] is \d+, field 0 has 50 rows"),
        (lambda b: (*b[:2], b[2] - 1, b[3]), ValueError, r"domain\[\d+\] is -1, the model has 3 domains"),
    ],
)
def test_wrong_inputs_are_named(change, error, message):
    with pytest.raises(error, match=message):
        make().loss(*change(batch(CONFIG)))


def test_an_id_past_its_field_does_not_read_the_next_field():
    ids, dense, domain, _ = batch(CONFIG)
    ids[17, 1] = 30
    with pytest.raises(ValueError, match=r"ids\[17, 1\] is 30, field 1 has 30 rows"):
        make()(ids, dense, domain)


@pytest.mark.parametrize("row_weight", [torch.ones(200, 1), torch.ones(1), torch.ones(200, dtype=torch.int64)])
def test_wrong_row_weights_are_named(row_weight):
    with pytest.raises(ValueError, match="row_weight must be"):
        make().loss(*batch(CONFIG), row_weight=row_weight)


def test_labels_outside_the_unit_interval_are_named():
    ids, dense, domain, label = batch(CONFIG)
    label[7, 1] = 2.0
    with pytest.raises(ValueError, match=r"label\[7, 1\] is 2.0"):
        make().loss(ids, dense, domain, label)


def test_a_compiled_model_refuses_an_id_past_its_field():
    model = make()
    ids, dense, domain, _ = batch(CONFIG)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(ids, dense, domain)
    ids[17, 1] = 30
    with pytest.raises(RuntimeError, match=r"ids\[17, 1\] is 30, field 1 has 30 rows"):
        compiled(ids, dense, domain)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD", "Adagrad"])
@pytest.mark.parametrize("fused", [False, True])
def test_prediction_follows_every_optimizer_step(optimizer, fused):
    model, twin = make(), make(backend="reference")
    ids, dense, domain, label = batch(CONFIG)
    optimizers = [getattr(torch.optim, optimizer)(m.parameters(), lr=0.05, fused=fused) for m in (model, twin)]
    before = model.predict(ids, dense, domain)
    for m, o in zip((model, twin), optimizers, strict=True):
        m.loss(ids, dense, domain, label).backward()
        o.step()
    after = model.predict(ids, dense, domain)
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, twin.predict(ids, dense, domain), rtol=0, atol=2e-3)
    with torch.no_grad():
        model.head_bias.data.add_(1.0)
    assert not torch.allclose(model.predict(ids, dense, domain), after, atol=1e-2)


def test_training_with_both_backends_walks_together():
    ours, theirs = make(), make(backend="reference")
    ids, dense, domain, label = batch(CONFIG, rows=400)
    curves = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = model.loss(ids, dense, domain, label)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=2e-3)


def test_autocast_does_not_change_the_precision():
    model = make()
    ids, dense, domain, label = batch(CONFIG)
    expected = model(ids, dense, domain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(ids, dense, domain)
        model.loss(ids, dense, domain, label).backward()
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


def test_compiles_as_one_graph_and_exports():
    model = make()
    ids, dense, domain, _ = batch(CONFIG)
    expected = model(ids, dense, domain)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, dense, domain), expected)
    with torch.no_grad():
        program = torch.export.export(
            model, (ids, dense, domain), dynamic_shapes=[{0: torch.export.Dim("rows", min=2)}] * 3
        )
    assert "m3oe_fast.network_fwd" in str(program.graph)
    other = batch(CONFIG, rows=33, seed=1)[:3]
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_a_compiled_training_step_gives_the_same_gradients():
    model = make()
    inputs = batch(CONFIG)
    model.loss(*inputs).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model.loss, fullgraph=True, backend="aot_eager")(*inputs).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_row_weights_that_want_a_gradient_get_one():
    model, twin = make(), make(backend="reference")
    row_weight = torch.rand(200, requires_grad=True)
    grads = [torch.autograd.grad(m.loss(*batch(CONFIG), row_weight=row_weight), row_weight)[0] for m in (model, twin)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
    plain = model.loss(*batch(CONFIG), row_weight=row_weight.detach())
    torch.testing.assert_close(plain, model.loss(*batch(CONFIG), row_weight=row_weight))


# Weights and losses of the pairs ------------------------------------------------------------------------------------


def pair_weights() -> torch.Tensor:
    """[D, T] off one, with a pair that counts for nothing."""
    weight = torch.rand(3, 2, generator=torch.Generator().manual_seed(7)) + 0.5
    weight[1, 0] = 0
    return weight


@pytest.mark.parametrize("weighted", [False, True])
def test_weighted_pairs_and_their_gradients_against_the_oracle(weighted):
    """With an absent domain, a pair without labels and a weight of zero."""
    ours, eager, oracle = make(PER_PAIR), make(PER_PAIR, "reference"), make(PER_PAIR, "reference").double()
    ids, dense, domain, label = batch(CONFIG)
    domain = domain.clamp(max=1)
    label[domain == 0, 1] = float("nan")
    row_weight = torch.rand(200, generator=torch.Generator().manual_seed(1)) if weighted else None
    results = []
    for model in (ours, eager, oracle):
        pair_weight = pair_weights().to(model.embedding.dtype).requires_grad_()
        loss, pair_loss = model.losses(ids, dense, domain, label, row_weight, pair_weight=pair_weight)
        assert not pair_loss.requires_grad
        assert not pair_loss[2].any() and pair_loss[0, 1] == 0 and (pair_loss[1] > 0).all()
        (loss * 1.7).backward()
        results.append([loss.detach(), pair_loss, pair_weight.grad, *(p.grad for p in model.parameters())])
        torch.testing.assert_close(pair_weight.grad, 1.7 * pair_loss)
    labels = ["loss", "pair_loss", "pair_weight", *(name for name, _ in ours.named_parameters())]
    for label, *values in zip(labels, *results, strict=True):
        assert_close_to_oracle(*values, FORWARD if "loss" in label else GRADIENT, label)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_loss_is_the_weighted_sum_of_the_pair_losses(grad, backend):
    model, inputs = make(backend=backend), batch(CONFIG)
    with torch.set_grad_enabled(grad):
        loss, pair_loss = model.losses(*inputs)
        expected = reference.pair_losses(model(*inputs[:3]), inputs[2], inputs[3], 3)
        torch.testing.assert_close(pair_loss, expected.detach())
        torch.testing.assert_close(loss, expected.sum())
        assert torch.equal(loss, model.loss(*inputs)) and loss.requires_grad == grad
        weighted, same = model.losses(*inputs, pair_weight=pair_weights())
        assert torch.equal(same, pair_loss)
        torch.testing.assert_close(weighted, (expected * pair_weights()).sum())
        assert torch.equal(weighted, model.loss(*inputs, pair_weight=pair_weights()))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_weight_no_gradient(backend):
    model = make(backend=backend)
    loss, pair_loss = model.losses(*batch(CONFIG), pair_weight=torch.zeros(3, 2))
    loss.backward()
    assert loss.item() == 0 and (pair_loss > 0).all() and not any(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pairs_weighted_by_their_trained_uncertainty(backend):
    """Weights that a parameter gives and that have another dtype and strides: the gradient reaches the parameter."""
    model = make(backend=backend)
    log_variance = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.exp(-log_variance).expand(2, 3).T
    loss, pair_loss = model.losses(*batch(CONFIG), pair_weight=weight)
    loss.backward()
    torch.testing.assert_close(log_variance.grad, -pair_loss.sum(0)[:, None].double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("pair_weight", [torch.ones(2, 3), torch.ones(()), torch.ones(3, 2, dtype=torch.int64)])
def test_wrong_pair_weights_are_named(pair_weight, backend):
    with pytest.raises(ValueError, match=r"pair_weight must be floating point \[D, T\] = \[3, 2\], got"):
        make(backend=backend).loss(*batch(CONFIG), pair_weight=pair_weight)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_row_weights_that_want_a_gradient_go_with_pair_weights(backend):
    model, inputs = make(backend=backend), batch(CONFIG)
    row_weight, pair_weight = torch.rand(200, requires_grad=True), pair_weights().requires_grad_()
    loss, pair_loss = model.losses(*inputs, row_weight, pair_weight=pair_weight)
    grads = torch.autograd.grad(loss, (row_weight, pair_weight))
    torch.testing.assert_close(grads[1], pair_loss)
    expected = reference.pair_losses(model(*inputs[:3]).detach(), inputs[2], inputs[3], 3, row_weight) * pair_weights()
    torch.testing.assert_close(grads[0], torch.autograd.grad(expected.sum(), row_weight)[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_nan_weight_of_a_row_without_labels_does_not_matter(backend):
    ids, dense, domain, label = batch(CONFIG)
    label[5] = float("nan")
    grads = []
    for bad in (float("nan"), 1.0):
        model, row_weight = make(backend=backend), torch.ones(200)
        row_weight[5] = bad
        model.loss(ids, dense, domain, label, row_weight).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_loss_with_pair_weights_gives_the_same_gradients():
    model, inputs = make(), batch(CONFIG)
    compiled = torch.compile(model.losses, fullgraph=True, backend="aot_eager")
    results = []
    for function in (model.losses, compiled):
        pair_weight = pair_weights().requires_grad_()
        loss, pair_loss = function(*inputs, pair_weight=pair_weight)
        results.append([loss.detach(), pair_loss, *torch.autograd.grad(loss, [pair_weight, *model.parameters()])])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_the_loss_without_gradients_is_the_same():
    model = make()
    with torch.no_grad():
        bare = model.loss(*batch(CONFIG))
    torch.testing.assert_close(bare, model.loss(*batch(CONFIG)).detach())


def test_save_and_load(tmp_path):
    model = make()
    model.save(tmp_path / "run", trainer_state={"epoch": 3})
    loaded = M3oE.load(tmp_path / "run")
    inputs = batch(CONFIG)[:3]
    assert torch.equal(loaded.predict(*inputs), model.predict(*inputs))
    assert loaded.config == CONFIG
    reference_backend = M3oE.load(tmp_path / "run" / "model.pt", backend="reference")
    assert reference_backend.backend_name == "reference"


def test_scoring_raw_rows_in_chunks(tmp_path, monkeypatch):
    from m3oe_fast import data, model
    from m3oe_fast.data import demo

    dataset = data.load("demo", cache_dir=str(tmp_path))
    schema = dataset.schema
    sizes = (schema.vocab_sizes, len(schema.dense), len(schema.domains), len(schema.tasks))
    torch.manual_seed(0)
    scorer = M3oE(M3oEConfig(*sizes, star_dim=8, hidden_dim=8, expert_dims=(8,), tower_dim=8))
    with pytest.raises(ConfigError, match="no vocabularies"):
        scorer.score(demo.frame(10))
    scorer.encoder = dataset.encoder
    frame = demo.frame(1000)
    whole = scorer.score(frame)
    monkeypatch.setattr(model, "SCORED_AT_ONCE", 300)
    assert whole.shape == (1000, 3)
    # Not to the bit: torch.sigmoid computes the last elements of a tensor by another function than the others.
    torch.testing.assert_close(scorer.score(frame), whole, rtol=0, atol=1e-7)
    assert scorer.score(frame[:0]).shape == (0, 3)


def test_weights_of_another_configuration_are_refused_by_name():
    other = M3oE(
        M3oEConfig([50, 30, 4], 2, 3, 2, embed_dim=8, star_dim=32, hidden_dim=48, expert_dims=(25,), tower_dim=16)
    )
    with pytest.raises(CheckpointError, match=r"expert_(bias|gain|offset|weight)|tower_weight"):
        make().load_weights(other.state_dict(), source="other")
    deeper = M3oE(M3oEConfig([50, 30, 4], 2, 3, 2, embed_dim=8, expert_dims=(24, 24)))
    with pytest.raises(CheckpointError, match=r"unknown weight 'expert_bias.1'"):
        make().load_weights(deeper.state_dict(), source="deeper")


def test_a_double_model_stays_double(tmp_path):
    make().double().save(tmp_path)
    assert M3oE.load(tmp_path).embedding.dtype == torch.float64


def test_copies_and_pickles_are_independent():
    model = make()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head_bias.add_(1)
    inputs = batch(CONFIG)[:3]
    assert not torch.equal(model.predict(*inputs), twin.predict(*inputs))


def test_backend_requests():
    with pytest.raises(ConfigError, match="backend must be one of"):
        M3oE(CONFIG, backend="gpu")
    with pytest.raises(ConfigError, match="precision must be one of"):
        M3oE(CONFIG, precision="fp8")
    with pytest.raises(BackendError, match=r"'cuda' cannot run here: not built yet"):
        M3oE(CONFIG, backend="cuda")
    if not kernels.interpreted():
        with pytest.raises(BackendError, match=r"'triton' cannot run here: .*tensors are on cpu"):
            M3oE(CONFIG, backend="triton")(*batch(CONFIG, 3)[:3])
    with pytest.raises(BackendError, match=r"precision 'tf32' exists on GPUs only"):
        M3oE(CONFIG, precision="tf32", backend="cpu")
    with pytest.raises(BackendError, match=r"precision 'bf16': it computes in the dtype of its tensors"):
        M3oE(CONFIG, precision="bf16", backend="reference")
    with pytest.raises(BackendError, match=r"precision 'bf16' is for float32 tensors"):
        _ = M3oE(CONFIG, precision="bf16", backend="cpu").double().backend_name


def test_other_dtypes_fall_back_with_a_warning_that_says_why():
    from m3oe_fast import backends

    backends.choose.cache_clear()
    with pytest.warns(UserWarning, match="dtype torch.bfloat16"):
        assert make(backend="auto").bfloat16().backend_name == "reference"


def test_reference_backend_is_the_oracle():
    model = make(backend="reference")
    ids, dense, domain, _ = batch(CONFIG)
    expected = reference.forward(dict(model.named_parameters()), CONFIG, model.embed(ids, dense), domain)
    assert torch.equal(model(ids, dense, domain), expected)
