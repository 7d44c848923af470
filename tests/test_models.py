"""Every kind of model: the kernels against its readable reference in float64, its counts, its files, its training."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import m3oe_fast
from m3oe_fast import M3oE, M3oEConfig, models, rounding
from m3oe_fast.config import ModelConfig
from m3oe_fast.errors import BackendError, CheckpointError, ConfigError
from m3oe_fast.models import MODELS
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

INPUTS = {"vocab_sizes": (50, 30, 4), "num_dense": 2, "embed_dim": 8}
SMALL = {"expert_dims": (24, 12), "tower_dim": 16}
M3OE = {"star_dim": 32, "hidden_dim": 48, **SMALL}
CASES: dict[str, tuple[str, int, int, dict]] = {
    "mlp": ("mlp", 1, 1, SMALL),
    "shared_bottom": ("shared_bottom", 3, 2, SMALL),
    "shared_bottom-odd": ("shared_bottom", 5, 3, {"expert_dims": (17, 9, 33), "tower_dim": 7}),
    "mmoe": ("mmoe", 3, 2, SMALL),
    "mmoe-mtl": ("mmoe", 1, 3, {"shared_experts": 6, "expert_dims": (33,)}),
    "ple": ("ple", 3, 2, SMALL),
    "ple-mdl": ("ple", 4, 1, {"specific_experts": 2, "shared_experts": 1, **SMALL}),
    "ple-unshared": ("ple", 3, 2, {"specific_experts": 2, "shared_experts": 0, **SMALL}),
    "adatt": ("adatt", 3, 2, SMALL),
    "adatt-several": ("adatt", 2, 2, {"specific_experts": 3, "shared_experts": 2, **SMALL}),
    "adatt_sp": ("adatt_sp", 3, 2, SMALL),
    "star": ("star", 3, 2, SMALL),
    "star-mdl": ("star", 5, 1, {"expert_dims": (17, 9), "tower_dim": 7}),
    "without domains": ("m3oe", 3, 2, {"domain_experts": False, **M3OE}),
    "without tasks": ("m3oe", 3, 2, {"task_experts": False, "fusion": "per_index", **M3OE}),
    "without both": ("m3oe", 3, 2, {"domain_experts": False, "task_experts": False, **M3OE}),
    "without shared": ("m3oe", 3, 2, {"shared_experts": 0, "fusion": "per_pair", **M3OE}),
    "gated": ("m3oe", 3, 2, {"modules": "gated", "gate_detach": False, **M3OE}),
    "gated without tasks": ("m3oe", 4, 3, {"modules": "gated", "task_experts": False, **M3OE}),
}
EAGER: dict[str, tuple[str, int, int, dict]] = {
    "ple of two levels": ("ple", 3, 2, {"levels": 2, **SMALL}),
    "ple of three levels, unshared": ("ple", 2, 2, {"levels": 3, "shared_experts": 0, "specific_experts": 2, **SMALL}),
    "adatt of two levels": ("adatt", 3, 2, {"levels": 2, "specific_experts": 2, **SMALL}),
    "adatt_sp of two levels": ("adatt_sp", 2, 3, {"levels": 2, **SMALL}),
    "concatenated": ("m3oe", 3, 2, {"modules": "concatenated", **M3OE}),
    "concatenated without domains": ("m3oe", 3, 2, {"modules": "concatenated", "domain_experts": False, **M3OE}),
}


def configure(case: tuple[str, int, int, dict]) -> ModelConfig:
    name, domains, tasks, sizes = case
    return MODELS[name].config_type(num_domains=domains, num_tasks=tasks, **INPUTS, **sizes)


def make(config: ModelConfig, backend: str = "auto", precision: str = "fp32"):
    torch.manual_seed(0)
    model = MODELS[config.name](config, backend=backend, precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch(config: ModelConfig, rows: int = 300, absent: int | None = None, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(v, (rows,), generator=g) for v in config.vocab_sizes], dim=1)
    dense = torch.randn(rows, config.num_dense, generator=g)
    domain = torch.randint(config.num_domains, (rows,), generator=g)
    if absent is not None and config.num_domains > 1:
        domain = torch.where(domain == absent, (absent + 1) % config.num_domains, domain)
    label = torch.randint(2, (rows, config.num_tasks), generator=g).float()
    label[torch.rand(label.shape, generator=g) < 0.2] = float("nan")
    return ids, dense, domain, label


def gradients(model, inputs):
    loss = model.loss(*inputs)
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def check_against_the_oracle(ours, eager, oracle, inputs):
    for model in (eager, oracle):
        model.backend = "reference"
    for compute in (lambda m: m(*inputs[:3]), lambda m: copy.deepcopy(m).eval().predict(*inputs[:3])):
        assert_close_to_oracle(*(compute(m).detach() for m in (ours, eager, oracle)), FORWARD, "logits")
    (loss, own), (eager_loss, of_eager), (exact, of_oracle) = (gradients(m, inputs) for m in (ours, eager, oracle))
    assert_close_to_oracle(*(value.detach() for value in (loss, eager_loss, exact)), FORWARD, "loss")
    for name, gradient in of_oracle.items():
        if gradient is None:  # the oracle never met it
            assert own[name] is None or not own[name].any(), name
        elif gradient.abs().max() if gradient.numel() else 0:
            assert_close_to_oracle(own[name], of_eager[name], gradient, GRADIENT, name)
        else:
            assert not own[name].any(), name


@pytest.mark.parametrize("absent", [None, 1], ids=["all", "absent"])
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_against_the_oracle(case, absent):
    config = configure(CASES[case])
    ours = make(config)
    assert ours.backend_name == "cpu"
    eager, oracle = copy.deepcopy(ours), copy.deepcopy(ours).double()
    check_against_the_oracle(ours, eager, oracle, batch(config, absent=absent))


@pytest.mark.parametrize("case", ["mmoe", "ple-mdl", "star", "adatt-several", "shared_bottom-odd", "gated"])
def test_bf16_against_the_oracle_with_rounded_products(case):
    config = configure(CASES[case])
    ours = make(config, precision="bf16")
    if ours.compute_precision != "bf16":
        pytest.skip("this processor computes bf16 in fp32")
    exact = make(config).double()
    inputs = batch(config)
    named = {name: p.detach() for name, p in exact.named_parameters()}
    x = exact.embed(inputs[0], inputs[1].double()).detach()
    oracle = type(exact).reference(named, config, x, inputs[2])
    single = {name: p.float() for name, p in named.items()}
    eager = type(exact).reference(single, config, x.float(), inputs[2], matmul=rounding.matmul("bf16"))
    assert_close_to_oracle(ours(*inputs[:3]).detach(), eager, oracle, FORWARD, "logits")


@pytest.mark.parametrize("case", CASES | EAGER)
def test_every_parameter_takes_part(case):
    """None is dead: a typo in a name or an index would leave some without a gradient."""
    name, domains, tasks, sizes = (CASES | EAGER)[case]
    model = make(configure((name, domains, tasks, sizes)), "reference").double()
    found = gradients(model, batch(model.config))[1]
    for parameter, gradient in found.items():
        if gradient is not None and gradient.numel() and "gate" in parameter and gradient.shape[-1] == 1:
            continue  # a softmax over one
        assert gradient is None or not gradient.numel() or gradient.any(), parameter
        assert gradient is not None or not dict(model.named_parameters())[parameter].numel(), parameter


@pytest.mark.parametrize("case", EAGER)
def test_what_the_kernels_cannot_compute_runs_in_eager_pytorch_and_says_so(case):
    config = configure(EAGER[case])
    model = make(config)
    assert not config.fused and model.backend_name == "reference" and model.isa_name is None
    inputs = batch(config)
    loss, _ = gradients(model, inputs)
    assert torch.isfinite(loss) and torch.isfinite(model.eval().predict(*inputs[:3])).all()
    for backend in ("cpu", "triton"):
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot run {config.name} as it is configured"):
            make(config, backend)
    with pytest.raises(BackendError, match=r"bf16.* computes in the dtype of its tensors"):
        make(config, precision="bf16")
    with pytest.raises(ConfigError, match="backend must be one of"):
        make(config, "gpu")


def test_more_levels_with_the_weights_of_one_are_another_model():
    """The second level reads what the first made for the pair: a naive PLE, expert by expert, agrees."""
    config = configure(("ple", 2, 2, {"levels": 2, "shared_experts": 2, "specific_experts": 1, **SMALL}))
    model = make(config, "reference").double()
    p = {name: value.detach() for name, value in model.named_parameters()}
    ids, dense, domain, _ = batch(config, rows=5)
    x = model.embed(ids, dense.double()).detach()

    def layers(z, stack, e):
        for i in range(2):
            z = z @ p[f"{stack}_weight.{i}"][e] + p[f"{stack}_bias.{i}"][e]
            z = torch.nn.functional.layer_norm(z, z.shape[-1:])
            z = torch.relu(z * p[f"{stack}_gain.{i}"][e] + p[f"{stack}_offset.{i}"][e])
        return z

    expected = torch.zeros(5, 2, dtype=torch.float64)
    for row in range(5):
        d = int(domain[row])
        first = [layers(x[row], "expert", e) for e in range(6)]
        share = torch.softmax(x[row] @ p["level0_shared_gate_weight"] + p["level0_shared_gate_bias"], -1)
        shared = sum(s * z for s, z in zip(share, first, strict=True))
        for t in range(2):
            pair = d * 2 + t
            share = torch.softmax(x[row] @ p["gate_weight"][d, t] + p["gate_bias"][d, t], -1)
            a = share[0] * first[0] + share[1] * first[1] + share[2] * first[2 + pair]
            second = [layers(shared, "level1_expert", e) for e in range(2)] + [layers(a, "level1_expert", 2 + pair)]
            share = torch.softmax(a @ p["level1_gate_weight"][pair] + p["level1_gate_bias"][pair], -1)
            u = sum(s * z for s, z in zip(share, second, strict=True))
            h = u @ p["tower_weight"][d, t] + p["tower_bias"][d, t]
            h = torch.nn.functional.layer_norm(h, h.shape[-1:]) * p["tower_gain"][d, t] + p["tower_offset"][d, t]
            expected[row, t] = torch.relu(h) @ p["head_weight"][d, t] + p["head_bias"][d, t]
    torch.testing.assert_close(model(ids, dense, domain), expected, rtol=1e-12, atol=1e-12)


def test_adatt_with_equal_gates_is_the_mean_of_all_plus_the_own():
    """AdaTT, eq. 2 to 4, where every number can be told by hand: AllExpertGF is a mean, NativeExpertLF the own one."""
    config = configure(("adatt_sp", 2, 2, SMALL))
    model = make(config, "cpu").double()
    with torch.no_grad():
        model.gate_weight.zero_()
        model.gate_bias.zero_()
        model.native_weight.fill_(1)
    table = model.weights(lambda *_: None).table
    assert torch.equal(table, torch.eye(4, dtype=torch.float64).reshape(2, 2, 4))
    assert model.gate_mask is None


def test_star_starts_every_domain_from_the_shared_network():
    config = configure(("star", 3, 2, SMALL))
    torch.manual_seed(0)
    model = MODELS["star"](config)
    ids, dense, _, _ = batch(config)
    of_domains = [model.predict(ids, dense, torch.full((len(ids),), d)) for d in range(3)]
    torch.testing.assert_close(of_domains[0], of_domains[1])
    assert model.weights(lambda *_: None).table.tolist()[1] == [[0, 1, 0], [0, 1, 0]]


def test_ple_gates_the_shared_and_its_own_experts():
    model = make(configure(("ple", 2, 2, {"specific_experts": 2, "shared_experts": 1, **SMALL})))
    assert [row.nonzero().flatten().tolist() for row in model.gate_mask.flatten(0, 1)] == [
        *([0, 1, 2], [0, 3, 4], [0, 5, 6], [0, 7, 8])
    ]
    assert model.gate_weight.shape == (2, 2, model.config.input_dim, 3)  # no gate weight for what a pair never sees


@pytest.mark.parametrize("case", CASES | EAGER)
def test_multiply_adds_are_those_of_the_reference_for_one_domain(case):
    """The reference computes every domain and every expert; with D = 1 and nothing to route, what is counted is what a
    row needs. torch counts the products, the weighted sums of experts come on top."""
    name, _, tasks, sizes = (CASES | EAGER)[case]
    config = configure((name, 1, tasks, sizes))
    model = make(config, "reference")
    ids, dense, domain, _ = batch(config, rows=16)
    x = model.embed(ids, dense)
    named = dict(model.named_parameters())
    with FlopCounterMode(display=False) as counter:
        type(model).reference(named, config, x, domain)
    products = counter.get_total_flops() / 2 / 16
    mixed = model.multiply_adds() - products
    if name == "m3oe":  # the star layer counts folded: [I, H] instead of [I, S] and [S, H]
        mixed += config.input_dim * (config.star_dim - config.hidden_dim) + config.star_dim * config.hidden_dim
    assert mixed >= 0 and mixed % config.expert_dim == 0
    most = (config.num_tasks + 1) * config.num_experts * getattr(config, "levels", 1)
    assert mixed / config.expert_dim <= most


def test_multiply_adds_count_what_a_row_needs():
    """PLE of D = 3 and T = 2: 2 of 6 specific experts. STAR: one domain's layers."""
    width = 3 * 8 + 2
    stack = width * 24 + 24 * 12
    towers = 2 * (12 * 16 + 16)
    ple = make(configure(("ple", 3, 2, {"shared_experts": 4, **SMALL})))
    assert ple.multiply_adds() == 6 * stack + 2 * width * 5 + 2 * 5 * 12 + towers
    assert make(configure(("star", 3, 2, SMALL))).multiply_adds() == stack + 2 * 12 + towers


