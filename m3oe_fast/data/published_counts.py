"""How many rows, users and items a publication counts in each domain of a log, compared with what is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from m3oe_fast.errors import DataError


@dataclass(frozen=True)
class Counts:
    """What D domains hold.

    Attributes:
        rows: of each domain.
        distinct: for some columns the number of different values in each domain.
    """

    rows: tuple[int, ...]
    distinct: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, domain: np.ndarray, domains: int, columns: Mapping[str, np.ndarray]) -> Counts:
        """Those of N rows in memory.

        Args:
            domain: int [N], 0..D-1.
            domains: D.
            columns: codes int [N] of the columns for ``distinct``, -1 where a row has no value.
        """
        places = range(domains)
        known = {name: [np.unique(codes[domain == place]) for place in places] for name, codes in columns.items()}
        distinct = {name: tuple(int((codes >= 0).sum()) for codes in found) for name, found in known.items()}
        return cls(tuple(np.bincount(domain, minlength=domains).tolist()), distinct)


@dataclass(frozen=True)
class Published:
    """The counts of a publication.

    Attributes:
        source: the publication.
        counts: its counts.
        remedy: what to do about a log that has others.
        option: where the domains are chosen on the line, that option.
    """

    source: str
    counts: Counts
    remedy: str
    option: str | None = None

    def check(self, where: str, found: Counts, by_value: Mapping[str, int] | None = None) -> list[str]:
        """Compare; a warning for each column whose values differ in number, while the rows agree.

        Args:
            where: the log, for messages.
            found: what it holds.
            by_value: rows of each value that might be a domain, to suggest others.

        Raises:
            DataError: the rows differ.
        """
        if found.rows != self.counts.rows:
            by_value = by_value or {}
            listed = f" (rows by value: {listed_rows(by_value)})" if by_value else ""
            raise DataError(
                f"{where}: --protocol paper: {self.source} has {_joined(self.counts.rows)} rows in its domains, this "
                f"log {_joined(found.rows)}{listed}; {self._advice(by_value)}"
            )
        return [
            f"{name} has {_joined(found.distinct[name])} different values in the domains, {_joined(counts)} in "
            f"{self.source}, although the rows agree"
            for name, counts in self.counts.distinct.items()
            if found.distinct[name] != counts
        ]

    def _advice(self, by_value: Mapping[str, int]) -> str:
        if self.option is None:
            return self.remedy
        chosen: list[str] = []
        for rows in self.counts.rows:
            chosen += [value for value, count in by_value.items() if count == rows and value not in chosen][:1]
        if len(chosen) == len(self.counts.rows):
            return f"{self.option} {','.join(chosen)} has those counts"
        some = f"only {', '.join(chosen)} of them have" if chosen else "none of them has"
        return f"{some} such a count, so no {self.option} gives the published rows: {self.remedy}"


def listed_rows(rows: Mapping[str, int]) -> str:
    """``0: 1,234, 1: 56`` for people."""
    return ", ".join(f"{value}: {count:,}" for value, count in rows.items())


def _joined(counts: tuple[int, ...]) -> str:
    return " / ".join(f"{count:,}" for count in counts)
