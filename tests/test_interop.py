"""Checkpoints of the published research code against an independent computation from their keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from m3oe_fast import M3oE, interop
from m3oe_fast.backends import CPU_PRECISIONS
from m3oe_fast.config import FUSION_NAMES
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.rounding import matmul
from tests.published_state import (
    Published,
    State,
    published_logits,
    published_loss,
    random_rows,
    random_state,
    rescaled,
)
from tests.test_precision import SCALINGS, assert_as_good_as_eager

CASES = [
    Published(),
    Published(
        star=512, hidden=256, dims=(64,), tower=64, vocab=(50, 40, 2, 21, 30, 18, 3), embed=16, rows=200, shared=1
    ),
    Published(domains=1, tasks=1, shared=1),
    Published(domains=1, tasks=1, shared=0, dims=(1,), tower=1),
    Published(domains=1, tasks=3, shared=2, dims=(17, 5), tower=3),
    Published(domains=2, tasks=1, shared=0, dims=(8, 6)),
    Published(domains=2, tasks=3, shared=1, vocab=(), dense=7),
    Published(domains=4, tasks=2, shared=3, dense=0, embed=1, vocab=(9,), star=1, hidden=7),
    Published(domains=5, tasks=4, shared=6, dims=(20, 12, 17), tower=33, star=33, hidden=18, rows=300),
    Published(domains=9, tasks=1, shared=2, dims=(8, 8, 8, 8)),
]
backends = pytest.mark.parametrize("backend", ["cpu", "reference"])
cases = pytest.mark.parametrize("case", CASES, ids=str)

pytestmark = pytest.mark.usefixtures("one_thread")


def read(state: State, case: Published, backend: str = "reference", precision: str = "fp32") -> M3oE:
    return interop.from_official(
        state, num_domains=case.domains, num_tasks=case.tasks, backend=backend, precision=precision
    )


def places(state: State, case: Published) -> dict[str, Tensor]:
    """Where each number of our parameters stands among the numbers of the checkpoint, laid end to end."""
    sizes = [value.numel() for value in state.values()]
    assert sum(sizes) < 2**24, "float32 could not tell the numbers apart"
    numbered = torch.arange(sum(sizes), dtype=torch.float32).split(sizes)
    numbered = {key: part.view(value.shape) for part, (key, value) in zip(numbered, state.items(), strict=True)}
    return {name: value.detach().long() for name, value in read(numbered, case).named_parameters()}


def published_way(
    state: State,
    case: Published,
    rows: tuple[Tensor, ...],
    dtype: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor] = torch.matmul,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Logits, loss and gradients of the published computation; the gradients under the names of ours."""
    ids, dense, domain, label = rows
    leaves = {key: value.to(dtype).requires_grad_() for key, value in state.items()}
    read_as, dense = rescaled(leaves, dense.to(dtype), scale) if scale != 1 else (leaves, dense.to(dtype))
    logits = published_logits(read_as, case, ids, dense, domain, product)
    loss = published_loss(logits, case, domain, label)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    flat = torch.cat([
        (torch.zeros_like(leaf) if grad is None else grad).flatten()
        for leaf, grad in zip(leaves.values(), grads, strict=True)
    ])  # fmt: skip
    return _named(logits, loss, {name: flat[place] for name, place in places(state, case).items()})


