"""The star layer folded by the Triton kernels, and its gradients, against float64."""

from __future__ import annotations

import pytest
import torch

from m3oe_fast import folded
from m3oe_fast.ops import star_fold
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 13, 40, 33), (2, 65, 32, 31)], ids=str)
def test_against_the_oracle(sizes):
    d, i, s, h = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((d, i, s), (i, s), (s, h))
    single = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    double = [w.detach().double().requires_grad_() for w in single]
    grad = torch.randn(d, i, h, generator=generator)
    results = []
    for function, weights in (
        (lambda *w: star_fold(*w, backend="triton"), single),
        (folded.star_fold, single),
        (folded.star_fold, double),
    ):
        value = function(*weights)
        results.append([value.detach(), *torch.autograd.grad(value, weights, grad.to(value.dtype))])
    for i, values in enumerate(zip(*results, strict=True)):
        assert_close_to_oracle(*values, GRADIENT if i else FORWARD, f"result {i}")


def test_opcheck():
    weights = [torch.randn(shape) for shape in ((2, 5, 6), (5, 6), (6, 7))]
    ops = torch.ops.m3oe_fast_triton
    torch.library.opcheck(ops.star_fold.default, weights)
    torch.library.opcheck(ops.star_fold_bwd.default, [torch.randn(2, 5, 7), *weights])


@pytest.mark.launches_nothing
def test_wrong_shapes_and_dtypes_are_refused():
    weights = [torch.randn(shape) for shape in ((2, 5, 6), (5, 6), (6, 7))]
    for bad in ([weights[0], weights[1].mT, weights[2]], [*weights[:2], weights[2][1:]]):
        with pytest.raises(ValueError, match="star_fold takes"):
            star_fold(*bad, backend="triton")
    with pytest.raises(TypeError, match="float32"):
        star_fold(*(w.double() for w in weights), backend="triton")
