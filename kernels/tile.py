"""Device functions that every kernel builds its tile from: products by precision, LayerNorm, where a tile's rows are.

A tile is M rows of one domain. Its activations stay in registers; matrices stream from L2 in blocks of at most
`BLOCK_BYTES`, so that a few stages of them fit shared memory. Rows are held as parts
of columns; the left factor of a product is a tuple of those, each a tuple of planes (bf16x3: high and low).
"""

import triton
import triton.language as tl

from .launch import interpreted

# Triton 3.6 interpreted cuts bf16 off where a GPU rounds, and multiplies bf16 tensors as the integers of their bits.
INTERPRETED = tl.constexpr(interpreted())
EPS = tl.constexpr(1e-5)
BLOCK_BYTES = 65536
PART = 64
PARTS = 8


@triton.constexpr_function
def pieces(depth, width, precision):
    """Into how many chunks a product over `depth` is cut so that a [chunk, width] block of the matrix stays small."""
    limit = BLOCK_BYTES // (4 if precision in ("fp32", "tf32") else 2)
    return depth // min(depth, max(16, limit // width))


# Products --------------------------------------------------------------------------------------------------------


@triton.jit
def narrow(x):
    """x float32 rounded to the nearest bf16."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(x == x, nearest, x).to(tl.bfloat16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def planes(x, PRECISION: tl.constexpr):
    """x as what the matrix units multiply: itself, rounded to bf16, or split into two bf16."""
    if PRECISION == "bf16x3":
        high = narrow(x)
        return (high, narrow(x - high.to(tl.float32)))
    elif PRECISION == "bf16":
        return (held(x, PRECISION),)
    else:
        return (x.to(tl.float32),)


@triton.jit
def columns(x, M: tl.constexpr, N: tl.constexpr, n: tl.constexpr):
    """x [M, N] as a tuple of n parts of its columns. Moves no data: a thread holds its part of every column block."""
    if n == 1:
        return (x,)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))
        return columns(left, M, N // 2, n // 2) + columns(right, M, N // 2, n // 2)


@triton.jit
def factor(parts, M: tl.constexpr, N: tl.constexpr, width: tl.constexpr, PRECISION: tl.constexpr):
    """Parts of x [M, N] as the left factor of a product with a matrix of `width` columns."""
    n: tl.constexpr = len(parts)
    finer: tl.constexpr = max(1, pieces(N, width, PRECISION) // n)
    result = ()
    for i in tl.static_range(n):
        result = result + factor_of_part(columns(parts[i], M, N // n, finer), PRECISION)
    return result


@triton.jit
def factor_of_part(parts, PRECISION: tl.constexpr):
    n: tl.constexpr = len(parts)
    result = ()
    for i in tl.static_range(n):
        result = result + (planes(parts[i], PRECISION),)
    return result


@triton.jit
def dot(a, b, acc, input_precision: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=input_precision)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b for planes of [M, K] and [K, N]; acc float32."""
    if PRECISION == "bf16x3":
        acc = dot(a[1], b[0], acc, "ieee")
        acc = dot(a[0], b[1], acc, "ieee")
        return dot(a[0], b[0], acc, "ieee")
    elif PRECISION == "tf32":
        return dot(a[0], b[0], acc, "tf32")
    else:
        return dot(a[0], b[0], acc, "ieee")  # of bf16 this says nothing


