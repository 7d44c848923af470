"""Raw columns -> model inputs: vocabularies, scalers, domain rule and label rules of one log.

Everything is learned from the training rows only. An id field is a text -> integer table; 0 stands
for unknown or missing. Values of a pandas frame compare by their text (5, 5.0 and "5" are the same
id), so a frame may come from any reader. Dense features are min-max scaled; beyond the training
range they are clipped to [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.columns import Tokens, natural_order
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.schema import DOMAIN_FIELD, Schema
from m3oe_fast.errors import DataError


@dataclass(frozen=True)
class Encoder:
    """Encodes raw rows exactly as the training rows were encoded.

    Attributes:
        schema: what comes out.
        vocabularies: for each id field its known texts; text i has id i + 1.
        scalers: for each dense feature its least and greatest training value.
        domain_rule: domain of a row.
        label_rules: labels of a row, T rules.
    """

    schema: Schema
    vocabularies: dict[str, tuple[str, ...]]
    scalers: dict[str, tuple[float, float]]
    domain_rule: DomainRule
    label_rules: tuple[LabelRule, ...]

    @classmethod
    def fit(cls, log: RawLog, train: np.ndarray) -> Encoder:
        """Learn vocabularies and scalers from the rows ``train`` (int [n], n > 0)."""
        vocabularies = {name: _known(column, train) for name, column in fields_of(log).items()}
        scalers = {name: (float(column[train].min()), float(column[train].max())) for name, column in log.dense.items()}
        schema = Schema(
            fields=tuple(vocabularies),
            vocab_sizes=tuple(len(texts) + 1 for texts in vocabularies.values()),
            dense=tuple(scalers),
            domains=log.domain_rule.names,
            tasks=log.tasks,
        )
        return cls(schema, vocabularies, scalers, log.domain_rule, log.label_rules)

    def encode(self, field: str, column: Tokens) -> np.ndarray:
        """The ids of an id field, int32 [N]."""
        known = self._ids[field]
        table = np.array([*(known.get(text, 0) for text in column.values), 0], np.int32)
        return table[column.codes]

    def scale(self, feature: str, values: np.ndarray) -> np.ndarray:
        """A dense feature (float64 [N], finite) as float32 [N] in [0, 1]; all 0 if constant."""
        low, high = self.scalers[feature]
        if low == high:
            return np.zeros(len(values), np.float32)
        return np.clip((values - low) / (high - low), 0.0, 1.0).astype(np.float32)

    def transform(self, frame: pd.DataFrame) -> Batch:
        """Encode raw rows.

        Args:
            frame: a column for each id field but "domain", each dense feature and the domain column; other columns are
                ignored. A label is NaN where the column of its rule is absent or empty.

        Raises:
            DataError: a column is missing, a dense value or domain is missing or outside its range, a label is
                neither 0 nor 1. Rows are counted from 1.
        """
        domain = self._domain(frame)
        columns = {name: _texts(frame, name) for name in self.schema.fields[:-1]}
        columns[DOMAIN_FIELD] = Tokens(domain, self.schema.domains)
        rows = len(frame)
        ids = np.empty((rows, len(columns)), np.int32)
        for place, (name, column) in enumerate(columns.items()):
            ids[:, place] = self.encode(name, column)
        dense = np.empty((rows, len(self.scalers)), np.float32)
        for place, name in enumerate(self.scalers):
            dense[:, place] = self.scale(name, _finite(frame, name))
        label = np.full((rows, len(self.label_rules)), np.nan, np.float32)
        for place, rule in enumerate(self.label_rules):
            if rule.column in frame:
                label[:, place] = rule.apply(_numbers(frame, rule.column), "frame", 1)
        return Batch.from_numpy(ids, dense, domain.astype(np.int64), label)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "schema": self.schema.to_dict(),
            "vocabularies": {name: list(texts) for name, texts in self.vocabularies.items()},
            "scalers": {name: list(ends) for name, ends in self.scalers.items()},
            "domain_rule": self.domain_rule.to_dict(),
            "label_rules": [rule.to_dict() for rule in self.label_rules],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Encoder:
        """The inverse of ``to_dict``."""
        return cls(
            Schema.from_dict(values["schema"]),
            {name: tuple(texts) for name, texts in values["vocabularies"].items()},
            {name: (low, high) for name, (low, high) in values["scalers"].items()},
            DomainRule.from_dict(values["domain_rule"]),
            tuple(LabelRule(**rule) for rule in values["label_rules"]),
        )

    @cached_property
    def _ids(self) -> dict[str, dict[str, int]]:
        return {
            name: {text: place for place, text in enumerate(texts, start=1)}
            for name, texts in self.vocabularies.items()
        }

    def _domain(self, frame: pd.DataFrame) -> np.ndarray:
        rule = self.domain_rule
        if rule.column is None:
            return np.zeros(len(frame), np.int32)
        if rule.edges:
            domain = rule.of_numbers(_numbers(frame, rule.column))
        else:
            column = _texts(frame, rule.column)
            domain = np.append(rule.of_texts(column.values), np.int32(-1))[column.codes]
        wrong = np.flatnonzero(domain < 0)
        if len(wrong):
            value = frame[rule.column].iloc[wrong[0]]
            raise DataError(
                f"frame, row {wrong[0] + 1}, field {rule.column}: {value!r} is in no domain "
                f"({', '.join(rule.names)}); mend or drop the row"
            )
        return domain


def fields_of(log: RawLog) -> dict[str, Tokens]:
    """The id fields of ``log`` and, last, the domain."""
    return {**log.fields, DOMAIN_FIELD: Tokens(log.domain, log.domain_rule.names)}


def _known(column: Tokens, train: np.ndarray) -> tuple[str, ...]:
    seen = np.bincount(column.codes[train] + 1, minlength=len(column.values) + 1)[1:]
    return tuple(natural_order([column.values[code] for code in np.flatnonzero(seen)]))


def _column(frame: pd.DataFrame, name: str) -> pd.Series:
    if name not in frame:
        raise DataError(f"frame: column {name} is missing; add it")
    return frame[name]


def _texts(frame: pd.DataFrame, name: str) -> Tokens:
    codes, values = pd.factorize(_column(frame, name))
    return Tokens.merged(codes.astype(np.int32), [_text(value) for value in values])


def _text(value: object) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))  # pandas turns whole numbers into floats where a column has gaps
    return str(value)


def _numbers(frame: pd.DataFrame, name: str) -> np.ndarray:
    column = _column(frame, name)
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
    wrong = np.flatnonzero(np.isnan(numbers) & column.notna().to_numpy())
    if len(wrong):
        raise DataError(f"frame, row {wrong[0] + 1}, field {name}: {column.iloc[wrong[0]]!r} is not a number; mend it")
    return numbers


def _finite(frame: pd.DataFrame, name: str) -> np.ndarray:
    numbers = _numbers(frame, name)
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        raise DataError(f"frame, row {wrong[0] + 1}, field {name}: {numbers[wrong[0]]} is no finite number; fill it in")
    return numbers
