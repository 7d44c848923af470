"""Raw id columns: merging, joining, numbers, order."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data.columns import Tokens, canonical, first_token, natural_order


def texts(column):
    return [None if code < 0 else column.values[code] for code in column.codes]


def tokens(*rows):
    """A column with one text per row; None = missing."""
    return Tokens.merged(np.arange(len(rows), dtype=np.int32), [row or "" for row in rows])


def test_merged_joins_equal_texts_and_takes_empty_as_missing():
    column = Tokens.merged(np.array([0, 1, 2, 3, -1]), ["a", "b", "a", ""])
    assert texts(column) == ["a", "b", "a", None, None]
    assert column.values == ("a", "b")
    assert column.codes.dtype == np.int32


@given(st.lists(st.lists(st.sampled_from(["", "x", "y", "10"]), max_size=5), min_size=1))
def test_from_arrow_keeps_every_row_over_chunks_of_their_own_dictionaries(chunks):
    kind = pa.dictionary(pa.int32(), pa.string())
    arrays = [pa.array(chunk, pa.string()).dictionary_encode().cast(kind) for chunk in chunks]
    column = Tokens.from_arrow(pa.chunked_array(arrays, type=kind))
    assert texts(column) == [text or None for chunk in chunks for text in chunk]


def test_renamed_merges_what_became_equal():
    column = tokens("Toy Story", "Toys", "Toy Soldiers")
    first = column.renamed([value.split()[0] for value in column.values])
    assert texts(first) == ["Toy", "Toys", "Toy"]


def test_positions_of_finds_each_key_and_no_missing_one():
    key = tokens("7", None, "9")
    assert key.positions_of(tokens("9", "8", None, "7")).tolist() == [2, -1, -1, 0]


def test_gather_gives_missing_for_minus_one():
    assert texts(tokens("a", "b").gather(np.array([1, -1, 0]))) == ["b", None, "a"]


def test_first_repeat_names_the_later_row():
    assert tokens("a", "b", "c", "b", "a").first_repeat() == 3
    assert tokens("a", "b").first_repeat() is None


def test_numbers_are_nan_where_there_is_none():
    assert np.array_equal(tokens("5", None, "x", "-1.5").numbers(), [5, np.nan, np.nan, -1.5], equal_nan=True)


def test_natural_order_counts_whole_numbers():
    assert natural_order(["b", "10", "9", "a", "²"]) == ["9", "10", "a", "b", "²"]


def test_natural_order_of_numbers_beyond_int():
    long = "9" * 5000
    assert natural_order([long, "x", "10", "007", "0"]) == ["0", "007", "10", long, "x"]


@pytest.mark.parametrize(
    ("text", "wanted"), [("5.0", "5"), ("-5.00", "-5"), ("5.", "5."), ("5.01", "5.01"), ("v5.0", "v5.0")]
)
def test_canonical(text, wanted):
    assert canonical(text) == wanted


@pytest.mark.parametrize("text", ["War", "War Drama", " War|Drama", "War|Drama Comedy", "|War"])
def test_first_token(text):
    assert first_token(text, "| ") == "War"
