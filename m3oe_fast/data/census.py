"""How many rows of a streamed log each value of its domain column has, also those that become no domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np

from m3oe_fast.data.columns import natural_order
from m3oe_fast.data.published_counts import Counts, listed_rows
from m3oe_fast.data.tabular import TabularLog
from m3oe_fast.errors import DataError

MAX_LISTED = 20  # values in a line


@dataclass(frozen=True)
class Census:
    """What one pass over a log counted.

    Attributes:
        column: the domain column.
        rows: rows of each of its values, in natural order; "" stands for none.
        counts: those of the D domains.
    """

    column: str
    rows: dict[str, int]
    counts: Counts

    def note(self, domains: Sequence[str]) -> str:
        """One line: the rows of the domains, and of the values left out, the most frequent ones first."""
        left = sorted((value for value in self.rows if value not in domains), key=self.rows.get, reverse=True)
        kept = listed_rows({value: self.rows[value] for value in domains[:MAX_LISTED]})
        more = f" and {len(domains) - MAX_LISTED} more" if len(domains) > MAX_LISTED else ""
        if not left:
            return f"rows by {self.column}: {kept}{more}; none left out"
        total = sum(self.rows[value] for value in left)
        shown = listed_rows({value or "(empty)": self.rows[value] for value in left[:MAX_LISTED]})
        rest = f" and {len(left) - MAX_LISTED} more" if len(left) > MAX_LISTED else ""
        return f"rows by {self.column}: {kept}{more}; left out {total:,} ({shown}{rest})"


def take_census(log: TabularLog, distinct: Sequence[str]) -> Census:
    """Count the rows of ``log``, whose schema names its domains, in one pass.

    Args:
        log: a log of which rows of other domains are dropped.
        distinct: columns whose different values are counted in each domain. Memory holds these values.

    Raises:
        DataError: a file is damaged, or a domain has no rows.
    """
    column, domains = log.schema.domain.column, log.schema.domain.names
    rows: dict[str, int] = {}
    known: dict[str, list[set[str]]] = {name: [set() for _ in domains] for name in distinct}
    for chunk in log.all_chunks((column, *distinct)):
        codes, texts = chunk.texts(column)
        for text, count in zip([*texts, ""], np.bincount(codes % (len(texts) + 1)), strict=False):
            rows[text] = rows.get(text, 0) + int(count)
        for name in distinct:
            values, names = chunk.texts(name)
            for place, domain in enumerate(domains):
                used = np.bincount(values[np.append(np.array(texts) == domain, False)[codes]] + 1, minlength=1)[1:]
                known[name][place].update(text for text in compress(names, used.tolist()) if text)
    rows = {value: rows[value] for value in natural_order(list(rows)) if rows[value]}
    for domain in domains:
        if domain not in rows:
            raise DataError(
                f"{log.path}, field {column}: no row has {domain}, which is to be a domain; the values are "
                f"{', '.join(list(rows)[:MAX_LISTED])}"
            )
    counts = {name: tuple(map(len, values)) for name, values in known.items()}
    return Census(column, rows, Counts(tuple(rows[domain] for domain in domains), counts))
