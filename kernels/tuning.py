"""Tile heights, warps and pipeline depth, by rule from the sizes of the network and the GPU; no search at run time.

A tile of M rows costs registers for every column that is live at once, and shared memory for the blocks of matrices in
flight. The height is the largest that fits; at the published sizes 128 rows forward and 64 backward in bf16.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .layout import Layout


@dataclass(frozen=True)
class Tuning:
    """How a kernel is launched: rows of a tile, warps of a program, stages of its pipelined loops."""

    rows: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GradientTuning:
    """Of the weight gradients: sizes of the two kinds of output blocks, rows taken at once, and tiles of a chunk.

    A chunk of the batch is `waves` tiles for every multiprocessor: few enough that its tape may stay in L2, many enough
    that partial sums are not read and written too often. Not yet tuned on a GPU.
    """

    wide: tuple[int, int] = (128, 128)
    narrow: tuple[int, int] = (64, 32)
    depth: int = 64
    warps: int = 8
    stages: int = 3
    waves: int = 2


@dataclass(frozen=True)
class Device:
    """What of a GPU decides the tiles: its multiprocessors, and bytes of shared memory that a program may have."""

    processors: int
    shared: int

    @property
    def widest(self) -> int:
        """Largest hidden, expert or tower width, and gated experts: blocks of a matrix as wide must fit."""
        return 2048 if self.shared >= _AMPLE else 1024


_AMPLE = 160 * 1024  # shared memory of data centre GPUs; others have 99 KB
_INTERPRETER = Device(processors=8, shared=227 * 1024)  # few, so that tests split work there too


def check(layout: Layout, on: torch.device) -> None:
    """Raises ValueError where a width is beyond what the GPU can hold."""
    widest = max(layout.hidden, *layout.widths, layout.tower, layout.gated)
    if widest > device(on).widest:
        raise ValueError(
            f"backend triton holds widths up to {device(on).widest} here, this network has one of {widest}"
        )


@functools.cache
def device(of: torch.device) -> Device:
    if of.type != "cuda":
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(of)
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin)


@functools.cache
def forward(layout: Layout, on: Device) -> Tuning:
    return _tuning(layout, on, _forward_columns(layout))


@functools.cache
def backward(layout: Layout, on: Device) -> Tuning:
    mixing = layout.tasks * (layout.widths_padded[-1] + 2 * layout.gated_padded)
    columns = _held(layout) + layout.hidden_padded + mixing + 3 * max(layout.widths_padded)
    return _tuning(layout, on, max(columns, _forward_columns(layout)))


@functools.cache
def gradient(layout: Layout, on: Device) -> GradientTuning:
    return GradientTuning(stages=3 if layout.precision == "bf16" and on.shared >= _AMPLE else 2)


def _held(layout: Layout) -> float:
    """Columns of 4 bytes that a row of [M, H] takes while it waits for its next use."""
    return layout.hidden_padded * (0.5 if layout.precision == "bf16" else 1.0)


def _forward_columns(layout: Layout) -> float:
    """Most columns of 4 bytes that are live at once: both terms of r, or r with the experts and what they add up to."""
    mixing = layout.tasks * (layout.widths_padded[-1] + layout.gated_padded)
    return max(layout.hidden_padded + _held(layout), _held(layout) + mixing + max(layout.widths_padded))


def _tuning(layout: Layout, on: Device, columns: float) -> Tuning:
    """The tallest tile whose live columns leave a fifth of the 64 K registers free, on the fewest warps."""
    rows = next((m for m in (128, 64, 32) if m * columns <= 52_000), 16)
    return Tuning(rows, 4 if rows * columns <= 20_000 else 8, _stages(layout, on))


def _stages(layout: Layout, on: Device) -> int:
    """Experts in flight: every stage holds the matrices of one in shared memory. A single stage holds one block."""
    ins = (layout.hidden_padded, *layout.widths_padded[:-1])
    elements = sum(rows * cols for rows, cols in zip(ins, layout.widths_padded, strict=True))
    expert = elements * (2 if layout.precision == "bf16" else 4)  # bf16x3 has two planes of 2 bytes
    most = 3 if layout.precision == "bf16" else 2
    if on.shared < _AMPLE:
        return 1
    return next((stages for stages in range(most, 1, -1) if stages * expert <= 128 * 1024), 1)
