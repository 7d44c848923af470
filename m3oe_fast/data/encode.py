"""Raw columns -> model inputs: vocabularies, scalers, domain rule and label rules of one log.

Everything is learned from the training rows only. An id field is a text -> integer table; 0 stands
for unknown or missing. A hashed field needs no table: its ids are 1 + hash modulo buckets. The values of a multi-hot
field (a bag) are encoded as ids are. Values of a pandas frame compare by their text (5, 5.0, "5" and "5.0" are the
same id, "05" is another). Where the reader of the log kept only the first token of a text, so does
``transform``. Dense features are min-max scaled; beyond the training range they are clipped to [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from m3oe_fast.data.arrow_columns import bag_of, is_list, is_text
from m3oe_fast.data.batch import Batch
from m3oe_fast.data.columns import Tokens, first_token, id_text, natural_order
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.hashing import buckets_of
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.schema import DOMAIN_FIELD, Schema
from m3oe_fast.errors import DataError


@dataclass(frozen=True)
class Encoder:
    """Encodes raw rows exactly as the training rows were encoded.

    Attributes:
        schema: what comes out.
        vocabularies: for each id field and bag that is not hashed its known texts; text i has id i + 1.
        scalers: for each dense feature its least and greatest training value.
        domain_rule: domain of a row.
        label_rules: labels of a row, T rules.
        separators: for a column of which only the first token counts, the characters that end it.
        aliases: other names under which raw rows may hold a column.
        buckets: for each id field and bag that is hashed, the number of its buckets.
        bag_separators: for a bag whose column holds texts, what stands between the values.
    """

    schema: Schema
    vocabularies: dict[str, tuple[str, ...]]
    scalers: dict[str, tuple[float, float]]
    domain_rule: DomainRule
    label_rules: tuple[LabelRule, ...]
    separators: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: dict[str, int] = field(default_factory=dict)
    bag_separators: dict[str, str] = field(default_factory=dict)

    @classmethod
    def fit(cls, log: RawLog, train: np.ndarray) -> Encoder:
        """Learn vocabularies and scalers from the rows ``train`` (int [n], n > 0).

        Raises:
            DataError: the values of a dense feature lie too far apart for a float64.
        """
        vocabularies = {name: _known(column, train) for name, column in fields_of(log).items()}
        scalers = {name: _range(log.where, name, column[train]) for name, column in log.dense.items()}
        schema = Schema(
            fields=tuple(vocabularies),
            vocab_sizes=tuple(len(texts) + 1 for texts in vocabularies.values()),
            dense=tuple(scalers),
            domains=log.domain_rule.names,
            tasks=log.tasks,
        )
        read = {log.domain_rule.column, *log.fields, *log.dense, *(rule.column for rule in log.label_rules)}
        separators = {name: text for name, text in log.separators.items() if name in read}
        return cls(schema, vocabularies, scalers, log.domain_rule, log.label_rules, separators, log.aliases)

    def encode(self, name: str, column: Tokens) -> np.ndarray:
        """The ids of the id field ``name``, int32 [N]."""
        return np.append(self.ids_of(name, column.values), np.int32(0))[column.codes]

    def ids_of(self, name: str, texts: Sequence[str]) -> np.ndarray:
        """The ids of n texts of the id field or bag ``name``, int32 [n]; 0 for an empty text."""
        if name in self.buckets:
            return buckets_of(texts, self.buckets[name]).astype(np.int32)
        return np.fromiter(map(self._ids[name].get, texts, repeat(0)), np.int32, len(texts))

    def scale(self, feature: str, values: np.ndarray) -> np.ndarray:
        """A dense feature (float64 [N], finite) as float32 [N] in [0, 1]; all 0 if constant."""
        low, high = self.scalers[feature]
        if low == high:
            return np.zeros(len(values), np.float32)
        return ((np.clip(values, low, high) - low) / (high - low)).astype(np.float32)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that ``transform`` needs: the features (but the id field "domain") and the domain column."""
        domain = [] if self.domain_rule.column is None else [self.domain_rule.column]
        return tuple(dict.fromkeys([*self.schema.fields[:-1], *self.schema.bags, *self.schema.dense, *domain]))

    def transform(self, frame: pd.DataFrame, labels: bool = False) -> Batch:
        """Encode raw rows.

        Args:
            frame: the columns ``columns``, as the log has them; others are ignored. Read ids as text (dtype str)
                where a leading zero counts, as in zip codes. Columns of RecBole logs are called as in the header,
                without the type, and a token_seq may hold all its tokens. For both MovieLens logs they are user_id,
                movie_id (or item_id), gender, occupation, zip (or zip_code), genre (or genres, class) and age; genre
                may hold all genres, separated by bars or blanks. A bag is a column of lists, or of texts with the
                separator that the log had. Weights are for training and not looked at.
            labels: also work out the labels, NaN where the column of a rule is absent or empty. Without it they are
                all NaN, and their columns are not looked at.

        Raises:
            DataError: a column is missing or occurs twice, a dense value or domain is missing or outside its range, a
                label is neither 0 nor 1, a bag is no list or text. Rows are counted from 1.
        """
        domain = self._domain(frame)
        columns = {name: self._texts(frame, name) for name in self.schema.fields[:-1]}
        columns[DOMAIN_FIELD] = Tokens(domain, self.schema.domains)
        rows = len(frame)
        ids = np.empty((rows, len(columns)), np.int32)
        for place, (name, column) in enumerate(columns.items()):
            ids[:, place] = self.encode(name, column)
        dense = np.empty((rows, len(self.scalers)), np.float32)
        for place, name in enumerate(self.scalers):
            dense[:, place] = self.scale(name, self._finite(frame, name))
        label = np.full((rows, len(self.label_rules)), np.nan, np.float32)
        for place, rule in enumerate(self.label_rules if labels else ()):
            if rule.column in frame:
                label[:, place] = rule.apply(self._numbers(frame, rule.column), "frame", lambda row: row + 1)
        bags = [self._bag(frame, name) for name in self.schema.bags]
        return Batch.from_numpy(ids, dense, domain.astype(np.int64), label, bags=bags)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "schema": self.schema.to_dict(),
            "vocabularies": {name: list(texts) for name, texts in self.vocabularies.items()},
            "scalers": {name: list(ends) for name, ends in self.scalers.items()},
            "domain_rule": self.domain_rule.to_dict(),
            "label_rules": [rule.to_dict() for rule in self.label_rules],
            "separators": dict(self.separators),
            "aliases": {name: list(others) for name, others in self.aliases.items()},
            "buckets": dict(self.buckets),
            "bag_separators": dict(self.bag_separators),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Encoder:
        """The inverse of ``to_dict``; the last two keys may be missing."""
        return cls(
            Schema.from_dict(values["schema"]),
            {name: tuple(texts) for name, texts in values["vocabularies"].items()},
            {name: (low, high) for name, (low, high) in values["scalers"].items()},
            DomainRule.from_dict(values["domain_rule"]),
            tuple(LabelRule(**rule) for rule in values["label_rules"]),
            dict(values["separators"]),
            {name: tuple(others) for name, others in values["aliases"].items()},
            dict(values.get("buckets", {})),
            dict(values.get("bag_separators", {})),
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
            domain = rule.of_numbers(self._numbers(frame, rule.column))
        else:
            column = self._texts(frame, rule.column)
            domain = np.append(rule.of_texts(column.values), np.int32(-1))[column.codes]
        wrong = np.flatnonzero(domain < 0)
        if len(wrong):
            value = self._column(frame, rule.column).iloc[wrong[0]]
            raise DataError(
                f"frame, row {wrong[0] + 1}, field {rule.column}: {value!r} is in no domain "
                f"({', '.join(rule.names)}); mend or drop the row"
            )
        return domain

    def _column(self, frame: pd.DataFrame, name: str) -> pd.Series:
        found = next((other for other in (name, *self.aliases.get(name, ())) if other in frame), None)
        if found is None:
            raise DataError(f"frame: column {self._called(name)} is missing; needed are {self._needed()}")
        column = frame[found]
        if column.ndim > 1:
            raise DataError(f"frame: column {found} occurs {column.shape[1]} times; keep one")
        separators = self.separators.get(name)
        if separators is None:
            return column
        return column.map(lambda value: first_token(value, separators) if isinstance(value, str) else value)

    def _called(self, name: str) -> str:
        others = self.aliases.get(name, ())
        return f"{name} (or {', '.join(others)})" if others else name

    def _needed(self) -> str:
        return ", ".join(map(self._called, self.columns))

    def _texts(self, frame: pd.DataFrame, name: str) -> Tokens:
        try:
            codes, values = pd.factorize(self._column(frame, name))
        except TypeError as error:  # lists cannot be compared
            raise DataError(f"frame, field {name}: a value is no text or number ({error}); make it a text") from error
        return Tokens.merged(codes.astype(np.int32), [id_text(value) for value in values])

    def _numbers(self, frame: pd.DataFrame, name: str) -> np.ndarray:
        column = self._column(frame, name)
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(np.float64, na_value=np.nan)
        wrong = np.flatnonzero(np.isnan(numbers) & column.notna().to_numpy())
        wrong = [row for row in wrong if column.iloc[row] != ""]  # an empty text is a missing number, as in files
        if wrong:
            value = column.iloc[wrong[0]]
            raise DataError(f"frame, row {wrong[0] + 1}, field {name}: {value!r} is not a number; mend it")
        return numbers

    def _bag(self, frame: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [m] of the values of a bag and offsets int64 [n+1]."""
        separator = self.bag_separators.get(name)
        try:
            column = pa.Array.from_pandas(self._column(frame, name))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            fault = str(error).splitlines()[0]
            raise DataError(f"frame, field {name}: {fault}; hold a list of texts or numbers in each row") from error
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        separated = is_text(column.type) and separator is not None
        if not (separated or is_list(column.type) or pa.types.is_null(column.type)):
            held = "lists" if separator is None else f"lists, or texts separated by {separator!r}"
            raise DataError(f"frame, field {name}: is of type {column.type}; it must hold {held}")
        (codes, texts), offsets = bag_of(column, separator)
        return self.ids_of(name, texts)[codes].astype(np.int64), offsets.astype(np.int64)

    def _finite(self, frame: pd.DataFrame, name: str) -> np.ndarray:
        numbers = self._numbers(frame, name)
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            raise DataError(
                f"frame, row {wrong[0] + 1}, field {name}: {numbers[wrong[0]]} is no finite number; fill it in"
            )
        return numbers


def fields_of(log: RawLog) -> dict[str, Tokens]:
    """The id fields of ``log`` and, last, the domain."""
    return {**log.fields, DOMAIN_FIELD: Tokens(log.domain, log.domain_rule.names)}


def _known(column: Tokens, train: np.ndarray) -> tuple[str, ...]:
    seen = np.bincount(column.codes[train] + 1, minlength=len(column.values) + 1)[1:]
    return tuple(natural_order([column.values[code] for code in np.flatnonzero(seen)]))


def _range(where: str, name: str, values: np.ndarray) -> tuple[float, float]:
    return check_range(where, name, float(values.min()), float(values.max()))


def check_range(where: str, name: str, low: float, high: float) -> tuple[float, float]:
    """The least and greatest value of a dense feature.

    Raises:
        DataError: they lie too far apart for a float64; ``where`` names the file.
    """
    if not math.isfinite(high - low):
        raise DataError(
            f"{where}, field {name}: its values, {low:g} to {high:g}, lie too far apart to be scaled; "
            "rescale the column or leave it out"
        )
    return low, high
