"""Device function that reads the input of a tile: embeddings gathered from their table, then the dense columns.

Traffic: the ids of a row once per block of columns (from L1 after the first), 4 bytes per element of x.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Layout


@triton.jit
def load_input(
    x,
    ids,
    embedding,
    fields,
    flags,
    rows,
    valid,
    first,
    WIDTH: tl.constexpr,
    L: tl.constexpr,
):
    """[M, WIDTH] float32: columns first, first + 1, .. of the input of `rows` [M]; zeros where not `valid` or behind I.

    fields [2, F] int64: first row of each field in the table, and its number of rows. An id out of range reads the
    nearest row of its field and leaves 1 + row * 65536 + field in flags[0], the largest of the call. Places are counted
    in the integers of `rows`: 32 bits where they do (see `is_wide`), as 64 take twice the registers.
    """
    INPUTS: tl.constexpr = L.inputs
    COLUMNS: tl.constexpr = L.columns
    EMBED: tl.constexpr = L.embed
    FIELDS: tl.constexpr = L.fields
    EMBEDDED: tl.constexpr = INPUTS - COLUMNS
    i = first + tl.arange(0, WIDTH)
    inside = valid[:, None] & (i < INPUTS)[None, :]
    is_dense = inside & (i >= EMBEDDED)[None, :]
    value = tl.load(x + rows[:, None] * COLUMNS + (i - EMBEDDED)[None, :], mask=is_dense, other=0.0)
    if FIELDS > 0:
        is_embedded = inside & (i < EMBEDDED)[None, :]
        field = tl.minimum(i // EMBED, FIELDS - 1)
        start, size = tl.load(fields + field), tl.load(fields + FIELDS + field)
        at = rows[:, None] * FIELDS + field[None, :]
        id = tl.load(ids + at, mask=is_embedded, other=0)
        wrong = is_embedded & ((id < 0) | (id >= size[None, :]))
        if tl.max(tl.max(wrong.to(tl.int32), 1), 0) > 0:
            place = rows.to(tl.int64)[:, None] * 65536 + field[None, :] + 1
            tl.atomic_max(flags, tl.max(tl.max(tl.where(wrong, place, 0), 1), 0))
        row = tl.maximum(tl.minimum(id, size[None, :] - 1), 0).to(rows.dtype) + start[None, :].to(rows.dtype)
        value += tl.load(embedding + row * EMBED + (i % EMBED)[None, :], mask=is_embedded, other=0.0)
    return value


class Inputs(NamedTuple):
    """What `load_input` reads: x [B, C], ids [B, F], embedding [V, N] (x where there are none), fields and flags."""

    x: Tensor
    ids: Tensor
    embedding: Tensor
    fields: Tensor
    flags: Tensor


@functools.cache
def fields_on(device: torch.device, vocab: tuple[int, ...]) -> Tensor:
    """int64 [2, F]: first row and number of rows of each field. Kept, so that a captured step copies nothing."""
    starts = [sum(vocab[:i]) for i in range(len(vocab))]
    with torch.inference_mode(False):
        return torch.tensor([starts, list(vocab)], dtype=torch.int64, device=device)


def is_wide(rows: int, layout: Layout, embedding: Tensor) -> bool:
    """Whether places in x, ids, the table, logits or the gradient of the input need 64 bits."""
    per_row = max(layout.inputs, layout.fields, layout.tasks)
    return max((rows + 4096) * per_row, embedding.numel()) >= 2**31


def inputs(x: Tensor, ids: Tensor | None, embedding: Tensor | None, vocab: tuple[int, ...], flags: Tensor) -> Inputs:
    x = x.contiguous()
    if ids is None or embedding is None:
        return Inputs(x, x, x, flags, flags)
    return Inputs(x, ids.contiguous(), embedding.contiguous(), fields_on(x.device, vocab), flags)
