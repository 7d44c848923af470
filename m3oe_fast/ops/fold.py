"""`star_fold`: the star layer folded into one matrix per domain, M_d = (W_d * W_sh) W_c, through the kernels.

The same as one line of torch, whose matrix product is less than half as fast on some processors; a training step of a
few thousand rows notices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from m3oe_fast.ops.namespace import backend_of, fake, ops


def star_fold(star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor, backend: str | None = None) -> Tensor:
    """(star_weight * shared_weight) @ out_weight.

    Args:
        star_weight: [D, I, S] float32 or float64.
        shared_weight: [I, S] in the same dtype.
        out_weight: [S, H] in the same dtype.
        backend: "cpu" or "triton" (float32 only); None: by the device.

    Returns:
        Tensor: [D, I, H]. Differentiable once, in reverse mode. The same bits for any number of threads.

    Raises:
        RuntimeError: a shape or dtype does not fit.
    """
    return _StarFold.apply(star_weight, shared_weight, out_weight, backend or backend_of(star_weight.device))


class _StarFold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(star_weight, shared_weight, out_weight)
        ctx.backend = backend
        return ops(backend).star_fold(star_weight, shared_weight, out_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*ops(ctx.backend).star_fold_bwd(grad, *ctx.saved_tensors), None)


@fake("star_fold")
def _fwd_fake(star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> Tensor:
    return star_weight.new_empty((*star_weight.shape[:2], out_weight.shape[1]))


@fake("star_fold_bwd")
def _bwd_fake(grad: Tensor, star_weight: Tensor, shared_weight: Tensor, out_weight: Tensor) -> list[Tensor]:
    return [w.new_empty(w.shape) for w in (star_weight, shared_weight, out_weight)]
