"""How close is close enough: by ratio to what eager PyTorch achieves at the same precision, never by a magic number."""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def assert_close_to_oracle(actual: Tensor, eager: Tensor, oracle: Tensor, factor: float, name: str = "") -> None:
    """The error of `actual` against the float64 oracle is at most `factor` times that of eager PyTorch, plus rounding.

    Args:
        actual: what the kernel computed, any shape.
        eager: the same computation by eager PyTorch in the dtype of `actual`.
        oracle: the same in float64.
        factor: FORWARD or GRADIENT.

    The floor is 8 units in the last place of the largest value: a sum in another order may lose that much even where
    eager PyTorch happens to be exact.
    """
    assert actual.shape == oracle.shape == eager.shape, f"{name}: shape {list(actual.shape)} != {list(oracle.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype} != {eager.dtype}"
    assert oracle.dtype == torch.float64
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: not finite"
    error = (actual.double() - oracle).abs().max().item()
    allowed = factor * (eager.double() - oracle).abs().max().item()
    floor = 8 * torch.finfo(actual.dtype).eps * oracle.abs().max().item()
    assert error <= allowed + floor, (
        f"{name}: error {error:.3e} > {factor} x eager {allowed / factor:.3e} + {floor:.1e}"
    )
