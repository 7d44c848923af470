"""First pass over a streamed log: everything an ``Encoder`` holds, learned from the training rows.

The domains' names are taken from all rows, as for other logs; the id field "domain" knows those of training rows only.
Memory holds a chunk, a sample for ``leakage``, and every distinct text of the fields that have a vocabulary: give a
field of a hundred million ids ``encoding: hash``.
"""

from __future__ import annotations

from itertools import compress
from typing import NamedTuple

import numpy as np

from m3oe_fast.data import leakage
from m3oe_fast.data.arrow_columns import Coded
from m3oe_fast.data.chunk import Chunk
from m3oe_fast.data.columns import natural_order
from m3oe_fast.data.domains import MAX_DOMAINS, DomainRule
from m3oe_fast.data.encode import Encoder, check_range
from m3oe_fast.data.log_schema import IdColumn
from m3oe_fast.data.schema import DOMAIN_FIELD, Schema
from m3oe_fast.data.store import PARTS
from m3oe_fast.data.stream_split import Split
from m3oe_fast.data.tabular import TabularLog
from m3oe_fast.errors import DataError


class Fit(NamedTuple):
    """What the first pass learned: the encoder, and a warning for each feature that gives a label away."""

    encoder: Encoder
    warnings: tuple[str, ...]


def fit(log: TabularLog, split: Split) -> Fit:
    """Learn from the training rows of ``log``.

    Raises:
        DataError: a value does not fit its column's role, or a part has no rows.
    """
    learning = _Learning(log)
    assign = split.start()
    columns = {*log.columns("ids", "dense", "bags", "domain", "labels"), *split.columns}
    rows = np.zeros(len(PARTS), np.int64)
    for chunk in log.chunks(sorted(columns)):
        part = assign(chunk)
        rows += np.bincount(part, minlength=len(PARTS))
        learning.add(chunk, part == 0)
    for name, count in zip(PARTS, rows, strict=True):
        if not count:
            raise DataError(
                f"{log.path}: the split leaves {name} without rows ({rows.sum()} rows in all); "
                "take a larger log or another --split"
            )
    return learning.result()


class _Vocabulary:
    """Counts the texts of one field in training rows."""

    def __init__(self, column: IdColumn) -> None:
        self._column = column
        self._counts: dict[str, int] = {}

    def add(self, coded: Coded, used: np.ndarray) -> None:
        """Count the values ``coded`` where ``used``, bool [n]."""
        seen = np.bincount(coded.codes[used] + 1, minlength=len(coded.texts) + 1)[1:]
        if self._column.min_count == 1:
            self._counts.update(dict.fromkeys(compress(coded.texts, seen.tolist()), 1))
            return
        counts = self._counts
        for text, count in zip(coded.texts, seen.tolist(), strict=True):
            if count:
                counts[text] = counts.get(text, 0) + count

    def texts(self) -> tuple[str, ...]:
        least = self._column.min_count
        return tuple(natural_order([text for text, count in self._counts.items() if text and count >= least]))


