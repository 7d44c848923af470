"""Backward pass of a tile: forward again, then the chain of gradients down to the input, all on chip.

Decomposition: one program per tile of M rows of one domain, in chunks of the batch. What the weight gradients need
goes to the tape (`layout.py`; 3.6 KB per row in bf16 at the published sizes), which `gradients.py` reads before
the next chunk. The normalised outputs of LayerNorm wait in the columns that their gradients overwrite, so nothing is
computed twice. Sums over the rows of a tile (gradients of biases, gains, offsets, fusion table and heads; the loss) go
to the tile's own row of `vectors`: no atomics, the same bits every time.

With labels the gradient of the loss begins in the kernel, so one pass gives loss and gradients; otherwise it begins
with the given gradient of the logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .gradients import WeightGradients
from .inputs import Inputs, is_wide
from .launch import launch
from .layout import Layout
from .network import (
    add_scaled,
    coefficient,
    gate_values,
    head,
    keep,
    mixed_experts,
    representation,
    tower_normal,
    zero_parts,
)
from .pack import tape_dtype, unpack
from .route import Routed
from .tile import (
    activate,
    activate_bwd,
    columns,
    factor,
    locate,
    multiply_transposed,
    part_of,
    parts_of,
    store_part,
)


@triton.jit
def kept(tape, NP: tl.constexpr, L: tl.constexpr, M: tl.constexpr):
    """Read parts of [M, NP] back from columns of the tape; the barrier lets the caller overwrite them."""
    WIDTH: tl.constexpr = L.tape_width
    n: tl.constexpr = parts_of(NP)
    at = tl.arange(0, M)[:, None] * WIDTH + tl.arange(0, NP // n)[None, :]
    parts = ()
    for i in tl.static_range(n):
        parts = parts + (tl.load(tape + i * (NP // n) + at),)
    tl.debug_barrier()
    return parts


@triton.jit
def loss_of(logit, y, weight):
    """Binary cross-entropy of a logit [M] times weight [M], and its derivative; both 0 where y is NaN."""
    small = tl.exp(-tl.abs(logit))
    above = 1.0 + small
    # log1p without a library: the quotient undoes the rounding of 1 + small.
    log = tl.where(above == 1.0, small, tl.log(above) * (small / tl.where(above == 1.0, 1.0, above - 1.0)))
    probability = tl.where(logit < 0, small, 1.0) / above
    seen = y == y
    known = tl.where(seen, y, 0.0)
    loss = tl.where(logit < 0, 0.0, logit) - logit * known + log
    return tl.where(seen, loss * weight, 0.0), tl.where(seen, (probability - known) * weight, 0.0)


@triton.jit
def head_bwd(d_logit, h, pair, flat, vectors, d_head, L: tl.constexpr):
    """Gradient of a tower's hidden layer, in parts, for that of its logit [M]; that of the head goes to `vectors`."""
    Y: tl.constexpr = L.tower
    YP: tl.constexpr = L.tower_padded
    WEIGHT: tl.constexpr = L.flat[15]
    n: tl.constexpr = len(h)
    result = ()
    for i in tl.static_range(n):
        store_part(vectors, d_head, tl.sum(d_logit[:, None] * h[i], 0), i, Y, YP)
        result = result + (d_logit[:, None] * part_of(flat, WEIGHT + pair * Y, i, Y, YP)[None, :],)
    return result


@triton.jit
def dot_rows(a, b, M: tl.constexpr):
    """[M]: the product of every row of a with the same row of b, both in parts."""
    n: tl.constexpr = len(a)
    total = tl.zeros([M], tl.float32)
    for i in tl.static_range(n):
        total += tl.sum(a[i] * b[i], 1)
    return total


@triton.jit
def sum_rows(parts, vectors, first, N: tl.constexpr, NP: tl.constexpr):
    """The sum over rows goes to `vectors`."""
    n: tl.constexpr = len(parts)
    for i in tl.static_range(n):
        store_part(vectors, first, tl.sum(parts[i], 0), i, N, NP)


