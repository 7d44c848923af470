"""The opponent in the style of the published code against the published network, read off the same checkpoint."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig, interop
from tests.published_state import Published, published_logits, published_loss, random_rows, random_state

# Last, so that an installed m3oe_fast comes before the source folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench.published import PublishedM3oE

CASES = [
    Published(),
    Published(domains=1, tasks=1, shared=1),
    Published(domains=5, tasks=4, shared=6, dims=(8, 12, 7), tower=5),
    Published(domains=2, tasks=3, shared=1, vocab=(), dense=7),
]
PLAIN = M3oEConfig([5], 1, 3, 2, star_dim=6, hidden_dim=7, expert_dims=(4,), tower_dim=3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_opponent_is_the_published_network(case):
    state, (ids, dense, domain, label) = random_state(case), random_rows(case)
    source = interop.from_official(state, num_domains=case.domains, num_tasks=case.tasks, backend="reference")
    opponent = PublishedM3oE(source.double()).double()
    leaves = {key: value.double().requires_grad_() for key, value in state.items()}
    logits = published_logits(leaves, case, ids, dense, domain)
    ours = opponent(ids, dense.double(), domain)
    torch.testing.assert_close(ours, logits, rtol=1e-10, atol=1e-12)

    expected = published_loss(logits, case, domain, label)
    expected.backward()
    loss = opponent.loss_of(ours, domain, label.double())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    own = dict(opponent.named_parameters())
    pairs = {"shared_weight": "shared_weight", "slot_weight.0": "slot_weight.0", "gate.0.0.weight": "gate.0.0.weight"}
    pairs |= {"alpha_domain": "_weight_exp_d.deep_weights", "beta_task": "_weight_bal_t.deep_weights"}
    pairs |= {f"embedding.{i}.weight": f"embedding.embed_dict.field{i}.weight" for i in range(len(case.vocab))}
    for name, key in pairs.items():
        expected = leaves[key].grad.reshape(own[name].shape)
        torch.testing.assert_close(own[name].grad, expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_gradients_carry_the_names_of_ours(case):
    (ids, dense, domain, label), state = random_rows(case), random_state(case)
    source = interop.from_official(state, num_domains=case.domains, num_tasks=case.tasks, backend="reference").double()
    opponent = PublishedM3oE(source).double()
    opponent.loss(ids, dense.double(), domain, label.double()).backward()
    source.loss(ids, dense.double(), domain, label).backward()
    found = opponent.gradients()
    assert found.keys() == dict(source.named_parameters()).keys()
    for name, parameter in source.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "switch",
    [
        {"star_activation": "linear"},
        {"gate_detach": False},
        {"fusion": "per_pair"},
        {"shared_experts": 0},
        {"modules": "gated"},
        {"domain_experts": False},
        {"task_experts": False},
        {"bag_vocab_sizes": (3,), "bag_pooling": ("mean",)},
    ],
    ids=str,
)
def test_what_the_published_code_does_not_have_is_refused(switch):
    with pytest.raises(ValueError, match="the published code has"):
        PublishedM3oE(M3oE(dataclasses.replace(PLAIN, **switch), backend="reference"))
