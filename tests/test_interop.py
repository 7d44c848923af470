"""Checkpoints of the published research code against an independent computation from their keys."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from m3oe_fast import interop
from m3oe_fast.errors import CheckpointError


def published_state(
    domains: int, tasks: int, shared: int, dims=(8, 6), vocab=(11, 5, 3), dense: int = 1, embed: int = 4
):
    """A random state_dict with the key names and layouts of class MDMTRec."""
    torch.manual_seed(0)
    inputs, star, hidden = len(vocab) * embed + dense, 10, 9
    state = {}

    def linear(name, fan_in, fan_out):
        state[f"{name}.weight"] = torch.randn(fan_out, fan_in) / fan_in**0.5
        state[f"{name}.bias"] = torch.randn(fan_out) * 0.3

    def mlp(name, widths):
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            linear(f"{name}.domain_specific.{3 * i}", fan_in, fan_out)
            state[f"{name}.domain_specific.{3 * i + 1}.weight"] = torch.rand(fan_out) + 0.5
            state[f"{name}.domain_specific.{3 * i + 1}.bias"] = torch.randn(fan_out) * 0.3

    state["shared_weight"] = torch.randn(inputs, star) / inputs**0.5
    state["shared_bias"] = torch.randn(star) * 0.3
    for i, rows in enumerate(vocab):
        state[f"embedding.embed_dict.field{i}.weight"] = torch.randn(rows, embed)
    for name in ("exp_d", "exp_t", "bal_d", "bal_t"):
        state[f"_weight_{name}.deep_weights"] = torch.randn(1)
    mlp("skip_conn", [inputs, hidden])
    for d in range(domains):
        state[f"slot_weight.{d}"] = torch.randn(inputs, star)
        state[f"slot_bias.{d}"] = torch.randn(star) * 0.3
    mlp("star_mlp", [star, hidden])
    for kind, count in (("expert", shared), ("domain_expert", domains), ("task_expert", tasks)):
        for i in range(count):
            mlp(f"{kind}.{i}", [hidden, *dims])
    for i in range(domains * tasks):
        linear(f"gate.{i}.0", hidden, shared)
        linear(f"tower.{i}.0", dims[-1], dims[-1])
        state[f"tower.{i}.1.weight"] = torch.rand(dims[-1]) + 0.5
        state[f"tower.{i}.1.bias"] = torch.randn(dims[-1]) * 0.3
        linear(f"tower.{i}.3", dims[-1], 1)
    return state


def published_probabilities(s, ids, dense, domain, domains: int, tasks: int, shared: int):
    """What the published model computes, read off its keys; one row at a time."""

    def linear(name, v):
        return F.linear(v, s[f"{name}.weight"], s[f"{name}.bias"])

    def mlp(name, v):
        i = 0
        while f"{name}.domain_specific.{3 * i}.weight" in s:
            v = linear(f"{name}.domain_specific.{3 * i}", v)
            norm = f"{name}.domain_specific.{3 * i + 1}"
            v = F.relu(F.layer_norm(v, v.shape, s[f"{norm}.weight"], s[f"{norm}.bias"]))
            i += 1
        return v

    def weight(name):
        return torch.sigmoid(s[f"_weight_{name}.deep_weights"])

    tables = [v for k, v in s.items() if k.startswith("embedding.")]
    rows = []
    for b in range(len(ids)):
        d = int(domain[b])
        x = torch.cat([*(table[i] for table, i in zip(tables, ids[b], strict=True)), dense[b]])
        star = x @ (s[f"slot_weight.{d}"] * s["shared_weight"]) + s[f"slot_bias.{d}"] + s["shared_bias"]
        r = mlp("star_mlp", star) + mlp("skip_conn", x)
        of_domain = [mlp(f"domain_expert.{i}", r) for i in range(domains)]
        of_task = [mlp(f"task_expert.{i}", r) for i in range(tasks)]
        row = []
        for t in range(tasks):
            i = t * domains + d
            u = 0
            if shared:
                gate = torch.softmax(linear(f"gate.{i}.0", r), dim=0)
                u = sum(gate[k] * mlp(f"expert.{k}", r) for k in range(shared))
            for parts, own, name in ((of_domain, d, "d"), (of_task, t, "t")):
                others = [p for j, p in enumerate(parts) if j != own]
                mixed = weight(f"bal_{name}") * parts[own]
                for other in others:
                    mixed = mixed + (1 - weight(f"bal_{name}")) / len(others) * other
                u = u + weight(f"exp_{name}") * mixed
            h = linear(f"tower.{i}.0", u)
            h = F.relu(F.layer_norm(h, h.shape, s[f"tower.{i}.1.weight"], s[f"tower.{i}.1.bias"]))
            row.append(torch.sigmoid(linear(f"tower.{i}.3", h))[0])
        rows.append(torch.stack(row))
    return torch.stack(rows)


SHAPES = [(3, 2, 4), (1, 1, 1), (2, 3, 0), (4, 1, 2)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("domains", "tasks", "shared"), SHAPES)
def test_same_probabilities_as_the_published_model(domains, tasks, shared, backend):
    state = published_state(domains, tasks, shared)
    model = interop.from_official(state, num_domains=domains, num_tasks=tasks, backend=backend)
    ids = torch.stack([torch.randint(v, (25,)) for v in (11, 5, 3)], dim=1)
    dense, domain = torch.randn(25, 1), torch.randint(domains, (25,))
    expected = published_probabilities(state, ids, dense, domain, domains, tasks, shared)
    torch.testing.assert_close(model.predict(ids, dense, domain), expected, rtol=0, atol=2e-6)
    assert model.config.shared_experts == shared and model.config.expert_dims == (8, 6)


def test_a_missing_key_is_named():
    state = published_state(3, 2, 4)
    del state["tower.5.3.bias"]
    with pytest.raises(CheckpointError, match=r"tower\.5\.3\.bias"):
        interop.from_official(state, num_domains=3, num_tasks=2)


@pytest.mark.parametrize(("domains", "tasks"), [(2, 2), (3, 1), (2, 3), (4, 2)])
def test_wrong_numbers_of_domains_or_tasks_are_refused(domains, tasks):
    with pytest.raises(CheckpointError, match="check num_domains and num_tasks"):
        interop.from_official(published_state(3, 2, 4), num_domains=domains, num_tasks=tasks)


def test_something_else_entirely():
    with pytest.raises(CheckpointError, match="lacks"):
        interop.from_official({"weight": torch.zeros(3)}, num_domains=3, num_tasks=2)
