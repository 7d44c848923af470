"""Embeddings looked up and their gradients summed by the Triton kernels, against the gathered input and the oracle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from m3oe_fast import folded, kernels
from m3oe_fast.ops import Lookup, network
from tests.cases import Case, make_inputs, make_weights
from tests.test_embedding import (
    LARGE,
    MIXED,
    SMALL,
    Fields,
    assert_all_close,
    make_problem,
    named_rows,
)

CASES = [
    *(Fields(80, MIXED[:4], width) for width in (1, 3, 16, 33)),
    *(Fields(60, MIXED[:fields], 8, columns) for fields, columns in ((1, 0), (6, 3), (7, 0))),
    *(Fields(150, vocab, 16, columns) for vocab in (SMALL, LARGE) for columns in (0, 5)),
    *(Fields(rows, MIXED, 5) for rows in (0, 1)),
    Fields(100, MIXED[:4], 16, ids="same"),
    Fields(100, MIXED[:4], 16, ids="last"),
    Fields(64, (64, 63, 65, 1), 8, 0, int32=True),  # around SMALL
]


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_logits_and_gradients_against_the_oracle(fields):
    problem = make_problem(fields, backend="triton")
    exact = problem.to(torch.float64)
    ours = problem.results(problem.looked_up())
    eager = problem.results(folded.routed(problem.gathered(), problem.domain, problem.weights, gate_detach=False))
    oracle = exact.results(folded.routed(exact.gathered(), exact.domain, exact.weights, gate_detach=False))
    assert_all_close(["logits", "embedding", *problem.labels[1:]], ours, eager, oracle)


@pytest.mark.parametrize("fields", [CASES[1], CASES[5], CASES[8], CASES[9], CASES[-1]], ids=str)
def test_the_sparse_gradient_is_the_dense_one_at_exactly_the_rows_named(fields):
    problem = make_problem(fields, backend="triton")
    dense, sparse = (
        torch.autograd.grad(problem.looked_up(sparse_grad), problem.table, problem.grad)[0]
        for sparse_grad in (False, True)
    )
    # Small fields are added up in another way then, so the bits differ.
    torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-5, atol=1e-6)
    assert sparse.is_coalesced() and torch.equal(sparse.indices()[0], named_rows(problem))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_gradients_of_any_size_keep_their_digits(scale):
    """Sums are in fixed point, so its scale must follow the batch."""
    problem = make_problem(Fields(100, MIXED[:4], 16), backend="triton")
    (plain,) = torch.autograd.grad(problem.looked_up(), problem.table, problem.grad)
    (scaled,) = torch.autograd.grad(problem.looked_up(), problem.table, problem.grad * scale)
    torch.testing.assert_close(scaled.double(), plain.double() * scale, rtol=1e-5, atol=1e-6 * scale)


def test_no_gradient_at_all_is_zero_and_one_that_is_not_finite_is_not():
    problem = make_problem(Fields(30, (5, 100), 8), backend="triton")
    (none,) = torch.autograd.grad(problem.looked_up(), problem.table, torch.zeros_like(problem.grad))
    assert not none.any()
    for bad in (float("nan"), float("inf")):
        grad = problem.grad.clone()
        grad[3, 0] = bad
        (spoiled,) = torch.autograd.grad(problem.looked_up(), problem.table, grad)
        assert torch.isnan(spoiled).all()


def test_no_fields_at_all():
    case = Case(rows=20)
    x, domain, grad, _ = make_inputs(case, torch.float32)
    table = torch.empty(0, 4, requires_grad=True)
    lookup = Lookup(torch.empty(20, 0, dtype=torch.int64), table, ())
    logits = network(x, domain, make_weights(case, torch.float32), lookup=lookup, backend="triton")
    (d_table,) = torch.autograd.grad(logits, table, grad)
    assert d_table.shape == (0, 4)


def test_rows_too_wide_for_one_program():
    problem = make_problem(Fields(12, (3, 90), 200, 1), backend="triton")
    exact = problem.to(torch.float64)
    (ours,) = torch.autograd.grad(problem.looked_up(), problem.table, problem.grad)
    oracle = folded.routed(exact.gathered(), exact.domain, exact.weights, gate_detach=False)
    (expected,) = torch.autograd.grad(oracle, exact.table, exact.grad)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_first_call_in_inference_mode_does_not_spoil_the_flags():
    from m3oe_fast.kernels import flags

    flags._flags.cache_clear()
    problem = make_problem(Fields(5, (3,), 4), backend="triton")
    with torch.inference_mode():
        problem.looked_up()
    kernels.check_inputs(problem.table.device)


def test_a_table_that_wants_no_gradient_gets_none():
    problem = make_problem(Fields(30, (5, 100), 8), backend="triton")
    problem.table.requires_grad_(False)
    (d_dense,) = torch.autograd.grad(problem.looked_up(), problem.dense, problem.grad)
    assert torch.isfinite(d_dense).all()


@pytest.mark.parametrize("bad", [-1, 100, 2**31, 2**40, -(2**40)])
def test_an_id_out_of_range_reads_the_nearest_row_and_is_told(bad):
    problem = make_problem(Fields(70, (5, 100, 7), 8), backend="triton")
    kernels.check_inputs(problem.table.device)
    wrong, clamped = problem.ids.clone(), problem.ids.clone()
    wrong[41, 1], clamped[41, 1] = bad, min(max(bad, 0), 99)
    results = []
    for ids in (wrong, clamped):
        now = dataclasses.replace(problem, ids=ids)
        results.append(now.results(now.looked_up()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match=r"ids\[41, 1\]"):
        kernels.check_inputs(problem.table.device)
    kernels.check_inputs(problem.table.device)