# Files and configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["mlp", "ple", "star", "adatt", "gated", "without tasks"])
def test_a_saved_model_comes_back_as_what_it_was(case, tmp_path):
    config = configure(CASES[case])
    model = make(config).eval()
    model.save(tmp_path)
    loaded = m3oe_fast.load(tmp_path)
    assert type(loaded) is type(model) and loaded.config == config
    inputs = batch(config)[:3]
    assert torch.equal(loaded.predict(*inputs), model.predict(*inputs))


def test_another_kind_of_checkpoint_is_refused_by_name(tmp_path):
    make(configure(CASES["mmoe"])).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a model mmoe, not m3oe; m3oe_fast\.load reads any"):
        M3oE.load(tmp_path)
    content = m3oe_fast.checkpoint.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a model 'dcn', this version knows mlp, .*; update m3oe_fast"):
        models.from_checkpoint(content | {"model": "dcn"}, tmp_path)
    old = {name: value for name, value in content.items() if name != "model"}
    with pytest.raises(CheckpointError, match="it belongs to another configuration"):
        models.from_checkpoint(old, tmp_path)  # files of older versions are of m3oe


def test_a_checkpoint_written_before_there_were_kinds_is_m3oe(tmp_path):
    model = make(configure(("m3oe", 3, 2, M3OE)))
    model.save(tmp_path)
    content = m3oe_fast.checkpoint.read(tmp_path)
    del content["model"]
    for field in ("domain_experts", "task_experts", "modules"):
        del content["config"][field]
    m3oe_fast.checkpoint.write(tmp_path / "model.pt", {k: v for k, v in content.items() if k != "format"})
    assert M3oE.load(tmp_path).config == model.config


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("mlp", {"num_domains": 2}, "mlp is a model of one domain and one task, not of num_domains 2 and num_tasks 1"),
        ("mmoe", {"shared_experts": 0}, "shared_experts must be an integer of at least 1, got 0"),
        ("ple", {"specific_experts": 0}, "specific_experts must be an integer of at least 1"),
        ("ple", {"levels": 0}, "levels must be an integer of at least 1"),
        ("adatt", {"shared_experts": -1}, "shared_experts must be an integer of at least 0"),
        ("star", {"expert_dims": ()}, "expert_dims must name at least one layer width"),
        ("star", {"tower_dim": 0}, "tower_dim must be an integer of at least 1"),
        ("m3oe", {"domain_experts": 1}, "domain_experts must be true or false, got 1"),
        ("m3oe", {"modules": "mixed"}, "modules must be one of 'balanced', 'gated', 'concatenated'"),
        (
            "m3oe",
            {"shared_experts": 0, "domain_experts": False, "task_experts": False},
            "no expert is left: shared_experts is 0",
        ),
    ],
)
def test_wrong_sizes_name_the_field(name, changed, message):
    with pytest.raises(ConfigError, match=message):
        MODELS[name].config_type(**{**INPUTS, "num_domains": 1, "num_tasks": 1, **changed})


