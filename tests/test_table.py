"""Rows in columns: taking and joining give rows of their own memory, whatever offsets a bag's views have."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data.table import Table, joined, stacked, take_bag

LISTS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=8)


def bag_of(lists, first=0):
    """Values and offsets of ``lists``, with ``first`` values before them that belong to no row."""
    values = np.array([99] * first + [value for row in lists for value in row], np.uint32)
    return values, (first + np.cumsum([0, *map(len, lists)])).astype(np.int32)


def lists_of(values, offsets):
    return [values[start:stop].tolist() for start, stop in pairwise(offsets)]


def table_of(lists, first=0):
    number = np.arange(len(lists))
    label = np.stack([number, -number], axis=1).astype(np.float32)
    return Table(
        (number.astype(np.uint8),),
        number.astype(np.float32)[:, None],
        number.astype(np.uint8),
        label,
        number.astype(np.float32),
        (bag_of(lists, first),),
    )


@given(LISTS, st.integers(0, 3), st.data())
def test_lists_at_any_rows(lists, first, data):
    rows = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1))), np.int64)
    values, offsets = take_bag(*bag_of(lists, first), rows)
    assert lists_of(values, offsets) == [lists[row] for row in rows]
    assert (offsets[0], offsets[-1], values.dtype) == (0, len(values), np.uint32)


@given(st.lists(LISTS, min_size=1, max_size=4), st.integers(0, 3))
def test_joined_pieces(pieces, first):
    whole = joined([table_of(lists, first) for lists in pieces])
    assert lists_of(*whole.bags[0]) == [row for lists in pieces for row in lists]
    numbers = [number for lists in pieces for number in range(len(lists))]
    assert whole.ids[0].tolist() == whole.domain.tolist() == whole.weight.tolist() == numbers
    assert whole.label.tolist() == [[number, -number] for number in numbers]
    assert whole.bags[0][1][0] == 0


@given(LISTS, st.data())
def test_rows_are_views_that_can_be_joined_and_taken_from(lists, data):
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    table = table_of(lists, first=2)
    part = table.rows(start, stop)
    assert len(part) == stop - start
    assert part.ids[0].base is table.ids[0] or part.ids[0].base is table.ids[0].base
    order = np.arange(stop - start)[::-1]
    assert lists_of(*joined([part]).bags[0]) == lists[start:stop]
    assert lists_of(*part.take(order).bags[0]) == lists[start:stop][::-1]


@pytest.mark.parametrize("own", [lambda table: table.take(np.arange(3)), lambda table: joined([table])])
def test_a_batch_can_be_written_to(own):
    table = table_of([[1], [], [2, 3]])
    for column in (*table.ids, table.dense, table.domain, table.label, table.weight, *table.bags[0]):
        column.setflags(write=False)
    batch = own(table).to_batch()
    batch.map(lambda tensor: tensor.fill_(7))
    assert table.weight.tolist() == [0, 1, 2]
    assert lists_of(*table.bags[0]) == [[1], [], [2, 3]]


def test_stacked_uses_the_copy_it_is_given():
    seen = []

    def copy(out, view):
        seen.append(view.tolist())
        out[...] = view + 1

    assert stacked([np.arange(2), np.arange(3)], copy).tolist() == [1, 2, 1, 2, 3]
    assert seen == [[0, 1], [0, 1, 2]]
