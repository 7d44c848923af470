"""Joins of a log with a table of its users or items."""

from __future__ import annotations

import numpy as np

from m3oe_fast.data.delimited import Table
from m3oe_fast.errors import DataError


def join_rows(log: Table, side: Table, key: str) -> np.ndarray:
    """For each row of ``log`` the row of ``side`` with the same key, or -1; int32 [N].

    Raises:
        DataError: the key is no id column of both, or not unique in ``side``.
    """
    for table in (log, side):
        if key not in table.tokens:
            raise DataError(f"{table.where}: has no id column {key} to join by; add it")
    repeat = side.tokens[key].first_repeat()
    if repeat is not None:
        raise DataError(f"{side.at(repeat, key)}: occurs a second time; keep one row for each {key}")
    return side.tokens[key].positions_of(log.tokens[key])