@triton.jit
def expert_layer_bwd(
    dz, normal, dr, e, operands, flat, tape, spreads, vectors, layer: tl.constexpr, L: tl.constexpr, M: tl.constexpr
):
    """dr [M, H] + what flows into it through one expert, for the gradient dz [M, X], in parts, of a layer's output and
    what the tape kept of that layer (`kept`), in parts."""
    E: tl.constexpr = L.experts
    N: tl.constexpr = L.widths[layer]
    NP: tl.constexpr = L.widths_padded[layer]
    K: tl.constexpr = L.hidden_padded if layer == 0 else L.widths_padded[layer - 1]
    FIRST: tl.constexpr = L.operands[4 + layer]
    GAIN: tl.constexpr = L.flat[17 + 4 * layer + 2]
    OFFSET: tl.constexpr = L.flat[17 + 4 * layer + 3]
    D_BIAS: tl.constexpr = L.vector_of[17 + 4 * layer + 1]
    D_GAIN: tl.constexpr = L.vector_of[17 + 4 * layer + 2]
    D_OFFSET: tl.constexpr = L.vector_of[17 + 4 * layer + 3]
    PLANE: tl.constexpr = L.plane
    PRECISION: tl.constexpr = L.precision
    A: tl.constexpr = L.tape[7 + 2 * layer + 1]
    SPREADS: tl.constexpr = L.spreads
    spread = tl.load(spreads + tl.arange(0, M) * SPREADS + 2 + layer * E + e)
    shift = e * N
    da = activate_bwd(
        *(dz, normal, spread, flat, GAIN + shift, OFFSET + shift),
        *(vectors, D_BIAS + shift, D_GAIN + shift, D_OFFSET + shift, M, N, NP),
    )
    keep(tape + A + e * NP, da, NP, L, M)
    a = factor(da, M, NP, K, PRECISION)
    if layer == 0:
        return multiply_transposed(a, dr, operands, FIRST + e * (K * NP), K, NP, PLANE, PRECISION)
    else:
        below = tl.zeros([M, K], tl.float32)
        below = multiply_transposed(a, below, operands, FIRST + e * (K * NP), K, NP, PLANE, PRECISION)
        below = columns(below, M, K, parts_of(K))
        BELOW: tl.constexpr = L.tape[7 + 2 * (layer - 1) + 1]
        normal = kept(tape + BELOW + e * K, K, L, M)
        return expert_layer_bwd(below, normal, dr, e, operands, flat, tape, spreads, vectors, layer - 1, L, M)


@triton.jit
def term_bwd(
    dr,
    flat,
    tape,
    spreads,
    vectors,
    column: tl.constexpr,
    weight: tl.constexpr,
    which: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
):
    """Gradient [M, H] of x W + b for one term of the representation, whose bias is `weight` of the schema."""
    H: tl.constexpr = L.hidden
    HP: tl.constexpr = L.hidden_padded
    SPREADS: tl.constexpr = L.spreads
    GAIN: tl.constexpr = L.flat[weight + 1]
    OFFSET: tl.constexpr = L.flat[weight + 2]
    D_BIAS: tl.constexpr = L.vector_of[weight]
    D_GAIN: tl.constexpr = L.vector_of[weight + 1]
    D_OFFSET: tl.constexpr = L.vector_of[weight + 2]
    normal = kept(tape + column, HP, L, M)
    spread = tl.load(spreads + tl.arange(0, M) * SPREADS + which)
    da = activate_bwd(dr, normal, spread, flat, GAIN, OFFSET, vectors, D_BIAS, D_GAIN, D_OFFSET, M, H, HP)
    keep(tape + column, da, HP, L, M)
    return da


@triton.jit
def store_input_gradient(values, d_input, peak, rows, valid, first, WIDTH: tl.constexpr, L: tl.constexpr):
    """Columns of d_input [B, I], and in `peak` the bits of the largest magnitude among the embedded ones."""
    INPUTS: tl.constexpr = L.inputs
    EMBEDDED: tl.constexpr = L.inputs - L.columns
    i = first + tl.arange(0, WIDTH)
    tl.store(d_input + rows[:, None] * INPUTS + i[None, :], values, mask=valid[:, None] & (i < INPUTS)[None, :])
    if EMBEDDED > 0:
        size = tl.where((i < EMBEDDED)[None, :], tl.abs(values), 0.0)
        size = tl.where(size < float("inf"), size, float("inf"))  # NaN too
        # Bits of non-negative floats are ordered as the floats are, and the largest does not depend on the order.
        tl.atomic_max(peak, tl.max(tl.max(size, 1), 0).to(tl.int32, bitcast=True))


