"""Multi-hot fields: the embeddings of a row's ids, pooled to one. Eager PyTorch, any dtype, gradients of the table.

The kernels know nothing of bags: pooled columns stand between the embeddings of the id fields and the dense columns
of x, and their gradient is the kernels' gradient of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from m3oe_fast import kernels


class Bags(NamedTuple):
    """The multi-hot part of the input: one table for all bags.

    Attributes:
        fields: for each bag (values [n], offsets [B+1]), both int32 or int64: row b holds
            values[offsets[b] : offsets[b + 1]], possibly nothing and an id more than once. Offsets go from 0 to n and
            never decrease.
        embedding: [W, N] float32 or float64, W = sum(vocab): the rows of bag after bag.
        vocab: rows of each bag; every value is in [0, vocab[i]).
        pooling: "mean" or "sum" for each bag. A row without values pools to zeros by both.
        sparse_grad: the gradient of `embedding` is a sparse tensor with one row per value, not coalesced. Not under
            torch.compile.
    """

    fields: Sequence[tuple[Tensor, Tensor]]
    embedding: Tensor
    vocab: tuple[int, ...]
    pooling: tuple[str, ...]
    sparse_grad: bool = False


def pool(bags: Bags, rows: int) -> Tensor:
    """The pooled embeddings [B, bags * N] of B = `rows` rows, bag after bag.

    On a CPU the same inputs give the same bits, whatever the number of threads, and every value is checked. A GPU
    cannot stop to raise: it takes the nearest id and `m3oe_fast.kernels.check_inputs` raises; offsets are trusted.

    Raises:
        ValueError: a shape or device does not fit; on a CPU also where offsets do not divide the values or an id is
            beyond its bag, the message names bag and row. In a graph of torch.compile these two are a RuntimeError that
            names the bag.
        TypeError: values or offsets are neither int32 nor int64.
    """
    if bags.embedding.ndim != 2 or bags.embedding.shape[0] != sum(bags.vocab):
        raise ValueError(
            f"bag_embedding must be [W, N] with W = sum(vocab) = {sum(bags.vocab)}, got {list(bags.embedding.shape)}"
        )
    if not len(bags.fields) == len(bags.vocab) == len(bags.pooling):
        raise ValueError(f"bags must hold {len(bags.vocab)} pairs (values, offsets), got {len(bags.fields)}")
    fields = [_checked(bags, place, rows) for place in range(len(bags.fields))]
    values, offsets = _joined(fields, bags.vocab)
    # One sum for all bags, so that there is one gradient of the table; a mean is a sum over a count.
    pooled = F.embedding_bag(
        values, bags.embedding, offsets, mode="sum", include_last_offset=True, sparse=bags.sparse_grad
    ).view(len(fields), rows, bags.embedding.shape[1])
    if "mean" in bags.pooling:
        pooled = pooled / _divisors(fields, bags.pooling).to(pooled.dtype)
    return pooled.transpose(0, 1).flatten(1)


def _checked(bags: Bags, place: int, rows: int) -> tuple[Tensor, Tensor]:
    """values and offsets of one bag in int64, no value beyond its table."""
    values, offsets = bags.fields[place]
    for name, tensor in (("values", values), ("offsets", offsets)):
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"bags[{place}].{name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != bags.embedding.device:
            raise ValueError(f"bags[{place}].{name} must be on {bags.embedding.device}, it is on {tensor.device}")
    if values.ndim != 1:
        raise ValueError(f"bags[{place}].values must be [n], got {list(values.shape)}")
    if offsets.shape != (rows + 1,):
        raise ValueError(f"bags[{place}].offsets must be [B + 1] = [{rows + 1}], got {list(offsets.shape)}")
    values, offsets, vocab = values.long(), offsets.long(), bags.vocab[place]
    if values.device.type != "cpu":
        return clamped(values, vocab, place), offsets
    if torch.compiler.is_compiling():
        # A graph cannot branch on values, but it can stop: an id past its bag is a row of the next one.
        torch._assert_async(((values >= 0) & (values < vocab)).all(), f"an id of bags[{place}] is not in [0, {vocab})")
        torch._assert_async(_are_offsets(offsets, values.shape[0]), f"bags[{place}].offsets do not divide its values")
        return values, offsets
    _check_offsets(offsets, values.shape[0], place)
    if values.shape[0]:
        least, greatest = torch.aminmax(values)
        if least.item() < 0 or greatest.item() >= vocab:
            _refuse_value(values, offsets, vocab, place)
    return values, offsets


def clamped(values: Tensor, vocab: int, place: int) -> Tensor:
    """values with the nearest id of [0, vocab) for those beyond it; remembers one of them for `check_inputs`."""
    near = values.clamp(0, vocab - 1)
    if not torch.compiler.is_compiling():  # a graph would keep a flag of its own
        kernels.flags.remember_bag(near != values, place)
    return near


def _are_offsets(offsets: Tensor, count: int) -> Tensor:
    return (offsets[0] == 0) & (offsets[-1] == count) & (offsets.diff() >= 0).all()


def _check_offsets(offsets: Tensor, count: int, place: int) -> None:
    """`_are_offsets` that tells what is wrong, by fewer operations: a prediction of one row would notice them."""
    name, first, last = f"bags[{place}].offsets", offsets[0].item(), offsets[-1].item()
    if first != 0:
        raise ValueError(f"{name} must start at 0, got {first}")
    lengths = offsets.diff()
    if lengths.shape[0] and lengths.min().item() < 0:
        row = (lengths < 0).nonzero()[0].item()
        raise ValueError(f"{name} decreases in row {row}, from {offsets[row].item()} to {offsets[row + 1].item()}")
    if last != count:
        raise ValueError(f"{name} must end at {count}, the number of values, got {last}")


def _refuse_value(values: Tensor, offsets: Tensor, vocab: int, place: int) -> None:
    position = ((values < 0) | (values >= vocab)).nonzero()[0]
    row = torch.searchsorted(offsets, position, right=True).item() - 1
    raise ValueError(f"bags[{place}], row {row} holds {values[position].item()}, bag {place} has {vocab} rows")


def _joined(fields: Sequence[tuple[Tensor, Tensor]], vocab: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The bags behind each other as one of bags * B rows, with ids that count through the common table."""
    if len(fields) == 1:
        return fields[0]
    ids, ends, rows, count = [], [fields[0][1][:1]], 0, 0
    for (values, offsets), size in zip(fields, vocab, strict=True):
        ids.append(values + rows)
        ends.append(offsets[1:] + count)
        rows += size
        count += values.shape[0]
    return torch.cat(ids), torch.cat(ends)


def _divisors(fields: Sequence[tuple[Tensor, Tensor]], pooling: Sequence[str]) -> Tensor:
    """int64 [bags, B, 1]: the values of a row where the bag takes the mean, at least 1; else 1."""
    counts = [
        offsets.diff().clamp(min=1) if how == "mean" else offsets.new_ones(offsets.shape[0] - 1)
        for (_, offsets), how in zip(fields, pooling, strict=True)
    ]
    return torch.stack(counts)[:, :, None]