def our_way(model: M3oE, rows: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The same of a model of ours."""
    ids, dense, domain, label = rows
    model.zero_grad(set_to_none=True)
    loss = model.loss(ids, dense, domain, label)
    loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return _named(model(ids, dense, domain), loss, grads)


def _named(logits: Tensor, loss: Tensor, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The gradient of a single fusion logit may be what is left of a cancellation: the four are judged together.
    fusion = torch.stack([grads[name] for name in FUSION_NAMES])
    rest = {name: grad for name, grad in sorted(grads.items()) if name not in FUSION_NAMES}
    return {"logits": logits.detach(), "loss": loss.detach(), **rest, "fusion": fusion}


@cases
def test_every_number_of_a_checkpoint_has_one_place(case):
    state = random_state(case)
    found = torch.cat([place.flatten() for place in places(state, case).values()])
    assert torch.equal(found.sort().values, torch.arange(sum(value.numel() for value in state.values())))


@backends
@cases
def test_in_float64_it_is_the_published_function_with_its_gradients(case, backend):
    state, rows = random_state(case), random_rows(case)
    model = read(state, case, backend).double()
    ours, theirs = our_way(model, rows), published_way(state, case, rows, torch.float64)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            ours[name], expected, rtol=0, atol=1e-10 * scale + 1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
@pytest.mark.parametrize("seed", range(3))
@cases
def test_as_close_as_the_published_way_at_every_precision(case, seed, precision):
    """In fp32 with every ReLU as it falls, in reduced precision away from the kinks."""
    state, rows = random_state(case, seed, kinks=precision == "fp32"), random_rows(case, 100 + seed)
    oracle = published_way(state, case, rows, torch.float64)

    def draws():
        for scale in SCALINGS:
            yield list(published_way(state, case, rows, torch.float32, matmul(precision), scale).values())

    ours = our_way(read(state, case, "cpu", precision), rows)
    assert_as_good_as_eager(list(oracle), list(ours.values()), draws(), list(oracle.values()))


@pytest.mark.parametrize("precision", CPU_PRECISIONS)
def test_reading_with_another_precision_changes_no_weight(precision):
    state = random_state(CASES[0])
    plain, other = read(state, CASES[0]), read(state, CASES[0], "cpu", precision)
    assert other.precision == precision and plain.config == other.config
    for name, value in plain.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@backends
def test_probabilities_are_those_of_the_published_model(backend):
    case = CASES[0]
    state, (ids, dense, domain, _) = random_state(case), random_rows(case)
    model = read(state, case, backend).eval()
    double = {key: value.double() for key, value in state.items()}
    expected = torch.sigmoid(published_logits(double, case, ids, dense, domain))
    eager = torch.sigmoid(published_logits(state, case, ids, dense, domain))
    ours = model.predict(ids, dense, domain)
    assert_as_good_as_eager(["logits"], [ours], [[eager]], [expected])


@cases
def test_sizes_and_switches_are_read_off_the_checkpoint(case):
    c = read(random_state(case), case).config
    assert (c.num_domains, c.num_tasks, c.shared_experts) == (case.domains, case.tasks, case.shared)
    assert (c.star_dim, c.hidden_dim, c.expert_dims, c.tower_dim) == (case.star, case.hidden, case.dims, case.tower)
    assert (c.vocab_sizes, c.num_dense) == (case.vocab, case.dense)
    assert (c.star_activation, c.gate_detach, c.fusion, c.modules) == ("norm_relu", True, "scalar", "balanced")


def test_the_rule_would_notice_two_experts_that_changed_places():
    """Also two pairs of T = D = 2, whose order t * D + d is easily taken for d * T + t."""
    case = Published(domains=2, tasks=2, shared=2)
    rows, state = random_rows(case), random_state(case)
    oracle = published_way(state, case, rows, torch.float64)
    eager = published_way(state, case, rows, torch.float32)
    for kind, i, j in (
        ("expert", 0, 1),
        ("domain_expert", 0, 1),
        ("task_expert", 0, 1),
        ("gate", 1, 2),
        ("tower", 1, 2),
    ):
        swapped = dict(state)
        for key in state:
            if key.startswith(f"{kind}.{i}."):
                other = key.replace(f"{kind}.{i}.", f"{kind}.{j}.", 1)
                swapped[key], swapped[other] = state[other], state[key]
        ours = our_way(read(swapped, case), rows)
        with pytest.raises(AssertionError, match="logits"):
            assert_as_good_as_eager(["logits"], [ours["logits"]], [[eager["logits"]]], [oracle["logits"]])


# Checkpoints that are not what they should be -------------------------------------------------------------------------

STATE = random_state(Published())


def refused(state: Mapping[str, Tensor], match: str | None, domains: int = 3, tasks: int = 2) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        interop.from_official(state, num_domains=domains, num_tasks=tasks)
    assert "\n" not in str(caught.value)


def test_whichever_key_is_missing_it_is_refused():
    """And named, unless fewer layers or shared experts would explain it: then what does not fit them is.

    A table may be missing: whatever it would fill are dense columns then.
    """
    for key in STATE:
        named = None if key.startswith(("expert.", "domain_expert.0.")) else re.escape(key)
        if not key.startswith("embedding."):
            refused({k: v for k, v in STATE.items() if k != key}, named)
    fewer = {k: v for k, v in STATE.items() if "field1" not in k}
    assert read(fewer, Published()).config.num_dense == 1 + 4


@pytest.mark.parametrize("key", ["expert.0.domain_specific.3.weight", "gate.6.0.weight", "running_mean"])
def test_an_unknown_key_is_named(key):
    refused(STATE | {key: torch.zeros(3)}, re.escape(key))


def test_a_shared_expert_less_or_a_table_more_does_not_fit_the_rest():
    refused({k: v for k, v in STATE.items() if not k.startswith("expert.3.")}, r"gate\.0\.0\.weight")
    more = {f"embedding.embed_dict.more{i}.weight": torch.zeros(5, 4) for i in range(3)}
    refused(STATE | more, "6 tables of width 4, more than the 13 rows")


@pytest.mark.parametrize(("domains", "tasks"), [(2, 2), (3, 1), (2, 3), (4, 2), (6, 1), (1, 6)])
def test_wrong_numbers_of_domains_or_tasks_are_refused(domains, tasks):
    refused(STATE, "check num_domains and num_tasks", domains, tasks)


@pytest.mark.parametrize("counts", [(0, 2), (3, 0), (-1, 2)])
def test_impossible_numbers_of_domains_or_tasks_are_refused(counts):
    with pytest.raises((CheckpointError, ConfigError), match=r"num_domains|num_tasks"):
        interop.from_official(STATE, num_domains=counts[0], num_tasks=counts[1])


@pytest.mark.parametrize("shape", [(), (2,), (13, 2), (1, 1, 1)])
def test_whichever_tensor_has_another_shape_it_is_refused(shape):
    """And named, unless sizes of the model are read from it: then what does not fit them is."""
    read_from = ("embedding.", "shared_weight", "star_mlp.domain_specific.0.w", "domain_expert.0.", "tower.0.0.w")
    for key in STATE:
        named = None if key.startswith(read_from) else re.escape(key)
        refused(STATE | {key: torch.zeros(shape)}, named)


def test_tables_of_two_widths_are_refused():
    refused(STATE | {"embedding.embed_dict.field1.weight": torch.zeros(5, 3)}, r"widths \[3, 4\]")


@pytest.mark.parametrize("state", [{}, {"weight": torch.zeros(3)}, {"shared_weight": torch.zeros(3, 2)}])
def test_something_else_entirely(state):
    refused(state, "lacks")


def test_a_value_that_is_no_tensor_is_refused():
    refused(STATE | {"shared_bias": [0.0] * 10}, "shared_bias.*list.*no tensor")


def test_the_checkpoint_is_left_alone_and_not_shared():
    state = {key: value.clone() for key, value in STATE.items()}
    model = read(state, Published())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


def test_numbers_in_half_precision_or_float64_are_read_as_float32():
    wide = {key: value.double() for key, value in STATE.items()}
    assert all(
        torch.equal(a, b)
        for a, b in zip(read(wide, Published()).parameters(), read(STATE, Published()).parameters(), strict=True)
    )
    narrow = {key: value.bfloat16() for key, value in STATE.items()}
    assert {p.dtype for p in read(narrow, Published()).parameters()} == {torch.float32}
