"""Rows that go together: a slice of a batch is the batch of its rows."""

from __future__ import annotations

import pytest
import torch

from m3oe_fast.data.batch import Bag, Batch

BAGS = (
    Bag(torch.tensor([4, 1, 1, 2, 0, 7]), torch.tensor([0, 0, 2, 3, 3, 6])),
    Bag(torch.empty(0, dtype=torch.int64), torch.zeros(6, dtype=torch.int64)),
)


def batch(weighted: bool = True, bags: tuple[Bag, ...] = BAGS) -> Batch:
    columns = torch.arange(10.0).view(5, 2)
    weight = torch.arange(5.0) if weighted else None
    return Batch(columns.int(), columns, torch.arange(5) % 2, columns / 10, weight, bags)


def as_lists(bag: Bag) -> list[list[int]]:
    return [bag.values[bag.offsets[i] : bag.offsets[i + 1]].tolist() for i in range(len(bag.offsets) - 1)]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bags", [(), BAGS], ids=["plain", "bags"])
@pytest.mark.parametrize("part", [(0, 5), (0, 0), (1, 4), (3, 99), (4, 5), (5, 9), (9, 12), (3, 1), (-2, 5)])
def test_a_slice_holds_the_rows_of_the_slice(part, bags, weighted):
    whole = batch(weighted, bags)
    got = whole.rows(*part)
    rows = slice(*part)
    for name in Batch._fields[:4]:
        assert torch.equal(getattr(got, name), getattr(whole, name)[rows])
    assert got.row_weight is None if not weighted else torch.equal(got.row_weight, whole.row_weight[rows])
    assert len(got.bags) == len(bags)
    for mine, theirs in zip(got.bags, bags, strict=True):
        assert as_lists(mine) == as_lists(theirs)[rows]
        assert mine.offsets[0] == 0 and mine.offsets[-1] == len(mine.values)


def test_a_slice_of_a_batch_without_rows():
    empty = batch().rows(0, 0)
    assert empty.rows(0, 7).ids.shape == (0, 2) and as_lists(empty.rows(0, 7).bags[0]) == []


def test_a_slice_leaves_the_whole_alone():
    whole = batch()
    whole.rows(2, 5).bags[0].offsets.add_(1)
    assert torch.equal(whole.bags[0].offsets, torch.tensor([0, 0, 2, 3, 3, 6]))


def test_a_slice_copies_no_values():
    whole = batch()
    part = whole.rows(2, 5)
    assert part.bags[0].values.data_ptr() == whole.bags[0].values[2:].data_ptr()
    assert part.dense.data_ptr() == whole.dense[2:].data_ptr()


def test_mapping_reaches_every_tensor():
    seen = []
    mapped = batch().map(lambda tensor: seen.append(tensor) or tensor.double())
    assert len(seen) == 5 + 2 * len(BAGS)
    assert all(tensor.dtype == torch.float64 for tensor in (*mapped[:5], *(t for bag in mapped.bags for t in bag)))
    assert batch(weighted=False).map(torch.clone).row_weight is None
