"""What kernels found wrong with their input, kept on the device until somebody asks.

A GPU step cannot stop to raise: an id or a domain out of range is replaced by the nearest one, and its place is kept
here, of an id of a multi-hot field only the bag. `check` reads it, which waits for the device; training does so when it
reads its metrics.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def of(device: torch.device) -> Tensor:
    """int64 [3], the same tensor every time: 1 + row * 65536 + field of an id, 1 + row of a domain, and 1 + bag of a
    multi-hot id; 0 for none."""
    if device.type != "cuda":
        return _flags(device.type, 0)
    return _flags(device.type, torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _flags(kind: str, index: int) -> Tensor:
    if kind == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run a call before capturing one into a CUDA graph: what is kept must not be the graph's")
    with torch.inference_mode(False):
        return torch.zeros(3, dtype=torch.int64, device=torch.device(kind, index))


def remember_bag(wrong: Tensor, place: int) -> None:
    """Keep that bag `place` held an id out of range if any of `wrong`, bool [n], is true; waits for no device."""
    found = of(wrong.device)[2]
    found.copy_(torch.maximum(found, wrong.any() * (place + 1)))


def check(device: torch.device) -> None:
    """Raise for what was found on `device` since the last check, by whatever model.

    Raises:
        ValueError: an id or a domain was out of range in some batch; names row and field, or bag, of one.
    """
    id_place, domain_place, bag_place = of(device).tolist()
    of(device).zero_()
    if id_place:
        row, field = divmod(id_place - 1, 65536)
        raise ValueError(f"ids[{row}, {field}] of a batch is out of range; the nearest id was used instead")
    if domain_place:
        raise ValueError(f"domain[{domain_place - 1}] of a batch is out of range; the nearest domain was used instead")
    if bag_place:
        raise ValueError(f"an id of bags[{bag_place - 1}] of a batch is out of range; the nearest id was used instead")
