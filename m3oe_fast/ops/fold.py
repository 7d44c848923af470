"""`star_fold`: the star layer folded into one matrix per domain, M_d = (W_d * W_sh) W_c, through the CPU kernels.

The same as one line of torch, whose matrix product is less than half as fast on some processors; a training step of a
few thousand rows notices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3oe_fast import _extension

_extension.load()
_fwd = torch.ops.m3oe_fast.star_fold.default
_bwd = torch.ops.m3oe_fast.star_fold_bwd.default


def star_fold(star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> Tensor:
    """(star_weight * shared_weight) @ out_weight.

    Args:
        star_weight: [D, I, S] float32 or float64.
        shared_weight: [I, S] in the same dtype.
        out_weight: [S, H] in the same dtype.

    Returns:
        Tensor: [D, I, H]. Differentiable once, in reverse mode. The same bits for any number of threads.

    Raises:
        RuntimeError: a shape or dtype does not fit.
    """
    return _StarFold.apply(star_weight, shared_weight, out_weight)


class _StarFold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> Tensor:
        ctx.save_for_backward(star_weight, shared_weight, out_weight)
        return _fwd(star_weight, shared_weight, out_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(_bwd(grad, *ctx.saved_tensors))


@torch.library.register_fake("m3oe_fast::star_fold")
def _fwd_fake(star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> Tensor:
    return star_weight.new_empty((*star_weight.shape[:2], out_weight.shape[1]))


@torch.library.register_fake("m3oe_fast::star_fold_bwd")
def _bwd_fake(grad: Tensor, star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> list[Tensor]:
    return [w.new_empty(w.shape) for w in (star_weight, shared_weight, out_weight)]
