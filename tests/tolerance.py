"""How close is close enough: by ratio to what eager PyTorch achieves at the same precision, never by a magic number."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def assert_close_to_oracle(
    actual: Tensor, eager: Tensor, oracle: Tensor, factor: float, name: str = "", stacked: int = 0
) -> None:
    """The error of `actual` against the float64 oracle is at most `factor` times that of eager PyTorch, plus rounding.

    Args:
        actual: what the kernel computed, any shape.
        eager: the same computation by eager PyTorch in the dtype of `actual`.
        oracle: the same in float64.
        factor: FORWARD or GRADIENT.
        stacked: leading axes over which the tensor is stacked (domains, tasks, experts). Each slice is judged by
            itself, relative to its own largest value: one that is wrong must not hide behind another with larger
            values. Eager's relative error is its worst over the slices.

    The floor is 8 units in the last place of the largest value: a sum in another order may lose that much even where
    eager PyTorch happens to be exact.
    """
    assert actual.shape == oracle.shape == eager.shape, f"{name}: shape {list(actual.shape)} != {list(oracle.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype} != {eager.dtype}"
    assert oracle.dtype == torch.float64
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    if oracle.shape[stacked:].numel() == 1:
        stacked = 0  # a lone number may be what is left of a cancellation; its neighbours give the scale
    axes = tuple(range(stacked, oracle.ndim))
    error, eager_error, scale = (
        values.abs().amax(dim=axes) if axes else values.abs()
        for values in (actual.double() - oracle, eager.double() - oracle, oracle)
    )
    eager_relative = (eager_error / scale.clamp(min=torch.finfo(actual.dtype).tiny)).max()
    allowed = (factor * eager_relative + 8 * torch.finfo(actual.dtype).eps) * scale
    worst = (error - allowed).argmax()
    error, allowed = error.flatten()[worst].item(), allowed.flatten()[worst].item()
    assert error <= allowed, (
        f"{name}: error {error:.3e} > {allowed:.3e}, {factor} x eager's {eager_relative:.1e} and 8 ulp"
    )