@triton.jit
def block(
    operands,
    first,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    STRIDE: tl.constexpr,
    PLANE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Planes of a [ROWS, COLS] block whose first element is `first`."""
    at = first + tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLS)[None, :]
    if PRECISION == "bf16x3":
        return (tl.load(operands + at), tl.load(operands + PLANE + at))
    else:
        return (tl.load(operands + at),)


@triton.jit
def transposed(b):
    if len(b) == 2:
        return (tl.trans(b[0]), tl.trans(b[1]))
    else:
        return (tl.trans(b[0]),)


@triton.jit
def multiply(a, acc, operands, first, K: tl.constexpr, N: tl.constexpr, PLANE: tl.constexpr, PRECISION: tl.constexpr):
    """acc [M, N] + a [M, K] @ W, for W [K, N] at `first`; a in any number of chunks."""
    n: tl.constexpr = len(a)
    for i in tl.static_range(n):
        w = block(operands, first + i * (K // n) * N, K // n, N, N, PLANE, PRECISION)
        acc = product(a[i], w, acc, PRECISION)
    return acc


@triton.jit
def multiply_transposed(
    a, acc, operands, first, R: tl.constexpr, K: tl.constexpr, PLANE: tl.constexpr, PRECISION: tl.constexpr
):
    """acc [M, R] + a [M, K] @ W^T, for R rows of a matrix [.., K] from `first` on; a in any number of chunks."""
    n: tl.constexpr = len(a)
    for i in tl.static_range(n):
        w = block(operands, first + i * (K // n), R, K // n, K, PLANE, PRECISION)
        acc = product(a[i], transposed(w), acc, PRECISION)
    return acc


# LayerNorm and ReLU ----------------------------------------------------------------------------------------------
#
# A row is a tuple of parts of PART columns, wider ones where there are more than PARTS. A thread needs as many columns
# of a gain as it has of the row: a wide row at once would take more registers for its vectors than for itself.


@triton.constexpr_function
def parts_of(width):
    return max(1, min(width // PART, PARTS))


@triton.jit
def held(x, PRECISION: tl.constexpr):
    """x as it waits for its next use: in bf16 where products round to bf16, which is what it costs in registers.

    Normalised values are rounded here, before ReLU, in the forward and in the backward pass, so that both see the same
    side of every kink.
    """
    if PRECISION != "bf16" or x.dtype == tl.bfloat16:
        return x
    else:
        return narrow(x)


@triton.jit
def vector(flat, first, N: tl.constexpr, NP: tl.constexpr):
    """N elements of `flat` [NP], zeros behind."""
    n = tl.arange(0, NP)
    return tl.load(flat + first + n, mask=n < N, other=0.0)


@triton.jit
def part_of(flat, first, i: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """Columns of part i of a vector of N elements at `first`, zeros behind; NP is the padded width of the row."""
    W: tl.constexpr = NP // parts_of(NP)
    n = i * W + tl.arange(0, W)
    return tl.load(flat + first + n, mask=n < N, other=0.0)


@triton.jit
def normalize(z, flat, bias, M: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr):
    """z [M, NP] + bias to mean 0 and variance 1 over its first N columns, zeros behind: parts, held; and
    1 / standard deviation [M]."""
    n: tl.constexpr = parts_of(NP)
    W: tl.constexpr = NP // n
    parts = columns(z, M, NP, n)
    biased = ()
    total = tl.zeros([M], tl.float32)
    for i in tl.static_range(n):
        part = parts[i] + part_of(flat, bias, i, N, NP)[None, :]
        total += tl.sum(part, 1)
        biased = biased + (part,)
    mean = total / N
    centred = ()
    square = tl.zeros([M], tl.float32)
    for i in tl.static_range(n):
        part = biased[i] - mean[:, None]
        if N != NP:
            part = tl.where((i * W + tl.arange(0, W))[None, :] < N, part, 0.0)
        square += tl.sum(part * part, 1)
        centred = centred + (part,)
    spread = 1.0 / tl.sqrt(square / N + EPS)
    normal = ()
    for i in tl.static_range(n):
        normal = normal + (held(centred[i] * spread[:, None], PRECISION),)
    return normal, spread


@triton.jit
def relu(z):
    # Not tl.maximum, which turns NaN into 0.
    return tl.where(z < 0, 0.0, z)


@triton.jit
def activate(normal, flat, gain, offset, N: tl.constexpr, NP: tl.constexpr):
    """relu(gain * normal + offset) by parts, float32; gain and offset are places in `flat`."""
    n: tl.constexpr = len(normal)
    result = ()
    for i in tl.static_range(n):
        z = normal[i].to(tl.float32) * part_of(flat, gain, i, N, NP)[None, :]
        result = result + (relu(z + part_of(flat, offset, i, N, NP)[None, :]),)
    return result


@triton.jit
def store_part(vectors, first, values, i: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    W: tl.constexpr = NP // parts_of(NP)
    n = i * W + tl.arange(0, W)
    tl.store(vectors + first + n, values, mask=n < N)


@triton.jit
def activate_bwd(
    grad,
    normal,
    spread,
    flat,
    gain,
    offset,
    vectors,
    d_bias,
    d_gain,
    d_offset,
    M: tl.constexpr,
    N: tl.constexpr,
    NP: tl.constexpr,
):
    """Gradient of z for that of relu(gain * normalize(z + bias) + offset), by parts; the sums over rows that are the
    gradients of bias, gain and offset go to their places in `vectors`."""
    n: tl.constexpr = len(normal)
    W: tl.constexpr = NP // n
    scaled = ()
    mean = tl.zeros([M], tl.float32)
    along = tl.zeros([M], tl.float32)
    for i in tl.static_range(n):
        x = normal[i].to(tl.float32)
        factor = part_of(flat, gain, i, N, NP)
        z = x * factor[None, :] + part_of(flat, offset, i, N, NP)[None, :]
        d = tl.where(z <= 0, 0.0, grad[i])
        store_part(vectors, d_offset, tl.sum(d, 0), i, N, NP)
        store_part(vectors, d_gain, tl.sum(d * x, 0), i, N, NP)
        g = d * factor[None, :]
        mean += tl.sum(g, 1)
        along += tl.sum(g * x, 1)
        scaled = scaled + (g,)
    mean = mean / N
    along = along / N
    result = ()
    for i in tl.static_range(n):
        dz = spread[:, None] * (scaled[i] - mean[:, None] - normal[i].to(tl.float32) * along[:, None])
        if N != NP:
            dz = tl.where((i * W + tl.arange(0, W))[None, :] < N, dz, 0.0)
        store_part(vectors, d_bias, tl.sum(dz, 0), i, N, NP)
        result = result + (dz,)
    return result


# Rows ------------------------------------------------------------------------------------------------------------


@triton.jit
def locate(counts, tile, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    """Domain of a tile, its first place in the sorted order and its number of rows; none behind the last tile.

    Every domain begins a new tile, so a tile follows from the counts [D] alone and needs no map.
    """
    d = tl.arange(0, DP)
    n = tl.load(counts + d, mask=d < D, other=0)
    tiles = (n + M - 1) // M
    domain = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    earlier = d < domain
    within = tile - tl.sum(tl.where(earlier, tiles, 0), 0)
    first = tl.sum(tl.where(earlier, n, 0), 0) + within * M
    rows = tl.sum(tl.where(d == domain, n, 0), 0) - within * M
    return domain.to(tl.int64), first, tl.minimum(rows, M)


@triton.jit
def tiles_of(counts, domain, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr):
    """First tile of a domain and the one behind its last; of all rows for domain -1."""
    d = tl.arange(0, DP)
    n = tl.load(counts + d, mask=d < D, other=0)
    tiles = (n + M - 1) // M
    first = tl.sum(tl.where(d < domain, tiles, 0), 0)
    own = tl.sum(tl.where((d == domain) | (domain < 0), tiles, 0), 0)
    return first, first + own
