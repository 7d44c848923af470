"""Parts and batches: each row once, in the order asked for; values outside the schema refused."""

import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data import dataset, store
from m3oe_fast.data.dataset import Part
from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import slice_columns
from m3oe_fast.errors import DataError

ROWS = 11
SCHEMA = Schema(("item", "domain"), (20, 3), ("age",), ("home", "live"), ("click", "like"))
FULL = replace(SCHEMA, bags=("tags",), bag_vocab_sizes=(50,), bag_pooling=("mean",), weighted=True)


def make_columns(bags=False):
    domain = (np.arange(ROWS) % 2).astype(np.uint8)
    columns = {
        "id:item": np.arange(ROWS, dtype=np.uint8),
        "id:domain": domain + np.uint8(1),
        "dense": np.linspace(0, 1, ROWS, dtype=np.float32)[:, None],
        "domain": domain,
        "label": np.where(np.arange(2 * ROWS) % 3, 1, np.nan).astype(np.float32).reshape(ROWS, 2),
    }
    if bags:  # row b has the values b, b + 1, ... of a length that comes back every 3 rows, 0 first
        lengths = np.arange(ROWS) % 3
        values = np.concatenate([np.arange(b, b + length) for b, length in enumerate(lengths)]).astype(np.uint32)
        columns["bag:tags"] = values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        columns["weight"] = np.arange(ROWS, dtype=np.float32) / 2
        columns["user"] = np.arange(ROWS, dtype=np.int64) - 1
    return columns


@pytest.fixture
def part():
    columns = make_columns()
    for column in columns.values():
        column.setflags(write=False)  # as memory-mapped columns are
    return Part(columns, SCHEMA, "p.arrow")


@pytest.fixture(params=[1, 4, ROWS, 100])
def full(request, tmp_path, monkeypatch):
    """A part with bags and weights, from a file of as many segments as it takes."""
    monkeypatch.setattr(store, "SEGMENT_ROWS", request.param)
    with store.PartWriter(tmp_path / "p") as writer:
        writer.append(make_columns(bags=True))
    file = store.PartFile(tmp_path / "p")
    return Part(file.segments, FULL, "p", file.copyto)


def lists_of(bag):
    return [bag.values[a:b].tolist() for a, b in pairwise(bag.offsets)]


def assert_rows(batch, rows):
    """``batch`` holds the rows numbered ``rows`` of ``make_columns``."""
    columns = make_columns(bags=True)
    assert batch.ids.tolist() == [[row, row % 2 + 1] for row in rows]
    assert batch.domain.tolist() == [row % 2 for row in rows]
    assert np.array_equal(batch.dense, columns["dense"][rows])
    assert np.array_equal(batch.label, columns["label"][rows], equal_nan=True)
    assert batch.row_weight.tolist() == [row / 2 for row in rows]
    assert lists_of(batch.bags[0]) == [list(range(row, row + row % 3)) for row in rows]
    kinds = [torch.int32, torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64]
    assert [tensor.dtype for tensor in (*batch[:5], *batch.bags[0])] == kinds
    assert batch.bags[0].offsets.shape == (len(rows) + 1,)


@pytest.mark.parametrize("rows", [[3, 0, 3, 10, 7], [5], [], list(range(ROWS))[::-1], [10, 9, 4, 3, 0]])
def test_take_from_any_segments(full, rows):
    assert_rows(full.take(np.array(rows, np.int64)), rows)


@pytest.mark.parametrize("batch_size", [1, 3, 4, ROWS, 100])
def test_stored_order_across_segments(full, batch_size):
    batches = list(full.batches(batch_size))
    rows = [list(range(ROWS))[start : start + batch_size] for start in range(0, ROWS, batch_size)]
    assert len(batches) == len(rows)
    for batch, wanted in zip(batches, rows, strict=True):
        assert_rows(batch, wanted)


def test_ranges_across_segments(full):
    assert_rows(full.read([(8, 11), (2, 2), (0, 5), (4, 5)]).to_batch(), [8, 9, 10, 0, 1, 2, 3, 4, 4])
    assert_rows(full.read([]).to_batch(), [])


@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (3, 9), (5, 5)])
def test_users(full, start, stop):
    users = full.users(start, stop)
    assert users.dtype == np.int64
    assert users.tolist() == [row - 1 for row in range(start, stop)]


