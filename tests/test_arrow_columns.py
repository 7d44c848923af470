"""Arrow columns of every type become texts, numbers, times and bags."""

import datetime
import decimal
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from m3oe_fast.data.arrow_columns import BadValue, bag_of, numbers_of, texts_of, times_of
from m3oe_fast.data.columns import id_text

NAN = float("nan")


def texts(column):
    codes, found = texts_of(column)
    assert codes.dtype == np.int32
    return [found[code] if code >= 0 else "" for code in codes]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([5, None, -3], pa.int8()),
        pa.array([2**63, 1], pa.uint64()),
        pa.array([5.0, 0.5, NAN, None, 1e20, 1e-7, -0.0]),
        pa.array([5.0, 0.5], pa.float32()),
        pa.array([True, False, None]),
        pa.array(["5", "5.0", "-7.00", "05", "5.5", "", None, "a.0", "été", "5.0\n"]),
        pa.array(["x", None, "x"]).dictionary_encode(),
        pa.array([7, None, 7]).dictionary_encode(),
        pa.array(["a", "b"], pa.large_string()),
        pa.array(["a", None], pa.string_view()),
        pa.array([decimal.Decimal("5.00"), decimal.Decimal("0.50")]),
        pa.array([datetime.date(2024, 1, 2)]),
        pa.nulls(2),
        pa.array([], pa.string()),
    ],
    ids=str,
)
def test_texts_are_those_of_a_frame(values):
    frame = values.to_pylist()  # what a frame of objects would hold
    assert texts(values) == ["" if pd.isna(value) else id_text(value) for value in frame]
    assert texts(pa.concat_arrays([values, values]).slice(len(values))) == texts(values)


@pytest.mark.parametrize(
    ("column", "wanted"),
    [
        (pa.array([1, None]), [1, NAN]),
        (pa.array([True, False, None]), [1, 0, NAN]),
        (pa.array(["1", " 2.5e3 ", "", None]), [1, 2500, NAN, NAN]),
        (pa.array(["1", None]).dictionary_encode(), [1, NAN]),
        (pa.array([decimal.Decimal("1.50")]), [1.5]),
        (pa.array([2**63 + 1], pa.uint64()), [2.0**63]),
        (pa.nulls(1), [NAN]),
        (pa.array([1.5, NAN, float("inf")], pa.float32()), [1.5, NAN, float("inf")]),
    ],
    ids=str,
)
def test_numbers(column, wanted):
    found = numbers_of(column)
    assert found.dtype == np.float64
    assert np.array_equal(found, wanted, equal_nan=True)


def test_a_text_that_is_no_number_is_named_with_its_row():
    with pytest.raises(BadValue, match="'x' is not a number; mend it") as caught:
        numbers_of(pa.array(["1", "2", "x", "y"]))
    assert caught.value.row == 2


@pytest.mark.parametrize(
    "column",
    [
        pa.array([-(2**63), -5, 0, 2**63 - 1]),
        pa.array([-2.5, -1.0, 0.0, 1e-300, float("inf")]),
        pa.array([0, 2**63, 2**64 - 1], pa.uint64()),
        pa.array(["-1", "1.5", "20"]),
        pa.array(["2023-12-31", "2024-01-01T00:00:00", "2024-01-01 00:00:00.5", "2024-01-01T02:00:00+01:00"]),
        pa.array([datetime.date(1960, 1, 1), datetime.date(2024, 1, 1)]),
        pa.array([datetime.datetime(1960, 1, 1), datetime.datetime(2024, 1, 1)], pa.timestamp("ns")),
    ],
    ids=str,
)
def test_times_sort_as_they_do(column):
    keys = times_of(column)
    assert keys.dtype == np.int64
    assert (np.diff(keys.astype(object)) > 0).all()


def test_equal_times_are_equal():
    assert len(set(times_of(pa.array([0.0, -0.0])))) == 1
    assert len(set(times_of(pa.array(["2024-01-01", "2024-01-01T00:00:00Z"])))) == 1


@pytest.mark.parametrize("column", [pa.array([1, None]), pa.array([1.0, NAN]), pa.array(["2024-01-01", ""])], ids=str)
def test_a_missing_time_is_refused(column):
    with pytest.raises(BadValue, match="is empty, and split temporal needs it") as caught:
        times_of(column)
    assert caught.value.row == 1


def test_a_text_that_is_no_time_is_refused():
    with pytest.raises(BadValue, match="'soon' is neither a number nor an ISO 8601 time"):
        times_of(pa.array(["2024-01-01", "soon"]))


def rows_of(column, separator=None):
    (codes, found), offsets = bag_of(column, separator)
    values = [found[code] for code in codes]
    return [values[start:stop] for start, stop in pairwise(offsets)]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.dictionary(pa.int8(), pa.string()))],
    ids=str,
)
def test_bags_of_lists(kind):
    column = pa.array([["a", None, "5.0"], None, [], ["", "a"]], kind)
    assert rows_of(column) == [["a", "5"], [], [], ["a"]]
    assert rows_of(column.slice(1)) == [[], [], ["a"]]
    assert rows_of(column.slice(0, 0)) == []


def test_bags_of_numbers_and_of_fixed_size():
    assert rows_of(pa.array([[1.0, 2.5], [3.0]])) == [["1", "2.5"], ["3"]]
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    assert rows_of(fixed) == [["1", "2"], [], ["3", "4"]]
    assert rows_of(fixed.slice(1)) == [[], ["3", "4"]]


def test_bags_of_texts():
    assert rows_of(pa.array(["a|b", None, "", "c||a", "b"]), "|") == [["a", "b"], [], [], ["c", "a"], ["b"]]
    assert rows_of(pa.array(["a, b"]).dictionary_encode(), ", ") == [["a", "b"]]
    assert rows_of(pa.nulls(2), "|") == [[], []]
