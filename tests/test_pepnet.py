"""PEPNet: it agrees with its equations row by row, its gates stop the gradients they should, and it keeps what every
eager model must."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from m3oe_fast.errors import ConfigError
from m3oe_fast.models.pepnet import PEPNet, PEPNetConfig, factors, forward, gate_hidden
from tests import eager_models

SMALL = PEPNetConfig([9, 5], 2, 3, 2, embed_dim=4, expert_dims=(12, 7), knowledge_dim=5, gate_dim=6)
TINY = PEPNetConfig([], 3, 2, 2, expert_dims=(3, 2), knowledge_dim=2, gate_dim=3)
SIZES = {
    "default": SMALL,
    "D1": dataclasses.replace(SMALL, num_domains=1),
    "T1": dataclasses.replace(SMALL, num_tasks=1),
    "D1T1": dataclasses.replace(SMALL, num_domains=1, num_tasks=1),
    "one-layer": dataclasses.replace(SMALL, expert_dims=(8,)),
    "three-layers": dataclasses.replace(SMALL, expert_dims=(8, 9, 4)),
    "more-domains-than-rows": dataclasses.replace(SMALL, num_domains=60),
}


def row_by_row(p, config, x, domain):
    """PEPNet as the paper prints it: the inputs of the gates concatenated, for every row."""

    def norm_relu(z, gain, offset):
        centred = z - z.mean()
        return torch.relu(centred / (centred.square().mean() + 1e-5).sqrt() * gain + offset)

    def gate(v, weight, bias, gain, offset, out_weight, out_bias):
        return 2 / (1 + torch.exp(-(norm_relu(v @ weight + bias, gain, offset) @ out_weight + out_bias)))

    parts = ("weight", "bias", "gain", "offset")
    logits = []
    for row, d in zip(x, domain.tolist(), strict=True):
        of_domain = p["domain_embedding"][d]
        embedding_gate = [p[f"embedding_gate_{part}"] for part in (*parts, "out_weight", "out_bias")]
        o = gate(torch.cat([row.detach(), of_domain]), *embedding_gate) * row
        for t in range(config.num_tasks):
            h = o
            for layer in range(len(config.expert_dims)):
                unit_gate = [p[f"unit_gate_{part}"][layer] for part in parts]
                unit_gate += [p[f"unit_gate_out_{part}.{layer}"][t] for part in ("weight", "bias")]
                weight, bias, gain, offset = (p[f"tower_{part}.{layer}"][t] for part in parts)
                prior = torch.cat([row, o.detach(), of_domain])
                h = gate(prior, *unit_gate) * norm_relu(h @ weight + bias, gain, offset)
            logits.append(p["head_weight"][t] @ h + p["head_bias"][t])
    return torch.stack(logits).reshape(len(x), config.num_tasks)


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_agrees_with_the_equations_for_every_row(config):
    eager_models.check_against_the_paper(eager_models.make(PEPNet, config), row_by_row)


def test_gradients_numerically():
    """Of x and the parameters before a stop_gradient, whose analytic gradients leave a path out, only where that path
    carries nothing."""
    model = eager_models.make(PEPNet, TINY)
    first_gate = [name for name, _ in model.named_parameters() if name.startswith(("embedding_gate", "domain"))]
    eager_models.check_gradients_numerically(model, frozen=["x", *first_gate])
    with torch.no_grad():
        for weight in model.unit_gate_out_weight:
            weight.zero_()
    eager_models.check_gradients_numerically(model, frozen=["x"])
    with torch.no_grad():
        model.embedding_gate_out_weight.zero_()
    eager_models.check_gradients_numerically(model)


def test_unit_gates_send_no_gradient_to_the_scaled_input():
    model = eager_models.make(PEPNet, SMALL)
    with torch.no_grad():
        model.tower_weight[0].zero_()  # o now reaches the logits through the gates of PPNet alone
    model.loss(*eager_models.batch(SMALL, 60)).backward()
    assert model.unit_gate_weight.grad.any() and model.embedding.grad.any()
    assert not model.embedding_gate_weight.grad.any() and not model.embedding_gate_out_bias.grad.any()


def test_the_embedding_gate_sends_no_gradient_to_x():
    model = eager_models.make(PEPNet, SMALL).double()
    p = {name: v.detach() for name, v in model.named_parameters()}
    x, domain = torch.randn(1, SMALL.input_dim, dtype=torch.float64), torch.tensor([1])
    gate = gate_hidden(
        x, p["domain_embedding"], domain, *(p[f"embedding_gate_{n}"] for n in ("weight", "bias", "gain", "offset")),
        torch.matmul,
    )  # fmt: skip
    constant = {
        "embedding_gate_out_weight": torch.zeros_like(p["embedding_gate_out_weight"]),
        "embedding_gate_out_bias": p["embedding_gate_out_bias"] + gate[0] @ p["embedding_gate_out_weight"],
    }
    gradients = []
    for parameters in (p, {**p, **constant}):  # the same factors, the second time whatever x is
        inputs = x.clone().requires_grad_()
        forward(parameters, SMALL, inputs, domain).sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_gates_start_near_one():
    torch.manual_seed(0)
    config = PEPNetConfig([9], 1, 3, 2)
    model = PEPNet(config)
    hidden = torch.relu(torch.randn(500, config.gate_dim))
    for weight, bias in (
        (model.embedding_gate_out_weight, model.embedding_gate_out_bias),
        (model.unit_gate_out_weight[1][0], model.unit_gate_out_bias[1][0]),
    ):
        start = factors(hidden, weight, bias, torch.matmul)
        assert abs(start.mean().item() - 1) < 0.1 and 0.02 < start.std().item() < 0.4


@pytest.mark.parametrize("config", [SMALL, SIZES["D1T1"]], ids=["default", "D1T1"])
def test_no_parameter_is_dead(config):
    eager_models.check_no_parameter_is_dead(eager_models.make(PEPNet, config))


def test_empty_batches_and_absent_domains():
    eager_models.check_empty_and_absent(eager_models.make(PEPNet, SMALL))


@pytest.mark.parametrize(
    "config",
    [
        PEPNetConfig([], 1, 1, 1, expert_dims=(1,), knowledge_dim=1, gate_dim=1),
        PEPNetConfig([3], 0, 19, 1, embed_dim=1, expert_dims=(5, 1, 3), knowledge_dim=1),
        PEPNetConfig([], 17, 2, 5, expert_dims=(33,), gate_dim=1),
    ],
    ids=["ones", "more-domains-than-rows", "odd"],
)
def test_hostile_sizes(config):
    eager_models.check_sizes(PEPNet, config)


@pytest.mark.parametrize("config", [PEPNetConfig([50] * 7, 1, 1, 2), SIZES["three-layers"]], ids=["default", "small"])
def test_multiply_adds(config):
    eager_models.check_multiply_adds(PEPNet(config), weighted_sum=0)


def test_deterministic():
    eager_models.check_determinism(eager_models.make(PEPNet, SMALL))


def test_tells_domains_apart():
    config = PEPNetConfig([], 2, 2, 1, expert_dims=(16, 8), knowledge_dim=4, gate_dim=8)
    eager_models.check_it_tells_domains_apart(PEPNet, config)


def test_files_and_graphs(tmp_path):
    eager_models.check_files_and_graphs(eager_models.make(PEPNet, SMALL), tmp_path)


@pytest.mark.parametrize("field", ["knowledge_dim", "gate_dim"])
def test_a_size_below_one_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"{field} must be an integer of at least 1, got 0"):
        dataclasses.replace(SMALL, **{field: 0})
