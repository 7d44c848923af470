"""Forward pass: from ids and dense columns to logits, one kernel behind `route` and `pack`.

Decomposition: one program per tile of M rows of one domain, ceil(B / M) + D of them, those behind the last tile do
nothing. A program holds its activations in registers: representation [M, H], gates T x [M, G], expert outputs one
after the other [M, X] into T accumulators [M, X], towers [M, Y].

Traffic per tile: the weights of its domain, all experts (0.45 MB in bf16 at the published sizes, from L2), 4 I + 4 T
bytes per row from device memory. Only the gathered input is written and read again, 2 I bytes per row in bf16, from L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .inputs import Inputs, is_wide, load_input
from .launch import launch
from .layout import Layout
from .pack import tape_dtype, unpack
from .route import Routed
from .tile import (
    activate,
    block,
    columns,
    factor,
    held,
    locate,
    multiply,
    normalize,
    part_of,
    parts_of,
    planes,
    product,
    vector,
)


@triton.jit
def stage_input(
    x, ids, embedding, fields, flags, rows, valid, staged, STRIDE: tl.constexpr, L: tl.constexpr, M: tl.constexpr
):
    """Gathers the input of the tile to staged [M, STRIDE], as products read it, I padded with zeros.

    Gathering inside the product would hold ids and addresses beside its sums, which is more registers than there are.
    """
    PRECISION: tl.constexpr = L.precision
    STEP: tl.constexpr = L.input_block
    PADDED: tl.constexpr = L.inputs_padded
    at = tl.arange(0, M)[:, None] * STRIDE + tl.arange(0, STEP)[None, :]
    for k in range(0, PADDED, STEP):
        value = load_input(x, ids, embedding, fields, flags, rows, valid, k, STEP, L)
        tl.store(staged + k + at, held(value, PRECISION))
    tl.debug_barrier()


@triton.jit
def input_product(staged, operands, first, STRIDE: tl.constexpr, L: tl.constexpr, M: tl.constexpr):
    """x [M, I] @ W [I, H] at `first`."""
    PRECISION: tl.constexpr = L.precision
    HP: tl.constexpr = L.hidden_padded
    STEP: tl.constexpr = L.input_block
    PADDED: tl.constexpr = L.inputs_padded
    PLANE: tl.constexpr = L.plane
    acc = tl.zeros([M, HP], tl.float32)
    at = tl.arange(0, M)[:, None] * STRIDE + tl.arange(0, STEP)[None, :]
    for k in range(0, PADDED, STEP):
        a = planes(tl.load(staged + k + at), PRECISION)
        w = block(operands, first + k * HP, STEP, HP, HP, PLANE, PRECISION)
        acc = product(a, w, acc, PRECISION)
    return acc


@triton.jit
def gate_values(r, operands, flat, gate_mask, domain, L: tl.constexpr, M: tl.constexpr):
    """T tensors [M, GP]: the softmax over the experts that the mask allows, zeros elsewhere."""
    T: tl.constexpr = L.tasks
    G: tl.constexpr = L.gated
    GP: tl.constexpr = L.gated_padded
    HP: tl.constexpr = L.hidden_padded
    FIRST: tl.constexpr = L.operands[2]
    BIAS: tl.constexpr = L.flat[9]
    PLANE: tl.constexpr = L.plane
    PRECISION: tl.constexpr = L.precision
    MASKED: tl.constexpr = L.masked
    g = tl.arange(0, GP)
    gates = ()
    for t in tl.static_range(T):
        pair = domain * T + t
        score = tl.zeros([M, GP], tl.float32)
        score = multiply(r, score, operands, FIRST + pair * HP * GP, HP, GP, PLANE, PRECISION)
        score += vector(flat, BIAS + pair * G, G, GP)[None, :]
        allowed = g < G
        if MASKED:
            allowed = allowed & (tl.load(gate_mask + pair * G + g, mask=g < G, other=0) != 0)
        score = tl.where(allowed[None, :], score, float("-inf"))
        top = tl.max(score, 1)
        top = tl.where(top == float("-inf"), 0.0, top)  # a pair whose mask is empty gates nothing
        weight = tl.exp(score - top[:, None])
        total = tl.sum(weight, 1)
        gates = gates + (weight / tl.where(total == 0, 1.0, total)[:, None],)
    return gates


@triton.jit
def coefficient(gates, flat, domain, e, t: tl.constexpr, L: tl.constexpr, M: tl.constexpr):
    """[M]: the weight of expert e in task t."""
    T: tl.constexpr = L.tasks
    E: tl.constexpr = L.experts
    TABLE: tl.constexpr = L.flat[10]
    GP: tl.constexpr = L.gated_padded
    fixed = tl.load(flat + TABLE + (domain * T + t) * E + e)
    if GP > 0:
        return tl.sum(tl.where(tl.arange(0, GP)[None, :] == e, gates[t], 0.0), 1) + fixed
    else:
        return tl.zeros([M], tl.float32) + fixed


@triton.jit
def keep(tape, parts, NP: tl.constexpr, L: tl.constexpr, M: tl.constexpr):
    """Write parts of [M, NP] to columns of the tape, as products read it."""
    PRECISION: tl.constexpr = L.precision
    WIDTH: tl.constexpr = L.tape_width
    n: tl.constexpr = len(parts)
    at = tl.arange(0, M)[:, None] * WIDTH + tl.arange(0, NP // n)[None, :]
    for i in tl.static_range(n):
        tl.store(tape + i * (NP // n) + at, held(parts[i], PRECISION))


@triton.jit
def expert_layer(
    a, e, operands, flat, tape, spreads, layer: tl.constexpr, L: tl.constexpr, M: tl.constexpr, KEEP: tl.constexpr
):
    """z [M, X], in parts, of one layer and all above it, from the factor a of what is below; with KEEP the tape gets
    the normalised outputs, the inputs of deeper layers, and `spreads` what LayerNorm divided by."""
    E: tl.constexpr = L.experts
    DEPTH: tl.constexpr = L.depth
    N: tl.constexpr = L.widths[layer]
    NP: tl.constexpr = L.widths_padded[layer]
    K: tl.constexpr = L.hidden_padded if layer == 0 else L.widths_padded[layer - 1]
    FIRST: tl.constexpr = L.operands[4 + layer]
    BIAS: tl.constexpr = L.flat[17 + 4 * layer + 1]
    GAIN: tl.constexpr = L.flat[17 + 4 * layer + 2]
    OFFSET: tl.constexpr = L.flat[17 + 4 * layer + 3]
    PLANE: tl.constexpr = L.plane
    PRECISION: tl.constexpr = L.precision
    Z: tl.constexpr = L.tape[7 + 2 * layer]
    A: tl.constexpr = L.tape[7 + 2 * layer + 1]
    SPREADS: tl.constexpr = L.spreads
    z = tl.zeros([M, NP], tl.float32)
    z = multiply(a, z, operands, FIRST + e * (K * NP), K, NP, PLANE, PRECISION)
    normal, spread = normalize(z, flat, BIAS + e * N, M, N, NP, PRECISION)
    if KEEP:
        keep(tape + A + e * NP, normal, NP, L, M)
        tl.store(spreads + tl.arange(0, M) * SPREADS + 2 + layer * E + e, spread)
    parts = activate(normal, flat, GAIN + e * N, OFFSET + e * N, N, NP)
    if layer + 1 < DEPTH:
        NEXT: tl.constexpr = L.widths_padded[layer + 1]
        if KEEP:
            keep(tape + Z + e * NP, parts, NP, L, M)
        below = factor(parts, M, NP, NEXT, PRECISION)
        return expert_layer(below, e, operands, flat, tape, spreads, layer + 1, L, M, KEEP)
    else:
        return parts


@triton.jit
def zero_parts(M: tl.constexpr, NP: tl.constexpr):
    n: tl.constexpr = parts_of(NP)
    parts = ()
    for _ in tl.static_range(n):
        parts = parts + (tl.zeros([M, NP // n], tl.float32),)
    return parts


@triton.jit
def add_scaled(sums, scale, parts):
    """sums + scale [M] * parts."""
    n: tl.constexpr = len(parts)
    result = ()
    for i in tl.static_range(n):
        result = result + (sums[i] + scale[:, None] * parts[i],)
    return result


@triton.jit
def mixed_experts(
    r, gates, domain, operands, flat, tape, spreads, L: tl.constexpr, M: tl.constexpr, KEEP: tl.constexpr
):
    """u: for every task the experts [M, X] weighted by gate and table, in parts."""
    T: tl.constexpr = L.tasks
    E: tl.constexpr = L.experts
    XP: tl.constexpr = L.widths_padded[-1]
    u = ()
    for _ in tl.static_range(T):
        u = u + (zero_parts(M, XP),)
    for e in range(E):
        z = expert_layer(r, e, operands, flat, tape, spreads, 0, L, M, KEEP)
        mixed = ()
        for t in tl.static_range(T):
            mixed = mixed + (add_scaled(u[t], coefficient(gates, flat, domain, e, t, L, M), z),)
        u = mixed
    return u


@triton.jit
def tower_normal(u, pair, operands, flat, L: tl.constexpr, M: tl.constexpr):
    """Normalised hidden layer [M, Y] of a tower, in parts, and what LayerNorm divided by."""
    XP: tl.constexpr = L.widths_padded[-1]
    Y: tl.constexpr = L.tower
    YP: tl.constexpr = L.tower_padded
    TOWER: tl.constexpr = L.operands[3]
    BIAS: tl.constexpr = L.flat[12]
    PLANE: tl.constexpr = L.plane
    PRECISION: tl.constexpr = L.precision
    h = tl.zeros([M, YP], tl.float32)
    a = factor(u, M, XP, YP, PRECISION)
    h = multiply(a, h, operands, TOWER + pair * (XP * YP), XP, YP, PLANE, PRECISION)
    return normalize(h, flat, BIAS + pair * Y, M, Y, YP, "fp32")


@triton.jit
def head(h, pair, flat, L: tl.constexpr, M: tl.constexpr):
    """Logit [M] from a tower's hidden layer, in parts."""
    Y: tl.constexpr = L.tower
    YP: tl.constexpr = L.tower_padded
    WEIGHT: tl.constexpr = L.flat[15]
    BIAS: tl.constexpr = L.flat[16]
    n: tl.constexpr = len(h)
    logit = tl.zeros([M], tl.float32) + tl.load(flat + BIAS + pair)
    for i in tl.static_range(n):
        logit += tl.sum(h[i] * part_of(flat, WEIGHT + pair * Y, i, Y, YP)[None, :], 1)
    return logit


