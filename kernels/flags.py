"""What kernels found wrong with their input, kept on the device until somebody asks.

A GPU step cannot stop to raise: an id or a domain out of range is replaced by the nearest one, and its place is kept
here. `check` reads it, which waits for the device; training does so when it reads its metrics.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def of(device: torch.device) -> Tensor:
    """int64 [2], the same tensor every time: 1 + row * F + field of an id, and 1 + row of a domain, 0 for none."""
    return torch.zeros(2, dtype=torch.int64, device=device)


def check(device: torch.device, fields: int) -> None:
    """Raise for what was found on `device` since the last check.

    Args:
        fields: F of the model whose inputs are checked.

    Raises:
        ValueError: an id or a domain was out of range in some batch; names row and field of one.
    """
    id_place, domain_place = of(device).tolist()
    of(device).zero_()
    if id_place:
        row, field = divmod(id_place - 1, max(fields, 1))
        raise ValueError(f"ids[{row}, {field}] of a batch is out of range; the nearest id was used instead")
    if domain_place:
        raise ValueError(f"domain[{domain_place - 1}] of a batch is out of range; the nearest domain was used instead")
