"""The YAML file that says what the columns of a Parquet or CSV log are for.

    ids: [user_id, item_id, {name: city, min_count: 5}, {name: query, encoding: hash, buckets: 100000}]
    dense: [item_age_days]
    bags: [{name: genres, separator: "|", pooling: mean}]
    domain: {column: age, bins: [25, 35]}
    labels: {click: is_click, long_view: play_seconds>=30}
    timestamp: time
    user: user_id
    weight: weight
    min_count: 1
    encoding: vocabulary

Only ``labels`` and one feature are needed. ``docs/data.md`` explains every key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from m3oe_fast.data.columns import id_text
from m3oe_fast.data.domains import MAX_DOMAINS, DomainRule, check_edges
from m3oe_fast.data.labels import LabelRule, parse_rule
from m3oe_fast.data.schema import DOMAIN_FIELD
from m3oe_fast.errors import DataError

KEYS = (
    *("ids", "dense", "bags", "domain", "labels", "timestamp", "user", "weight"),
    *("min_count", "encoding", "buckets", "delimiter"),
)
ID_KEYS = ("name", "encoding", "buckets", "min_count")
BAG_KEYS = (*ID_KEYS, "pooling", "separator")
DOMAIN_KEYS = ("column", "bins", "values", "others")
ENCODINGS = ("vocabulary", "hash")
POOLINGS = ("mean", "sum")
OTHERS = ("refuse", "drop")
MAX_BUCKETS = 2**31 - 2  # ids are int32, and 0 is taken


@dataclass(frozen=True)
class IdColumn:
    """An id field.

    Attributes:
        name: the column.
        buckets: of the hash; 0: a vocabulary is learned from the training rows.
        min_count: texts that occur in fewer training rows are unknown; at least 1.
    """

    name: str
    buckets: int = 0
    min_count: int = 1


@dataclass(frozen=True)
class BagColumn(IdColumn):
    """A multi-hot field.

    Attributes:
        pooling: how a row's embeddings become one: "mean" or "sum".
        separator: what stands between the values of a text; None: the column holds lists.
    """

    pooling: str = "mean"
    separator: str | None = None


@dataclass(frozen=True)
class LogSchema:
    """What the columns of a log are for.

    Attributes:
        ids, bags, dense: the features.
        domain: the rule; without edges and texts the domains are the texts that the column holds.
        labels: T rules.
        timestamp, user, weight: columns, None where the log has none.
        delimiter: between the columns of CSV files.
        drop_others: rows with another text than the domain's are left out; else they are an error.
    """

    ids: tuple[IdColumn, ...]
    bags: tuple[BagColumn, ...]
    dense: tuple[str, ...]
    domain: DomainRule
    labels: tuple[LabelRule, ...]
    timestamp: str | None = None
    user: str | None = None
    weight: str | None = None
    delimiter: str = ","
    drop_others: bool = False

    def roles(self) -> list[tuple[str, str]]:
        """Every use of a column: (column, role), in the order of the YAML keys."""
        single = {"domain": self.domain.column, "timestamp": self.timestamp, "user": self.user, "weight": self.weight}
        labels = dict.fromkeys(rule.column for rule in self.labels)
        return [
            *((column.name, "ids") for column in self.ids),
            *((name, "dense") for name in self.dense),
            *((column.name, "bags") for column in self.bags),
            *((name, "labels") for name in labels),
            *((name, role) for role, name in single.items() if name is not None),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


class _Where:
    """The file and key that an error names."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def error(self, key: str, message: str) -> DataError:
        return DataError(f"{self.file}, {key}: {message}")


def read_schema(path: Path) -> LogSchema:
    """Read and check the YAML file.

    Raises:
        DataError: it cannot be read, a key is unknown or holds what it must not, or a column has two uses that exclude
            each other.
    """
    try:
        values = yaml.load(path.read_bytes(), Loader=_Loader)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check --schema") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise DataError(f"{path}{line}: no valid YAML ({problem}); mend it") from error
    return parse_schema(values, path)