@triton.jit
def input_bwd(star, skip, domain, operands, d_input, peak, rows, valid, L: tl.constexpr, M: tl.constexpr):
    """Gradient of the input [M, I] from those of both products, a block of columns at a time."""
    HP: tl.constexpr = L.hidden_padded
    IP: tl.constexpr = L.inputs_padded
    STEP: tl.constexpr = L.input_block
    PLANE: tl.constexpr = L.plane
    PRECISION: tl.constexpr = L.precision
    STAR: tl.constexpr = L.operands[0]
    SKIP: tl.constexpr = L.operands[1]
    star, skip = factor(star, M, HP, STEP, PRECISION), factor(skip, M, HP, STEP, PRECISION)
    for i in tl.range(0, IP, STEP, num_stages=1):
        dx = tl.zeros([M, STEP], tl.float32)
        dx = multiply_transposed(star, dx, operands, STAR + (domain * IP + i) * HP, STEP, HP, PLANE, PRECISION)
        dx = multiply_transposed(skip, dx, operands, SKIP + i * HP, STEP, HP, PLANE, PRECISION)
        store_input_gradient(dx, d_input, peak, rows, valid, i, STEP, L)


# A step of several chunks would compile the kernel once for a tile number divisible by 16 and once for others.
@triton.jit(do_not_specialize=["first_tile"])
def network_bwd_kernel(
    x,
    ids,
    embedding,
    fields,
    flags,
    order,
    counts,
    flat,
    operands,
    gate_mask,
    grad,
    row_weight,
    pair_weight,
    labelled,
    peak,
    tape,
    spreads,
    vectors,
    d_input,
    first_tile,
    L: tl.constexpr,
    M: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr,
    LOSS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
):
    """grad [B, T] is the gradient of the logits, or with LOSS the labels. Writes the rows of the chunk's tape, the
    tile's row of `vectors`, and with INPUT_GRAD d_input [B, I]."""
    D: tl.constexpr = L.domains
    DP: tl.constexpr = L.domains_padded
    T: tl.constexpr = L.tasks
    E: tl.constexpr = L.experts
    G: tl.constexpr = L.gated
    GP: tl.constexpr = L.gated_padded
    H: tl.constexpr = L.hidden
    HP: tl.constexpr = L.hidden_padded
    X: tl.constexpr = L.widths[-1]
    XP: tl.constexpr = L.widths_padded[-1]
    Y: tl.constexpr = L.tower
    YP: tl.constexpr = L.tower_padded
    DEPTH: tl.constexpr = L.depth
    PRECISION: tl.constexpr = L.precision
    PLANE: tl.constexpr = L.plane
    WIDTH: tl.constexpr = L.tape_width
    SPREADS: tl.constexpr = L.spreads
    VECTORS: tl.constexpr = L.vector_width
    BESIDE: tl.constexpr = L.beside_hidden
    LINEAR: tl.constexpr = L.star_linear
    DETACH: tl.constexpr = L.gate_detach
    REPRESENTATION: tl.constexpr = L.representation
    TOWER: tl.constexpr = L.operands[3]
    GATE: tl.constexpr = L.operands[2]
    GAIN: tl.constexpr = L.flat[13]
    OFFSET: tl.constexpr = L.flat[14]
    LAST_GAIN: tl.constexpr = L.flat[17 + 4 * (DEPTH - 1) + 2]
    LAST_OFFSET: tl.constexpr = L.flat[17 + 4 * (DEPTH - 1) + 3]
    TAPE_X: tl.constexpr = L.tape[0]
    TAPE_STAR: tl.constexpr = L.tape[1]
    TAPE_SKIP: tl.constexpr = L.tape[2]
    TAPE_R: tl.constexpr = L.tape[3]
    TAPE_SCORE: tl.constexpr = L.tape[4]
    TAPE_U: tl.constexpr = L.tape[5]
    TAPE_TOWER: tl.constexpr = L.tape[6]
    TAPE_LAST: tl.constexpr = L.tape[7 + 2 * (DEPTH - 1) + 1]
    D_STAR_BIAS: tl.constexpr = L.vector_of[1]
    D_STAR_GAIN: tl.constexpr = L.vector_of[2]
    D_STAR_OFFSET: tl.constexpr = L.vector_of[3]
    D_GATE_BIAS: tl.constexpr = L.vector_of[9]
    D_TABLE: tl.constexpr = L.vector_of[10]
    D_BIAS: tl.constexpr = L.vector_of[12]
    D_GAIN: tl.constexpr = L.vector_of[13]
    D_OFFSET: tl.constexpr = L.vector_of[14]
    D_HEAD: tl.constexpr = L.vector_of[15]
    D_HEAD_BIAS: tl.constexpr = L.vector_of[16]
    D_LOSS: tl.constexpr = L.vector_of[-1]

    slot = tl.program_id(0)
    tile = first_tile + slot
    domain, first, count = locate(counts, tile, D, DP, M)
    if count > 0:
        m = tl.arange(0, M)
        valid = m < count
        rows = tl.load(order + first + m, mask=valid, other=0)
        if WIDE:
            rows = rows.to(tl.int64)
        tape += slot.to(tl.int64) * (M * WIDTH)
        spreads += slot.to(tl.int64) * (M * SPREADS)
        vectors += tile.to(tl.int64) * VECTORS

        # Forward again, up to what the towers read.
        whole = representation(
            *(x, ids, embedding, fields, flags, rows, valid, domain, operands, flat),
            *(tape + TAPE_X, tape, spreads, WIDTH, L, M, True),
        )
        keep(tape + TAPE_R, whole, HP, L, M)
        r = factor(whole, M, HP, BESIDE, PRECISION)
        gates = ()
        if G > 0:
            gates = gate_values(r, operands, flat, gate_mask, domain, L, M)
        u = mixed_experts(r, gates, domain, operands, flat, tape, spreads, L, M, True)

        # Towers forward and backward, down to du.
        du = ()
        for t in tl.static_range(T):
            pair = domain * T + t
            normal, spread = tower_normal(u[t], pair, operands, flat, L, M)
            h = activate(normal, flat, GAIN + pair * Y, OFFSET + pair * Y, Y, YP)
            if LOSS:
                y = tl.load(grad + rows * T + t, mask=valid, other=float("nan"))
                part = tl.arange(0, PARTS_PADDED)
                seen = tl.load(labelled + part * (D * T) + pair, mask=part < PARTS, other=0)
                weight = tl.zeros([M], tl.float32) + 1.0 / tl.maximum(tl.sum(seen, 0), 1).to(tl.float32)
                if WEIGHTED:
                    weight *= tl.load(row_weight + rows, mask=valid, other=0.0)
                loss, d_logit = loss_of(head(h, pair, flat, L, M), y, weight)
                d_logit *= tl.load(pair_weight + pair)
                tl.store(vectors + D_LOSS + t, tl.sum(loss, 0))
            else:
                d_logit = tl.load(grad + rows * T + t, mask=valid, other=0.0)
            tl.store(vectors + D_HEAD_BIAS + t, tl.sum(d_logit, 0))
            dh = head_bwd(d_logit, h, pair, flat, vectors, D_HEAD + t * Y, L)
            dt = activate_bwd(
                *(dh, normal, spread, flat, GAIN + pair * Y, OFFSET + pair * Y),
                *(vectors, D_BIAS + t * Y, D_GAIN + t * Y, D_OFFSET + t * Y, M, Y, YP),
            )
            keep(tape + TAPE_U + t * XP, u[t], XP, L, M)
            keep(tape + TAPE_TOWER + t * YP, dt, YP, L, M)
            below = tl.zeros([M, XP], tl.float32)
            a = factor(dt, M, YP, XP, PRECISION)
            below = multiply_transposed(a, below, operands, TOWER + pair * (XP * YP), XP, YP, PLANE, PRECISION)
            du = du + (columns(below, M, XP, parts_of(XP)),)

        # Experts: what the tape holds of them was written by other threads.
        tl.debug_barrier()
        dr = tl.zeros([M, HP], tl.float32)
        d_gates = ()
        if G > 0:
            for _ in tl.static_range(T):
                d_gates = d_gates + (tl.zeros([M, GP], tl.float32),)
        for e in range(E):
            output = kept(tape + TAPE_LAST + e * XP, XP, L, M)
            z = activate(output, flat, LAST_GAIN + e * X, LAST_OFFSET + e * X, X, XP)
            dz = zero_parts(M, XP)
            summed = ()
            for t in tl.static_range(T):
                dz = add_scaled(dz, coefficient(gates, flat, domain, e, t, L, M), du[t])
                d_coefficient = dot_rows(du[t], z, M)
                tl.store(vectors + D_TABLE + t * E + e, tl.sum(d_coefficient, 0))
                if G > 0:
                    own = tl.arange(0, GP)[None, :] == e
                    summed = summed + (d_gates[t] + tl.where(own, d_coefficient[:, None], 0.0),)
            d_gates = summed
            dr = expert_layer_bwd(dz, output, dr, e, operands, flat, tape, spreads, vectors, DEPTH - 1, L, M)

        # Gates.
        if G > 0:
            for t in tl.static_range(T):
                pair = domain * T + t
                along = tl.sum(gates[t] * d_gates[t], 1)
                score = columns(gates[t] * (d_gates[t] - along[:, None]), M, GP, parts_of(GP))
                keep(tape + TAPE_SCORE + t * GP, score, GP, L, M)
                sum_rows(score, vectors, D_GATE_BIAS + t * G, G, GP)
                if not DETACH:
                    a = factor(score, M, GP, HP, PRECISION)
                    dr = multiply_transposed(a, dr, operands, GATE + pair * (HP * GP), HP, GP, PLANE, PRECISION)

        # Representation and input.
        if REPRESENTATION:
            d_parts = columns(dr, M, HP, parts_of(HP))
            skip = term_bwd(d_parts, flat, tape, spreads, vectors, TAPE_SKIP, 5, 1, L, M)
            star = d_parts
            if LINEAR:
                keep(tape + TAPE_STAR, star, HP, L, M)
                sum_rows(star, vectors, D_STAR_BIAS, H, HP)
                h = tl.arange(0, HP)
                tl.store(vectors + D_STAR_GAIN + h, tl.zeros([HP], tl.float32), mask=h < H)
                tl.store(vectors + D_STAR_OFFSET + h, tl.zeros([HP], tl.float32), mask=h < H)
            else:
                star = term_bwd(d_parts, flat, tape, spreads, vectors, TAPE_STAR, 1, 0, L, M)
            if INPUT_GRAD:
                input_bwd(star, skip, domain, operands, d_input, peak, rows, valid, L, M)
        elif INPUT_GRAD:
            store_input_gradient(dr, d_input, peak, rows, valid, 0, HP, L)