@triton.jit
def representation(
    x,
    ids,
    embedding,
    fields,
    flags,
    rows,
    valid,
    domain,
    operands,
    flat,
    staged,
    tape,
    spreads,
    STRIDE: tl.constexpr,
    L: tl.constexpr,
    M: tl.constexpr,
    KEEP: tl.constexpr,
):
    """r [M, H] float32, in parts. With KEEP the tape gets both terms before gain and offset."""
    PRECISION: tl.constexpr = L.precision
    H: tl.constexpr = L.hidden
    HP: tl.constexpr = L.hidden_padded
    IP: tl.constexpr = L.inputs_padded
    REPRESENTATION: tl.constexpr = L.representation
    SPREADS: tl.constexpr = L.spreads
    n: tl.constexpr = parts_of(HP)
    if REPRESENTATION:
        LINEAR: tl.constexpr = L.star_linear
        STAR: tl.constexpr = L.operands[0]
        SKIP: tl.constexpr = L.operands[1]
        STAR_BIAS: tl.constexpr = L.flat[1]
        STAR_GAIN: tl.constexpr = L.flat[2]
        STAR_OFFSET: tl.constexpr = L.flat[3]
        SKIP_BIAS: tl.constexpr = L.flat[5]
        SKIP_GAIN: tl.constexpr = L.flat[6]
        SKIP_OFFSET: tl.constexpr = L.flat[7]
        TAPE_STAR: tl.constexpr = L.tape[1]
        TAPE_SKIP: tl.constexpr = L.tape[2]
        m = tl.arange(0, M)
        first = STAR + domain * (IP * HP)
        stage_input(x, ids, embedding, fields, flags, rows, valid, staged, STRIDE, L, M)
        z = input_product(staged, operands, first, STRIDE, L, M)
        if LINEAR:
            star = biased(z, flat, STAR_BIAS + domain * H, M, H, HP, PRECISION)
        else:
            star, spread = normalize(z, flat, STAR_BIAS + domain * H, M, H, HP, PRECISION)
            if KEEP:
                tl.store(spreads + m * SPREADS, spread)
        if KEEP:
            keep(tape + TAPE_STAR, star, HP, L, M)
        z = input_product(staged, operands, SKIP, STRIDE, L, M)
        skip, spread = normalize(z, flat, SKIP_BIAS, M, H, HP, PRECISION)
        if KEEP:
            tl.store(spreads + m * SPREADS + 1, spread)
            keep(tape + TAPE_SKIP, skip, HP, L, M)
        r = activate(skip, flat, SKIP_GAIN, SKIP_OFFSET, H, HP)
        if not LINEAR:
            star = activate(star, flat, STAR_GAIN, STAR_OFFSET, H, HP)
        both = ()
        for i in tl.static_range(n):
            both = both + (r[i] + star[i].to(tl.float32),)
        return both
    else:
        return columns(load_input(x, ids, embedding, fields, flags, rows, valid, 0, HP, L), M, HP, n)


