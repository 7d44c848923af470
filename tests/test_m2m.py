"""M2M: the weights made per domain agree with those made per row, and it keeps what every eager model must."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from m3oe_fast.errors import ConfigError
from m3oe_fast.models.m2m import M2M, M2MConfig, forward, meta_weights
from tests import eager_models

SMALL = M2MConfig(
    [9, 5], 2, 3, 2, embed_dim=4, shared_experts=3, expert_dims=(12, 7), knowledge_dim=5, attention_dim=6,
    tower_layers=2,
)  # fmt: skip
TINY = M2MConfig(
    [], 3, 2, 2, shared_experts=2, expert_dims=(3,), knowledge_dim=2, attention_dim=3, tower_layers=1
)  # fmt: skip
SIZES = {
    "default": SMALL,
    "D1": dataclasses.replace(SMALL, num_domains=1),
    "T1": dataclasses.replace(SMALL, num_tasks=1),
    "D1T1": dataclasses.replace(SMALL, num_domains=1, num_tasks=1),
    "one-expert": dataclasses.replace(SMALL, shared_experts=1),
    "one-layer": dataclasses.replace(SMALL, expert_dims=(8,), tower_layers=1),
    "more-domains-than-rows": dataclasses.replace(SMALL, num_domains=60),
}


def row_by_row(p, config, x, domain):
    """M2M as the paper prints it: the meta units make their weights for every row."""

    def norm(z, gain, offset):
        centred = z - z.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * gain + offset

    def generate(name, s):
        flat = s @ p[name].reshape(len(s), -1) + p[f"{name}_base"].reshape(-1)
        return flat.reshape(p[f"{name}_base"].shape)

    logits = []
    for row, d in zip(x, domain.tolist(), strict=True):
        s = p["domain_embedding"][d] @ p["knowledge_weight"] + p["knowledge_bias"]
        s = F.leaky_relu(norm(s, p["knowledge_gain"], p["knowledge_offset"]))
        experts = []
        for e in range(config.num_experts):
            z = row
            for layer in range(len(config.expert_dims)):
                z = z @ p[f"expert_weight.{layer}"][e] + p[f"expert_bias.{layer}"][e]
                z = torch.relu(norm(z, p[f"expert_gain.{layer}"][e], p[f"expert_offset.{layer}"][e]))
            experts.append(z)
        for t in range(config.num_tasks):
            scores = []
            for z in experts:
                pair = torch.cat([z, p["task_embedding"][t]])
                unit = pair @ generate("attention_weight", s) + generate("attention_bias", s)
                scores.append(p["attention_score"] @ F.leaky_relu(unit))
            h = torch.softmax(torch.stack(scores), 0) @ torch.stack(experts)
            for layer in range(config.tower_layers):
                unit = h @ generate("meta_weight", s)[layer, t] + generate("meta_bias", s)[layer, t]
                h = F.leaky_relu(unit + h)
            logits.append(p["head_weight"][t] @ h + p["head_bias"][t])
    return torch.stack(logits).reshape(len(x), config.num_tasks)


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_agrees_with_weights_made_for_every_row(config):
    eager_models.check_against_the_paper(eager_models.make(M2M, config), row_by_row)


def test_gradients_numerically():
    eager_models.check_gradients_numerically(eager_models.make(M2M, TINY))


@pytest.mark.parametrize("config", [SMALL, SIZES["D1T1"]], ids=["default", "D1T1"])
def test_no_parameter_is_dead(config):
    eager_models.check_no_parameter_is_dead(eager_models.make(M2M, config))


def test_one_expert_leaves_nothing_to_attend_to():
    model = eager_models.make(M2M, SIZES["one-expert"])
    model.loss(*eager_models.batch(model.config, 50)).backward()
    assert not model.attention_score.grad.any() and model.meta_weight.grad.any()


def test_empty_batches_and_absent_domains():
    eager_models.check_empty_and_absent(eager_models.make(M2M, SMALL))


@pytest.mark.parametrize(
    "config",
    [
        M2MConfig([], 1, 1, 1, shared_experts=1, expert_dims=(1,), knowledge_dim=1, attention_dim=1, tower_layers=1),
        M2MConfig([3], 0, 19, 1, embed_dim=1, shared_experts=2, expert_dims=(5, 1, 3), knowledge_dim=1),
        M2MConfig([], 17, 2, 5, shared_experts=7, expert_dims=(33,), attention_dim=1, tower_layers=3),
    ],
    ids=["ones", "more-domains-than-rows", "odd"],
)
def test_hostile_sizes(config):
    eager_models.check_sizes(M2M, config)


@pytest.mark.parametrize("config", [M2MConfig([50] * 7, 1, 1, 2), SIZES["D1T1"]], ids=["default-sizes", "small"])
def test_multiply_adds(config):
    weighted_sum = config.num_tasks * config.num_experts * config.expert_dim
    eager_models.check_multiply_adds(M2M(config), weighted_sum)


def test_multiply_adds_are_of_the_own_domain_alone():
    assert M2M(SMALL).multiply_adds() == M2M(SIZES["D1"]).multiply_adds()


def test_deterministic():
    eager_models.check_determinism(eager_models.make(M2M, SMALL))


def test_tells_domains_apart():
    config = M2MConfig([], 2, 2, 1, shared_experts=2, expert_dims=(16,), knowledge_dim=4, attention_dim=8)
    eager_models.check_it_tells_domains_apart(M2M, config)


def test_files_and_graphs(tmp_path):
    eager_models.check_files_and_graphs(eager_models.make(M2M, SMALL), tmp_path)


def test_generated_layers_start_in_the_range_of_a_linear():
    torch.manual_seed(0)
    model = M2M(M2MConfig([9], 1, 4, 2))
    meta = meta_weights(dict(model.named_parameters()), model.config)
    for weight, fan_in in ((meta.tower_weight, 64), (meta.attention_weight, 64 + 16)):
        linear = (3 * fan_in) ** -0.5  # standard deviation of a torch.nn.Linear
        assert linear < weight.std().item() < 1.5 * linear


def test_the_attention_weighs_experts_by_domain_and_task():
    model = eager_models.make(M2M, SMALL).double()
    p = dict(model.named_parameters())
    x = torch.randn(1, model.config.input_dim, dtype=torch.float64).expand(3, -1)
    logits = forward(p, model.config, x, torch.arange(3))
    assert len(logits.flatten().unique()) == 6  # the same row in three domains and two tasks


@pytest.mark.parametrize("field", ["shared_experts", "knowledge_dim", "attention_dim", "tower_layers"])
def test_a_size_below_one_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=f"{field} must be an integer of at least 1, got 0"):
        dataclasses.replace(SMALL, **{field: 0})