class _Learning:
    def __init__(self, log: TabularLog) -> None:
        self._log, self._schema = log, log.schema
        self._vocabularies = {
            column.name: _Vocabulary(column) for column in (*self._schema.ids, *self._schema.bags) if not column.buckets
        }
        self._ranges = {name: (np.inf, -np.inf) for name in self._schema.dense}
        self._domains = _Domains(log)
        self._sample = leakage.Sample()

    def add(self, chunk: Chunk, train: np.ndarray) -> None:
        """Learn from the rows ``train``, bool [n], and check all of them."""
        places, draws = self._sample.choose(chunk.rows, train)
        sampled: leakage.Sampled = {}
        for column in self._schema.ids:
            coded = chunk.texts(column.name)
            if not column.buckets:
                self._vocabularies[column.name].add(coded, train)
            sampled[column.name] = leakage.hashed(coded, places)
        for bag in self._schema.bags:
            coded, offsets = chunk.bag(bag.name, bag.separator)
            if not bag.buckets:
                self._vocabularies[bag.name].add(coded, np.repeat(train, np.diff(offsets)))
            sampled[bag.name] = leakage.hashed_bag(coded, offsets, places)
        for name in self._schema.dense:
            values = chunk.dense(name)
            if train.any():
                low, high = self._ranges[name]
                self._ranges[name] = min(low, values[train].min()), max(high, values[train].max())
            sampled[name] = values[places]
        sampled[DOMAIN_FIELD] = self._domains.add(chunk, train)[places].astype(np.uint64)
        label = chunk.label(self._schema.labels)[places]
        for place, rule in enumerate(self._schema.labels):
            sampled[f"label:{rule.task}"] = label[:, place].astype(np.float64)
        self._sample.add(draws, sampled)

    def result(self) -> Fit:
        rule, known = self._domains.result()
        tasks = tuple(label.task for label in self._schema.labels)
        vocabularies = {name: vocabulary.texts() for name, vocabulary in self._vocabularies.items()}
        vocabularies[DOMAIN_FIELD] = known
        ids, bags = self._schema.ids, self._schema.bags
        buckets = {column.name: column.buckets for column in (*ids, *bags) if column.buckets}
        sizes = {name: len(texts) + 1 for name, texts in vocabularies.items()}
        sizes.update({name: size + 1 for name, size in buckets.items()})
        scalers = {
            name: check_range(str(self._log.path), name, float(low), float(high))
            for name, (low, high) in self._ranges.items()
        }
        fields = (*(column.name for column in ids), DOMAIN_FIELD)
        schema = Schema(
            fields=fields,
            vocab_sizes=tuple(sizes[name] for name in fields),
            dense=self._schema.dense,
            domains=rule.names,
            tasks=tasks,
            bags=tuple(bag.name for bag in bags),
            bag_vocab_sizes=tuple(sizes[bag.name] for bag in bags),
            bag_pooling=tuple(bag.pooling for bag in bags),
            weighted=self._schema.weight is not None,
        )
        encoder = Encoder(
            schema,
            vocabularies,
            scalers,
            rule,
            self._schema.labels,
            buckets=buckets,
            bag_separators={bag.name: bag.separator for bag in bags if bag.separator is not None},
        )
        return Fit(encoder, tuple(leakage.warnings(self._sample, (*fields, *schema.bags, *schema.dense), tasks)))


class _Domains:
    """The domain rule: as the schema has it, or from the texts that the domain column holds."""

    def __init__(self, log: TabularLog) -> None:
        self._rule = log.schema.domain
        self._where = f"{log.path}, field {self._rule.column}"
        self._open = self._rule.column is not None and not self._rule.names
        self._texts: dict[str, None] = {}
        self._known: set[int] = set()

    def add(self, chunk: Chunk, train: np.ndarray) -> np.ndarray:
        """The domain of each row, int [n]; in order of appearance where the rule is still open."""
        if self._open:
            codes, texts = chunk.texts(self._rule.column)
            used = np.bincount(codes + 1, minlength=len(texts) + 1)[1:]
            self._texts.update(dict.fromkeys(text for text in compress(texts, used.tolist()) if text))
            if len(self._texts) > MAX_DOMAINS:
                raise DataError(f"{self._where}: more than the {MAX_DOMAINS} domains that fit; use bins or values")
        domain = chunk.domain(DomainRule(self._rule.column, texts=tuple(self._texts)) if self._open else self._rule)
        self._known.update(np.unique(domain[train]).tolist())
        return domain

    def result(self) -> tuple[DomainRule, tuple[str, ...]]:
        """The rule, and the names of the domains that training rows have."""
        if not self._open:
            names = self._rule.names
            return self._rule, tuple(natural_order([names[place] for place in self._known]))
        texts = list(self._texts)
        rule = DomainRule(self._rule.column, texts=tuple(natural_order(texts)))
        return rule, tuple(natural_order([texts[place] for place in self._known]))