def parse_schema(values: Any, file: Path) -> LogSchema:
    """Check what a YAML file held; ``file`` is for messages.

    Raises:
        DataError: as ``read_schema``.
    """
    where = _Where(file)
    if not isinstance(values, dict):
        raise DataError(f"{file}: must hold keys such as ids, dense, domain and labels; see docs/data.md")
    _known(where, "the file", values, KEYS)
    defaults = {
        "encoding": _choice(where, "encoding", values.get("encoding", "vocabulary"), ENCODINGS),
        "buckets": _whole(where, "buckets", values.get("buckets", 0), 0, MAX_BUCKETS),
        "min_count": _whole(where, "min_count", values.get("min_count", 1), 1),
    }
    delimiter = values.get("delimiter", ",")
    if not isinstance(delimiter, str) or len(delimiter) != 1 or not delimiter.isascii() or delimiter in '"\r\n':
        raise where.error("delimiter", f'{delimiter!r} is no single character; write "," or "\\t"')
    schema = LogSchema(
        ids=tuple(_id(where, key, item, defaults) for key, item in _items(where, values, "ids")),
        bags=tuple(_bag(where, key, item, defaults) for key, item in _items(where, values, "bags")),
        dense=tuple(_column(where, key, item) for key, item in _items(where, values, "dense")),
        domain=_domain(where, values.get("domain")),
        labels=_labels(where, values.get("labels")),
        delimiter=delimiter,
        drop_others=_drop_others(where, values.get("domain")),
        **{
            key: None if values.get(key) is None else _column(where, key, values[key])
            for key in ("timestamp", "user", "weight")
        },
    )
    _check_roles(where, schema)
    return schema


def _check_roles(where: _Where, schema: LogSchema) -> None:
    """A column has one role; but a user may be an id, and a domain cut by bins may be a feature as well."""
    features = [(name, role) for name, role in schema.roles() if role in ("ids", "dense", "bags")]
    if not features:
        raise where.error("ids", "the log has no feature; name columns under ids, dense or bags")
    for name, role in features:
        if name == DOMAIN_FIELD:
            raise where.error(role, f"{name} is the name of the domain's own field; rename the column, or leave it out")
    seen: dict[str, str] = {}
    for name, role in schema.roles():
        before = seen.setdefault(name, role)
        if before == role and features.count((name, role)) < 2:
            continue
        if before == role:
            raise where.error(role, f"column {name} is named twice; drop one")
        if role == "labels":
            raise where.error(
                before, f"column {name} gives a label, so as a feature it would give the label away; drop it there"
            )
        binned = role == "domain" and bool(schema.domain.edges)
        if (before, role) == ("ids", "user") or (binned and before in ("ids", "dense")):
            continue
        if before == "labels" and role == "domain":
            raise where.error(
                role, f"a label follows from column {name}, so the domain would give it away; choose another column"
            )
        raise where.error(role, f"column {name} is already under {before}; a column has one role, drop one of the two")


def _id(where: _Where, key: str, item: Any, defaults: dict[str, Any]) -> IdColumn:
    if not isinstance(item, dict):
        item = {"name": item}
    _known(where, key, item, ID_KEYS)
    return IdColumn(_name_of(where, key, item), *_coding(where, key, item, defaults))


def _bag(where: _Where, key: str, item: Any, defaults: dict[str, Any]) -> BagColumn:
    if not isinstance(item, dict):
        item = {"name": item}
    _known(where, key, item, BAG_KEYS)
    separator = item.get("separator")
    if separator is not None and not (isinstance(separator, str) and separator):
        raise where.error(f"{key}.separator", f'{separator!r} is no text; write for example "|"')
    return BagColumn(
        _name_of(where, key, item),
        *_coding(where, key, item, defaults),
        pooling=_choice(where, f"{key}.pooling", item.get("pooling", "mean"), POOLINGS),
        separator=separator,
    )


def _coding(where: _Where, key: str, item: dict[str, Any], defaults: dict[str, Any]) -> tuple[int, int]:
    """Buckets, 0 for a vocabulary, and least count of a field."""
    encoding = _choice(where, f"{key}.encoding", item.get("encoding", defaults["encoding"]), ENCODINGS)
    if encoding == "hash":
        if "min_count" in item:
            raise where.error(f"{key}.min_count", "a hash learns no vocabulary, so no id is too rare for it; drop it")
        buckets = _whole(where, f"{key}.buckets", item.get("buckets", defaults["buckets"]), 0, MAX_BUCKETS)
        if not buckets:
            raise where.error(f"{key}.buckets", "encoding hash needs the number of its buckets, for example 100000")
        return buckets, 1
    if "buckets" in item:
        raise where.error(f"{key}.buckets", "only encoding hash has buckets; add encoding: hash, or drop it")
    return 0, _whole(where, f"{key}.min_count", item.get("min_count", defaults["min_count"]), 1)