@triton.jit
def biased(z, flat, bias, M: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr):
    """z [M, NP] + bias, in parts, held."""
    n: tl.constexpr = parts_of(NP)
    parts = columns(z, M, NP, n)
    result = ()
    for i in tl.static_range(n):
        result = result + (held(parts[i] + part_of(flat, bias, i, N, NP)[None, :], PRECISION),)
    return result


@triton.jit
def network_fwd_kernel(
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
    staged,
    output,
    L: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
    PROBABILITY: tl.constexpr,
):
    """output [B, T] float32: logits, or probabilities, of rows in their own order."""
    D: tl.constexpr = L.domains
    DP: tl.constexpr = L.domains_padded
    T: tl.constexpr = L.tasks
    G: tl.constexpr = L.gated
    HP: tl.constexpr = L.hidden_padded
    Y: tl.constexpr = L.tower
    YP: tl.constexpr = L.tower_padded
    PRECISION: tl.constexpr = L.precision
    BESIDE: tl.constexpr = L.beside_hidden
    GAIN: tl.constexpr = L.flat[13]
    OFFSET: tl.constexpr = L.flat[14]
    IP: tl.constexpr = L.inputs_padded
    domain, first, count = locate(counts, tl.program_id(0), D, DP, M)
    staged += tl.program_id(0).to(tl.int64) * (M * IP)
    if count > 0:
        m = tl.arange(0, M)
        valid = m < count
        rows = tl.load(order + first + m, mask=valid, other=0)
        if WIDE:
            rows = rows.to(tl.int64)
        r = representation(
            *(x, ids, embedding, fields, flags, rows, valid, domain, operands, flat),
            *(staged, output, output, IP, L, M, False),
        )
        r = factor(r, M, HP, BESIDE, PRECISION)
        gates = ()
        if G > 0:
            gates = gate_values(r, operands, flat, gate_mask, domain, L, M)
        u = mixed_experts(r, gates, domain, operands, flat, output, output, L, M, False)
        for t in tl.static_range(T):
            pair = domain * T + t
            normal, _ = tower_normal(u[t], pair, operands, flat, L, M)
            h = activate(normal, flat, GAIN + pair * Y, OFFSET + pair * Y, Y, YP)
            logit = head(h, pair, flat, L, M)
            if PROBABILITY:
                logit = 1.0 / (1.0 + tl.exp(-logit))
            tl.store(output + rows * T + t, logit, mask=valid)


def forward(
    inputs: Inputs, routed: Routed, packed: Tensor, gate_mask: Tensor | None, layout: Layout, probability: bool
) -> Tensor:
    """Logits or probabilities [B, T]."""
    rows = inputs.x.shape[0]
    flat, operands = unpack(packed, layout)
    output = torch.empty((rows, layout.tasks), dtype=torch.float32, device=inputs.x.device)
    tile = tuning.forward(layout, tuning.device(output.device))
    tiles = triton.cdiv(rows, tile.rows) + layout.domains if rows else 0
    staged = output.new_empty(
        tiles * tile.rows * layout.inputs_padded if layout.representation else 0, dtype=tape_dtype(layout)
    )
    launch(
        network_fwd_kernel,
        (tiles,),
        *inputs,
        routed.order,
        routed.counts,
        flat,
        operands,
        flat if gate_mask is None else gate_mask.contiguous().view(torch.uint8),
        staged,
        output,
        L=layout,
        M=tile.rows,
        WIDE=is_wide(rows, layout, inputs.embedding),
        PROBABILITY=probability,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return output
