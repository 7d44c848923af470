"""Delimited text: values, missing values, and errors that name row and field."""

import numpy as np
import pyarrow as pa
import pytest

from m3oe_fast.data.delimited import NUMBER, TOKEN, Layout, read_delimited, require_finite
from m3oe_fast.errors import DataError

LAYOUT = Layout(("id", "skipped", "value"), header_rows=1)
TYPES = {"id": TOKEN, "value": NUMBER}


def read(text, layout=LAYOUT, types=TYPES):
    data = text if isinstance(text, bytes) else text.encode()
    return read_delimited(pa.py_buffer(data), "f.tsv", layout, types)


def test_values_and_missing_values():
    table = read('header\na"b\t-\t1.5\n\t-\t\nc\t-\t2\n')
    column = table.tokens["id"]
    assert [None if c < 0 else column.values[c] for c in column.codes] == ['a"b', None, "c"]
    assert np.array_equal(table.numbers["value"], [1.5, np.nan, 2], equal_nan=True)
    assert table.at(2, "value") == "f.tsv, row 4, field value"


def test_windows_line_ends_and_no_last_line_end():
    table = read("h\r\na\t-\t1\r\nb\t-\t2")
    assert table.tokens["id"].values == ("a", "b")
    assert table.numbers["value"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"f\.tsv: holds no rows"),
        ("header", r"f\.tsv: holds no rows"),
        ("header\n", r"f\.tsv: holds no rows"),
        ("h\na\t-\t1\nb\t-\n", r"f\.tsv, row 3: 2 columns where 3 are expected \(wrong sep"),
        ("h\na,-,1\n", r"f\.tsv, row 2: 1 columns where 3"),
        ("h\na\t-\t1\nb\t-\tx\n", r"f\.tsv, row 3, field value: 'x' is not a number"),
        (b"h\n\xe9\t-\t1\n", r"f\.tsv, row 2: not utf8 text"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(DataError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_latin_1():
    layout = Layout(("id",), encoding="latin-1")
    assert read("é\n".encode("latin-1"), layout, {"id": TOKEN}).tokens["id"].values == ("é",)


@pytest.mark.parametrize("wrong", ["", "nan", "inf"])
def test_require_finite_names_the_first_row(wrong):
    table = read(f"h\na\t-\t1\nb\t-\t{wrong}\nc\t-\t{wrong}\n")
    with pytest.raises(DataError, match=r"f\.tsv, row 3, field value: no finite.*2 such rows.*mend"):
        require_finite(table, "value", table.numbers["value"], "mend it")
    require_finite(table, "value", np.zeros(3), "mend it")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_empty_lines_count_as_lines(end):
    good = end.join(["h", "", "a\t-\t1", "", "", "b\t-\t2"])
    assert [read(good).line(row) for row in (0, 1)] == [3, 6]
    with pytest.raises(DataError, match=r"f\.tsv, row 7: 2 columns"):
        read(end.join([good, "c\t-", "d\t-\t3"]))
    with pytest.raises(DataError, match=r"f\.tsv, row 8, field value: 'x' is not a number"):
        read(end.join([good, "", "c\t-\tx", ""]))
    with pytest.raises(DataError, match=r"f\.tsv, row 8, field value: no finite"):
        table = read(end.join([good, "", "c\t-\tnan"]))
        require_finite(table, "value", table.numbers["value"], "mend it")