def _domain(where: _Where, value: Any) -> DomainRule:
    if value is None:
        return DomainRule()
    if not isinstance(value, dict):
        value = {"column": value}
    _known(where, "domain", value, DOMAIN_KEYS)
    if "column" not in value:
        raise where.error("domain.column", "is missing; name the column that tells the domain")
    column = _column(where, "domain.column", value["column"])
    if "bins" in value and "values" in value:
        raise where.error("domain", "has both bins and values; keep one")
    if "bins" in value:
        return DomainRule(column, edges=_edges(where, value["bins"]))
    texts = []
    for place, text in enumerate(_list(where, "domain.values", value.get("values", []))):
        if isinstance(text, bool) or not isinstance(text, str | int | float) or not id_text(text):
            raise where.error(f"domain.values[{place}]", f"{text!r} is no text or number; put it in quotes")
        texts.append(id_text(text))
    for text in texts:
        if texts.count(text) > 1:
            raise where.error("domain.values", f"{text} occurs twice; drop one")
    if "values" in value and not texts:
        raise where.error("domain.values", "is empty; name the domains, or drop the key to take every value")
    if len(texts) > MAX_DOMAINS:
        raise where.error("domain.values", f"{len(texts)} domains, at most {MAX_DOMAINS} fit; use bins")
    return DomainRule(column, texts=tuple(texts))


def _drop_others(where: _Where, value: Any) -> bool:
    if not isinstance(value, dict) or "others" not in value:
        return False
    if "values" not in value:
        raise where.error("domain.others", "only listed values leave others; list them under values, or drop the key")
    return _choice(where, "domain.others", value["others"], OTHERS) == "drop"


def _edges(where: _Where, value: Any) -> tuple[float, ...]:
    edges = _list(where, "domain.bins", value)
    if not edges or any(isinstance(edge, bool) or not isinstance(edge, int | float) for edge in edges):
        raise where.error("domain.bins", f"{value!r} are not numbers; write edges such as [25, 35]")
    return check_edges(tuple(map(float, edges)), f"{where.file}, domain.bins")


def _labels(where: _Where, value: Any) -> tuple[LabelRule, ...]:
    if not isinstance(value, dict) or not value:
        raise where.error("labels", "name the tasks, for example {click: is_click, like: rating>3}")
    return tuple(parse_rule(task, rule, f"{where.file}, labels.{task}") for task, rule in value.items())


def _items(where: _Where, values: dict[str, Any], key: str) -> Iterable[tuple[str, Any]]:
    value = values.get(key)
    listed = _list(where, key, [] if value is None else value)
    return [(f"{key}[{place}]", item) for place, item in enumerate(listed)]


def _list(where: _Where, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise where.error(key, f"{value!r} is no list; write [a, b], or a line - a for each")
    return value


def _name_of(where: _Where, key: str, item: dict[str, Any]) -> str:
    if "name" not in item:
        raise where.error(f"{key}.name", "is missing; name the column")
    return _column(where, f"{key}.name", item["name"])


def _column(where: _Where, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise where.error(
            key, f"{value!r} is no column name; write its name, in quotes if it looks like something else"
        )
    return value


def _choice(where: _Where, key: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise where.error(key, f"{value!r} is unknown{_meant(value, choices)}; choose one of {', '.join(choices)}")
    return value


def _whole(where: _Where, key: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}"
        raise where.error(key, f"{value!r} is no whole number in range; write {limits}")
    return value


def _known(where: _Where, key: str, values: Mapping[Any, Any], known: tuple[str, ...]) -> None:
    for name in values:
        if name not in known:
            place = str(name) if key == "the file" else f"{key}.{name}"
            raise where.error(place, f"unknown key{_meant(name, known)}; the keys are {', '.join(known)}")


def _meant(word: object, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1)
    return f", did you mean {close[0]}?" if close else ""


_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice, of which YAML would silently keep the last."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.tag == _MERGE:
            continue
        name = loader.construct_object(key, deep=True)
        if not isinstance(name, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, f"{name!r} is no key", key.start_mark)
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {name} occurs twice", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
