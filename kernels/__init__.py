"""Triton kernels and their launchers, one file per concept. Installed as `m3oe_fast.kernels`.

    layout     sizes, and where everything lies in the buffers that kernels share
    tuning     tile heights, warps and stages by size
    launch     how kernels are started and counted
    flags      ids and domains found out of range
    tile       device functions: products by precision, LayerNorm, the rows of a tile
    inputs     device function: embeddings and dense columns of a tile
    route      rows sorted by domain
    pack       weights padded and rounded for products
    network    forward
    backward   gradients down to the input, tile by tile
    gradients  weight gradients from what `backward` leaves
    embedding  gradient of the embedding table
    fold       the star layer folded into one matrix per domain
    ops        all of it as ops of the namespace m3oe_fast_triton

Importing this package never imports triton: it is optional (`pip install 'm3oe_fast[triton]'`).
"""

from __future__ import annotations

import torch

from . import flags
from .launch import installed, interpreted, launches

__all__ = ["check_inputs", "installed", "interpreted", "launches"]


def check_inputs(device: torch.device) -> None:
    """Raise ValueError if an id or domain was out of range in a batch on `device` since the last check (`flags`)."""
    flags.check(device)