class Targets(NamedTuple):
    """Where the gradient begins: at that of the logits [B, T], or at the loss of labels [B, T]; row_weight [B],
    pair_weight [D, T]."""

    grad: Tensor
    is_label: bool
    row_weight: Tensor | None = None
    pair_weight: Tensor | None = None


def backward(
    inputs: Inputs,
    routed: Routed,
    packed: Tensor,
    gate_mask: Tensor | None,
    targets: Targets,
    layout: Layout,
    input_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of `flat` with pair_loss behind it, and that of the whole input [B, I] if asked for."""
    rows, device = inputs.x.shape[0], inputs.x.device
    flat, operands = unpack(packed, layout)
    on = tuning.device(device)
    tile, gradient = tuning.backward(layout, on), tuning.gradient(layout, on)
    tiles = triton.cdiv(rows, tile.rows) + layout.domains
    chunk = min(tiles, on.processors * gradient.waves)
    behind = max(*gradient.wide, *gradient.narrow)  # blocks read past the last column of the last row

    def scratch(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    tape = scratch(chunk * tile.rows * layout.tape_width + behind, tape_dtype(layout))
    spreads = scratch(chunk * tile.rows * layout.spreads)
    vectors = scratch(tiles * layout.vector_width)
    d_input = scratch(rows * layout.inputs).view(rows, layout.inputs) if input_grad else None
    weights = WeightGradients(layout, routed.counts, tile.rows)
    absent = flat
    mask = absent if gate_mask is None else gate_mask.contiguous().view(torch.uint8)
    grad, *scales = (
        absent if tensor is None else tensor.contiguous()
        for tensor in (targets.grad, targets.row_weight, targets.pair_weight)
    )
    for first_tile in range(0, tiles, chunk):
        launch(
            network_bwd_kernel,
            (min(chunk, tiles - first_tile),),
            *inputs,
            routed.order,
            routed.counts,
            flat,
            operands,
            mask,
            grad,
            *scales,
            routed.labelled,
            routed.peak,
            tape,
            spreads,
            vectors,
            absent if d_input is None else d_input,
            first_tile,
            L=layout,
            M=tile.rows,
            PARTS=routed.parts,
            PARTS_PADDED=triton.next_power_of_2(routed.parts),
            LOSS=targets.is_label,
            WEIGHTED=targets.row_weight is not None,
            WIDE=is_wide(rows, layout, inputs.embedding),
            INPUT_GRAD=input_grad,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        weights.add(tape, first_tile, chunk)
    return weights.finish(vectors), d_input
