"""Where everything of one network lies for the Triton kernels: sizes, and offsets into the few flat buffers they share.

A `Layout` is a compile-time constant of every kernel. The buffers, for the weights of `csrc/ops.cpp` in schema order:

    flat      float32: every weight behind the other as it is; its gradient has the same form, then pair_loss [D, T]
    operands  what products read: the matrices padded to blocks, zeros in the padding, rounded to the precision;
              for bf16x3 in two planes, high and low
    tape      [rows of a chunk, tape_width] what the backward pass of a tile leaves for the weight gradients, in
              sorted order: inputs of every product and the gradients of its outputs, side by side
    vectors   [tiles, vector_width] float32: each tile's share of every gradient that is no product

Padded sizes are powers of two of at least 16, as `tl.arange` and the matrix units want them; only the input width I is
padded to a multiple of `input_block`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

PRECISIONS = ("fp32", "bf16x3", "tf32", "bf16")
FIRST_EXPERT = 17  # position of the first expert layer in the schema's weights


def padded(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


@dataclass(frozen=True)
class Matrix:
    """Stacked matrices [count, rows, cols] in `flat`, and [count, padded_rows, padded_cols] in `operands`."""

    count: int
    rows: int
    cols: int
    padded_rows: int
    padded_cols: int
    source: int
    target: int

    @property
    def padded_size(self) -> int:
        return self.count * self.padded_rows * self.padded_cols


@dataclass(frozen=True)
class Layout:
    """See the module. Symbols as everywhere: I inputs, H hidden, X widths[-1], Y tower, D, T, E, G."""

    inputs: int
    columns: int  # C, the part of the input that is not embedded
    embed: int  # N
    hidden: int
    widths: tuple[int, ...]
    tower: int
    domains: int
    tasks: int
    experts: int
    gated: int
    representation: bool
    star_linear: bool
    gate_detach: bool
    masked: bool
    precision: str

    @classmethod
    def of(
        cls,
        x: Tensor,
        embedding: Tensor | None,
        vocab: Sequence[int],
        weights: Sequence[Tensor],
        *,
        star_linear: bool,
        gate_detach: bool = True,
        masked: bool,
        precision: str,
        inputs: int | None = None,
    ) -> Layout:
        """From the tensors of an op call, or from `inputs` where there is no x."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        domains, tasks, experts = weights[10].shape
        embed = 0 if embedding is None else embedding.shape[1]
        columns = 0 if x is None else x.shape[1]
        if inputs is None:
            inputs = columns + len(vocab) * embed
        layers = range(FIRST_EXPERT, len(weights), 4)
        layout = cls(
            inputs=inputs,
            columns=columns,
            embed=embed,
            hidden=weights[8].shape[2],
            widths=tuple(weights[i].shape[2] for i in layers),
            tower=weights[15].shape[2],
            domains=domains,
            tasks=tasks,
            experts=experts,
            gated=weights[8].shape[3],
            representation=weights[0].numel() > 0,
            star_linear=star_linear,
            gate_detach=gate_detach,
            masked=masked,
            precision=precision,
        )
        layout.check(weights)
        return layout

    def check(self, weights: Sequence[Tensor]) -> None:
        """Raises ValueError where a weight's shape does not fit, or there are more than 32 bits count."""
        expected = self.shapes
        if len(weights) != len(expected):
            raise ValueError(f"expected {len(expected)} weights, got {len(weights)}")
        for i, (weight, shape) in enumerate(zip(weights, expected, strict=True)):
            if tuple(weight.shape) != shape:
                raise ValueError(f"weights[{i}] must be {list(shape)}, got {list(weight.shape)}")
        if max(self.plane, self.flat_size) >= 2**31:
            raise ValueError("backend triton counts weights with 32 bits, this network has more than 2^31")

    # Padded sizes ------------------------------------------------------------------------------------------------

    @property
    def input_block(self) -> int:
        """How much of I a forward product takes at once."""
        if not self.representation:
            return self.hidden_padded
        return min(64, padded(self.inputs)) if self.hidden_padded <= 512 else 16

    @property
    def inputs_padded(self) -> int:
        return _up(self.inputs, self.input_block)

    @property
    def hidden_padded(self) -> int:
        return padded(self.hidden)

    @property
    def widths_padded(self) -> tuple[int, ...]:
        return tuple(padded(width) for width in self.widths)

    @property
    def tower_padded(self) -> int:
        return padded(self.tower)

    @property
    def gated_padded(self) -> int:
        return padded(self.gated) if self.gated else 0

    @property
    def fields(self) -> int:
        return (self.inputs - self.columns) // self.embed if self.embed else 0

    @property
    def depth(self) -> int:
        return len(self.widths)

    @property
    def domains_padded(self) -> int:
        return padded(self.domains)

    @property
    def beside_hidden(self) -> int:
        """Widest matrix that the representation is multiplied with: decides its chunks."""
        return max(self.gated_padded, self.widths_padded[0])

    @property
    def planes(self) -> int:
        return 2 if self.precision == "bf16x3" else 1

    # flat --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of every weight, in schema order."""
        d, t, e, h, y = self.domains, self.tasks, self.experts, self.hidden, self.tower
        star = [(d, self.inputs, h), (d, h), (h,), (h,), (self.inputs, h), (h,), (h,), (h,)]
        if not self.representation:
            star = [(0,)] * 8
        pairs = [(d, t, h, self.gated), (d, t, self.gated), (d, t, e), (d, t, self.widths[-1], y)]
        pairs += [(d, t, y)] * 4 + [(d, t)]
        layers: list[tuple[int, ...]] = []
        fan_in = h
        for width in self.widths:
            layers += [(e, fan_in, width), (e, width), (e, width), (e, width)]
            fan_in = width
        return (*star, *pairs, *layers)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(_product(shape) for shape in self.shapes)

    @functools.cached_property
    def flat(self) -> tuple[int, ...]:
        """First element of every weight in `flat`."""
        return _starts(self.sizes)

    @property
    def flat_size(self) -> int:
        return sum(self.sizes)

    # operands ----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """star, skip, gate, tower, then the expert layers."""
        d, t = self.domains, self.tasks
        hidden = (self.hidden, self.hidden_padded)
        ins = [hidden, *zip(self.widths, self.widths_padded, strict=True)]
        kinds = [
            (0, d if self.representation else 0, (self.inputs, self.inputs_padded), hidden),
            (4, 1 if self.representation else 0, (self.inputs, self.inputs_padded), hidden),
            (8, d * t if self.gated else 0, hidden, (self.gated, self.gated_padded)),
            (11, d * t, ins[-1], (self.tower, self.tower_padded)),
        ]
        kinds += [(FIRST_EXPERT + 4 * i, self.experts, ins[i], ins[i + 1]) for i in range(self.depth)]
        matrices, target = [], 0
        for weight, count, (rows, padded_rows), (cols, padded_cols) in kinds:
            matrix = Matrix(count, rows, cols, padded_rows, padded_cols, self.flat[weight], target)
            target += matrix.padded_size
            matrices.append(matrix)
        return tuple(matrices)

    @functools.cached_property
    def operands(self) -> tuple[int, ...]:
        """First element of every kind of matrix in a plane of `operands`."""
        return tuple(matrix.target for matrix in self.matrices)

    @functools.cached_property
    def plane(self) -> int:
        """Elements of a plane."""
        return sum(matrix.padded_size for matrix in self.matrices)

    # tape --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _tape_widths(self) -> dict[str, int]:
        e, t = self.experts, self.tasks
        star = self.hidden_padded if self.representation else 0
        widths = {"x": self.inputs_padded if self.representation else 0, "star": star, "skip": star}
        widths |= {"r": self.hidden_padded, "score": t * self.gated_padded}
        widths |= {"u": t * self.widths_padded[-1], "tower": t * self.tower_padded}
        for i, width in enumerate(self.widths_padded):
            widths[f"z{i}"] = e * width if i + 1 < self.depth else 0  # input of the next layer
            widths[f"a{i}"] = e * width
        return widths

    @functools.cached_property
    def _tape_starts(self) -> dict[str, int]:
        return dict(zip(self._tape_widths, _starts(tuple(self._tape_widths.values())), strict=True))

    @functools.cached_property
    def tape(self) -> tuple[int, ...]:
        """First column of x, star, skip, r, score, u, tower; then for every expert layer its output and gradient."""
        return tuple(self._tape_starts.values())

    @functools.cached_property
    def tape_width(self) -> int:
        return _up(sum(self._tape_widths.values()), 64)

    @property
    def spreads(self) -> int:
        """Columns of the reciprocal standard deviations kept per row: star, skip, every expert and layer."""
        return 2 + self.experts * self.depth

    # vectors -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def vector_of(self) -> tuple[int, ...]:
        """First column in `vectors` of every weight that has one, -1 for matrices; last, of pair_loss."""
        columns, start = [], 0
        for i, length in enumerate((*self.vector_lengths, self.tasks)):
            is_matrix = i in (0, 4, 8, 11) or (i >= FIRST_EXPERT and (i - FIRST_EXPERT) % 4 == 0)
            is_matrix = is_matrix and i < len(self.sizes)
            columns.append(-1 if is_matrix else start)
            start += 0 if is_matrix else length
        return tuple(columns)

    @functools.cached_property
    def vector_lengths(self) -> tuple[int, ...]:
        """Of each weight, what one domain's rows contribute to."""
        return tuple(size // self.domains if self.is_per_domain(i) else size for i, size in enumerate(self.sizes))

    @staticmethod
    def is_per_domain(weight: int) -> bool:
        return weight in (0, 1) or 8 <= weight < FIRST_EXPERT

    @functools.cached_property
    def vector_width(self) -> int:
        lengths = [n for n, column in zip(self.vector_lengths, self.vector_of, strict=False) if column >= 0]
        return _up(sum(lengths) + self.tasks, 32)


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(sizes[:i]) for i in range(len(sizes)))
