"""Joining a log with a table by key."""

import numpy as np
import pytest

from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.delimited import Table
from m3oe_fast.data.join import join_rows
from m3oe_fast.errors import DataError


def table(where, *keys):
    return Table(where, {"user_id": Tokens.merged(np.arange(len(keys)), list(keys))}, {}, 2)


def test_rows_of_the_other_table():
    found = join_rows(table("a.inter", "7", "9", "7", ""), table("a.user", "9", "7"), "user_id")
    assert found.tolist() == [1, 0, 1, -1]


def test_key_that_is_not_unique():
    with pytest.raises(DataError, match=r"a\.user, row 4, field user_id: occurs a second time"):
        join_rows(table("a.inter", "7"), table("a.user", "7", "9", "7"), "user_id")


def test_key_that_is_not_there():
    with pytest.raises(DataError, match=r"a\.inter: has no id column item_id to join by"):
        join_rows(table("a.inter", "7"), table("a.user", "7"), "item_id")