def test_log_that_tells_of_no_users(part):
    assert part.users(0, 3) is None


def test_whole_columns(full):
    columns = make_columns()
    assert len(full) == ROWS
    assert np.array_equal(full.domain, columns["domain"])
    assert np.array_equal(full.label, columns["label"], equal_nan=True)


@pytest.mark.parametrize("rows", [[ROWS], [0, -1]])
def test_rows_that_are_not_there(tmp_path, monkeypatch, rows):
    columns = make_columns()
    part = Part([slice_columns(columns, 0, 4), slice_columns(columns, 4, ROWS)], SCHEMA, "p")
    with pytest.raises(IndexError, match="of 11"):
        part.take(np.array(rows))


def test_part_without_rows():
    part = Part(slice_columns(make_columns(bags=True), 0, 0), FULL, "p")
    assert len(part) == 0
    assert list(part.batches(4)) == []
    assert_rows(part.take(np.array([], np.int64)), [])
    assert part.users(0, 0).tolist() == []


def rows_of(batches):
    return [batch.ids[:, 0].tolist() for batch in batches]


def test_shapes_dtypes_and_values(part):
    batch = part.take(np.array([3, 0, 3]))
    assert [tensor.dtype for tensor in batch[:4]] == [
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
    for tensor in batch[:4]:
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
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_values_outside_the_schema(monkeypatch, name, value, message, chunk):
    monkeypatch.setattr(dataset, "CHECK_ROWS", chunk)
    columns = make_columns()
    columns[name][2] = value
    segments = [columns, [slice_columns(columns, 0, 1), slice_columns(columns, 1, ROWS)]]
    for each in segments:
        with pytest.raises(DataError, match=message):
            Part(each, SCHEMA, "p.arrow")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_weight_that_is_none(value):
    columns = make_columns(bags=True)
    columns["weight"][3] = value
    with pytest.raises(DataError, match=r"p, row 3, field weight: \S+ is no weight \(0 or more\)"):
        Part(columns, FULL, "p")


def test_value_of_a_bag_beyond_its_vocabulary():
    columns = make_columns(bags=True)
    columns["bag:tags"][0][2] = 50  # the second of row 2; row 3 is empty
    with pytest.raises(DataError, match="p, row 2, field tags: 50 is beyond the vocabulary of 50 ids"):
        Part(columns, FULL, "p")


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("end", [-1, 2, 1 << 30])
@pytest.mark.parametrize("row", [0, 5, ROWS])
def test_hostile_offsets(monkeypatch, chunk, end, row):
    monkeypatch.setattr(dataset, "CHECK_ROWS", chunk)
    columns = make_columns(bags=True)
    columns["bag:tags"][1][row] = end
    with pytest.raises(DataError, match=r"p, (row \d+, )?field tags: (\S+ is no length of a list|lists end beyond)"):
        Part(columns, FULL, "p")


@pytest.mark.parametrize(
    ("name", "column", "message"),
    [
        ("id:item", np.zeros(ROWS, np.int8), "field id:item: holds int8, not unsigned"),
        ("domain", np.zeros(ROWS), "field domain: holds float64, not unsigned"),
        ("label", np.zeros(ROWS, np.float32), r"field label: holds float32, not float32 \[2\]"),
        ("dense", np.zeros((ROWS, 3), np.float32), r"field dense: holds float32 \[3\], not float32 \[1\]"),
        ("weight", np.zeros(ROWS), "field weight: holds float64, not float32"),
        ("user", np.zeros(ROWS, np.int32), "field user: holds int32, not int64"),
        ("bag:tags", np.zeros(ROWS, np.uint32), "field bag:tags: holds unsigned, not lists of unsigned"),
        ("user", np.zeros(ROWS + 1, np.int64), "columns of different lengths"),
    ],
)
def test_columns_of_another_kind(name, column, message):
    with pytest.raises(DataError, match=f"p: .*{message}|p, {message}"):
        Part(make_columns(bags=True) | {name: column}, FULL, "p")


@pytest.mark.parametrize("name", sorted(make_columns(bags=True).keys() - {"user"}))
def test_missing_column(name):
    columns = make_columns(bags=True)
    del columns[name]
    with pytest.raises(DataError, match=rf"p\.arrow: lacks the columns {name}; prepare the log again"):
        Part(columns, FULL, "p.arrow")