def test_a_model_takes_its_own_configuration_only():
    with pytest.raises(ConfigError, match="MMoE takes a MMoEConfig, got M3oEConfig"):
        MODELS["mmoe"](M3oEConfig([3], 0, 1, 1))


def test_fusion_weights_are_those_that_the_ablation_leaves():
    def names(**changed):
        return tuple(make(configure(("m3oe", 3, 2, {**M3OE, **changed}))).fusion_values())

    assert names() == ("alpha_domain", "alpha_task", "beta_domain", "beta_task")
    assert names(domain_experts=False) == ("alpha_task", "beta_task")
    assert names(modules="gated") == ()
    assert names(modules="concatenated", task_experts=False) == ("beta_domain",)
    assert make(configure(CASES["mmoe"])).fusion_values() == {}


@pytest.mark.parametrize("case", ["mmoe", "ple", "star", "adatt"])
def test_moves_between_dtypes_and_copies(case):
    config = configure(CASES[case])
    model = make(config)
    inputs = batch(config)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(*inputs[:3]).float(), model(*inputs[:3]), rtol=1e-4, atol=1e-4)
    assert wide.isa_name == "scalar" and set(wide.state_dict()) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("case", ["mmoe", "ple", "adatt", "star"])
def test_compiles_as_one_graph_and_exports(case):
    config = configure(CASES[case])
    model = make(config)
    inputs = batch(config)
    expected, (_, wanted) = model(*inputs[:3]).detach(), gradients(model, inputs)
    model.zero_grad()
    torch.compile(model.loss, fullgraph=True, backend="aot_eager")(*inputs).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], msg=name)
    with torch.no_grad():
        rows = torch.export.Dim("rows", min=2)
        program = torch.export.export(model, inputs[:3], dynamic_shapes=[{0: rows}] * 3)
    assert "m3oe_fast.network_fwd" in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs[:3]), expected)
    other = batch(config, rows=33, seed=1)[:3]
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_an_exported_model_in_eager_pytorch_refuses_a_domain_that_is_none():
    config = configure(CASES["mmoe"])
    ids, dense, domain, _ = batch(config, rows=5)
    program = torch.export.export(make(config, "reference"), (ids, dense, domain)).module()
    program(ids, dense, domain)
    with pytest.raises(RuntimeError, match="a domain is none of the model's"):
        program(ids, dense, torch.tensor([0, -1, 1, 2, 0]))


