"""Parts and batches: each row once, in the order asked for; values outside the schema refused."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data.dataset import Part
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import DataError

ROWS = 11
SCHEMA = Schema(("item", "domain"), (20, 3), ("age",), ("home", "live"), ("click", "like"))


def make_columns():
    domain = (np.arange(ROWS) % 2).astype(np.uint8)
    return {
        "id:item": np.arange(ROWS, dtype=np.uint8),
        "id:domain": domain + np.uint8(1),
        "dense": np.linspace(0, 1, ROWS, dtype=np.float32)[:, None],
        "domain": domain,
        "label": np.where(np.arange(2 * ROWS) % 3, 1, np.nan).astype(np.float32).reshape(ROWS, 2),
    }


@pytest.fixture
def part():
    columns = make_columns()
    for column in columns.values():
        column.setflags(write=False)  # as memory-mapped columns are
    return Part(columns, SCHEMA, "p.arrow")


def rows_of(batches):
    return [batch.ids[:, 0].tolist() for batch in batches]


def test_shapes_dtypes_and_values(part):
    batch = part.take(np.array([3, 0, 3]))
    assert [tensor.dtype for tensor in batch] == [
        torch.int32,
        torch.float32,
        torch.int64,
        torch.float32,
    ]
    assert batch.ids.tolist() == [[3, 2], [0, 1], [3, 2]]
    assert batch.domain.tolist() == [1, 0, 1]
    columns = make_columns()
    assert np.array_equal(batch.dense, columns["dense"][[3, 0, 3]])
    assert np.array_equal(batch.label, columns["label"][[3, 0, 3]], equal_nan=True)


def test_batches_in_stored_order_and_the_short_last_one(part):
    assert rows_of(part.batches(4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert rows_of(part.batches(100)) == [list(range(ROWS))]


def test_batches_in_a_given_order(part):
    assert rows_of(part.batches(2, np.array([9, 1, 5]))) == [[9, 1], [5]]
    assert rows_of(part.batches(2, np.array([], np.int64))) == []


def test_batches_own_writable_memory(part):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of read-only arrays
        batch = next(part.batches(4))
    for tensor in batch:
        tensor.fill_(0)
    assert rows_of(part.batches(4))[0] == [0, 1, 2, 3]


def test_batch_size_0(part):
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        next(part.batches(0))


@given(st.integers(0, 9), st.integers(0, 9))
def test_permutation_depends_on_seed_and_epoch_alone(seed, epoch):
    part = Part(make_columns(), SCHEMA, "p.arrow")
    order = part.permutation(seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(ROWS))
    assert np.array_equal(order, part.permutation(seed, epoch))


def test_epochs_and_seeds_differ(part):
    orders = {tuple(part.permutation(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_no_dense_features():
    schema = Schema(("item", "domain"), (20, 3), (), ("home", "live"), ("click", "like"))
    columns = make_columns()
    del columns["dense"]
    assert Part(columns, schema, "p").take(np.array([1])).dense.shape == (1, 0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("id:item", 20, r"p\.arrow, row 2, field item: 20 is beyond the vocabulary of 20 ids"),
        ("domain", 2, r"p\.arrow, row 2, field domain: 2 is out of range, 2 domains"),
        ("dense", np.nan, r"p\.arrow, row 2, field age: nan is not finite"),
        ("label", 2, r"p\.arrow, row 2, field click: 2\.0 is neither 0 nor 1 nor missing"),
    ],
)
def test_values_outside_the_schema(name, value, message):
    columns = make_columns()
    columns[name][2] = value
    with pytest.raises(DataError, match=message):
        Part(columns, SCHEMA, "p.arrow")


def test_missing_column():
    columns = make_columns()
    del columns["id:item"]
    with pytest.raises(DataError, match=r"p\.arrow: lacks the columns id:item"):
        Part(columns, SCHEMA, "p.arrow")
