"""A log as its reader leaves it: N rows of raw columns in file order, with domains and labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.published_counts import Published


@dataclass(frozen=True)
class RawLog:
    """N rows.

    Attributes:
        where: the file the rows stand in, for messages.
        fields: the id fields, without the domain.
        dense: float64 [N] features, finite, not scaled.
        domain: int32 [N], 0..D-1.
        domain_rule: how ``domain`` follows from a raw row.
        label: float32 [N,T] of 0, 1, NaN (not observed).
        label_rules: T rules, how ``label`` follows from a raw row.
        user: the column that the user split and the user counts go by, if any.
        time: float64 [N] for the temporal split, if any.
        probability: float64 [N,T], the true P(label = 1), for generated logs.
        warnings: one line each, for the summary.
        separators: for a column of which only the first token is kept, the characters that end it.
        aliases: for a column that raw rows may call otherwise, its other names.
    """

    where: str
    fields: dict[str, Tokens]
    dense: dict[str, np.ndarray]
    domain: np.ndarray
    domain_rule: DomainRule
    label: np.ndarray
    label_rules: tuple[LabelRule, ...]
    user: Tokens | None = None
    time: np.ndarray | None = None
    probability: np.ndarray | None = None
    warnings: tuple[str, ...] = field(default=())
    separators: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.domain)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The T task names."""
        return tuple(rule.task for rule in self.label_rules)


@dataclass(frozen=True)
class Source:
    """A log that has been found but not read.

    Attributes:
        name: what the user calls it; also part of file names.
        identity: everything the rows depend on, plain JSON types: content hash, columns, rules.
        read: reads it all.
        published: what a publication counts in its domains, if we know one.
    """

    name: str
    identity: dict[str, object]
    read: Callable[[], RawLog]
    published: Published | None = None