@pytest.mark.parametrize("case", ["mmoe", "ple", "adatt", "star"])
def test_is_made_on_the_meta_device(case):
    config = configure(CASES[case])
    with torch.device("meta"):
        model = MODELS[config.name](config, backend="reference")
    assert model.device.type == "meta"
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in make(config).named_parameters()
    }


@pytest.mark.parametrize("case", ["mmoe", "adatt", "star", "gated"])
def test_float64_from_the_start_and_through_a_file(case, tmp_path):
    config = configure(CASES[case])
    try:
        torch.set_default_dtype(torch.float64)
        model = make(config)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float64}
    model.save(tmp_path)
    loaded = m3oe_fast.load(tmp_path)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    ids, dense, domain, _ = batch(config)
    torch.testing.assert_close(loaded(ids, dense.double(), domain), model(ids, dense.double(), domain))


@pytest.mark.parametrize("case", ["mmoe", "ple", "star"])
def test_empty_batch_and_sparse_gradients(case):
    config = configure(CASES[case])
    model = make(config)
    ids, dense, domain, label = batch(config)
    empty = model.loss(ids[:0], dense[:0], domain[:0], label[:0])
    empty.backward()
    assert empty.item() == 0 and all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    dense_grad = gradients(make(config), (ids, dense, domain, label))[1]["embedding"]
    sparse = make(config)
    sparse.sparse_grad = True
    found = gradients(sparse, (ids, dense, domain, label))[1]["embedding"]
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), dense_grad)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_learns_and_predicts_the_same_after_a_step(name):
    """Predict, step, predict: no packed weight is older than the parameters."""
    one = name == "mlp"
    config = MODELS[name].config_type(num_domains=1 if one else 3, num_tasks=1 if one else 2, **INPUTS)
    model = make(config)
    inputs = batch(config, rows=400)
    before = model.eval().predict(*inputs[:3])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model.loss(*inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.predict(*inputs[:3])
    assert not torch.equal(before, after)
    oracle = copy.deepcopy(model)
    oracle.backend = "reference"
    torch.testing.assert_close(after, oracle.predict(*inputs[:3]), rtol=1e-3, atol=1e-4)


def test_configurations_travel_as_plain_dictionaries():
    for case in (*CASES.values(), *EAGER.values()):
        config = configure(case)
        assert type(config).from_dict(config.to_dict()) == config
        assert dataclasses.replace(config, embed_dim=4).input_dim == 3 * 4 + 2
