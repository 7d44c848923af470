"""The compiled fold of the star layer against the float64 oracle, at sizes around its blocks."""

from __future__ import annotations

import pytest
import torch

from m3oe_fast import folded
from m3oe_fast.ops import star_fold
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

# (D, I, S, H); jobs are 24 rows or 48 columns, sums are cut at 96 rows and 256 columns.
SIZES = [
    (3, 113, 512, 256),
    (1, 1, 1, 1),
    (2, 24, 48, 16),
    (2, 25, 49, 17),
    (5, 23, 47, 65),
    (50, 7, 300, 33),
    (1, 97, 257, 64),
]


def make(size, dtype):
    d, i, s, h = size
    generator = torch.Generator().manual_seed(0)
    shapes = ((d, i, s), (i, s), (s, h))
    weights = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    return weights, torch.randn(d, i, h, generator=generator).to(dtype)


def run(function, weights, grad):
    result = function(*weights)
    return [result.detach(), *torch.autograd.grad(result, weights, grad)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients_against_the_oracle(size):
    weights, grad = make(size, torch.float32)
    exact = [w.detach().double().requires_grad_() for w in weights]
    oracle = run(folded.star_fold, exact, grad.double())
    ways = zip(run(star_fold, weights, grad), run(folded.star_fold, weights, grad), oracle, strict=True)
    for name, way in zip(("folded", "own", "shared", "out"), ways, strict=True):
        factor = FORWARD if name == "folded" else GRADIENT
        assert_close_to_oracle(*way, factor, name, stacked=1 if name in ("folded", "own") else 0)


def test_gradcheck_in_double():
    weights, _ = make((2, 3, 5, 4), torch.float64)
    assert torch.autograd.gradcheck(star_fold, weights, nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    weights, grad = make((2, 5, 7, 3), dtype)
    weights = [w.detach() for w in weights]
    torch.library.opcheck(torch.ops.m3oe_fast.star_fold.default, weights)
    torch.library.opcheck(torch.ops.m3oe_fast.star_fold_bwd.default, (grad, *weights))


def test_the_same_bits_for_any_number_of_threads():
    weights, grad = make((3, 113, 512, 256), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(star_fold, weights, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_layouts_give_the_same_bits():
    (own, shared, out), grad = make((2, 20, 30, 40), torch.float32)
    views = [own.detach().mT.contiguous().mT, shared.detach().t().contiguous().t(), out.detach().repeat(1, 2)[:, :40]]
    views = [view.requires_grad_() for view in views]
    expanded = grad[:1, :1, :1].expand_as(grad)
    ours, theirs = (run(star_fold, w, expanded) for w in ((own, shared, out), views))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_does_not_fit_is_refused():
    (own, shared, out), grad = make((2, 5, 7, 3), torch.float32)
    bad = [(own[0], shared, out), (own, shared[1:], out), (own, shared, out[1:]), (own, shared.double(), out)]
    for weights in (*bad, (own.half(), shared.half(), out.half())):
        with pytest.raises(RuntimeError, match="star_fold"):
            star_fold(*weights)
    with pytest.raises(RuntimeError, match="gradient"):
        torch.ops.m3oe_fast.star_fold_bwd(grad[:1], own, shared, out)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first = torch.autograd.grad(star_fold(own, shared, out).square().sum(), own, create_graph=True)[0]
        first.sum().backward()
