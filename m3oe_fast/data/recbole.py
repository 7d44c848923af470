"""RecBole atomic files: NAME.inter and, joined to it, NAME.user and NAME.item.

In a folder, zip or wheel. Tab-separated; the header types each column: ``name:token`` an id,
``name:token_seq`` texts separated by blanks (the first is the id here), ``name:float`` a dense
feature, ``name:float_seq`` is left out. Keys of the joins are user_id and item_id. A column used
in a label is never a feature, neither is timestamp, which orders the temporal split. The format is
that of https://recbole.io/docs/user_guide/data/atomic_files.html.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from m3oe_fast.data.archive import Archive
from m3oe_fast.data.columns import Tokens, canonical, first_token, natural_order
from m3oe_fast.data.delimited import NUMBER, TOKEN, Layout, Table, read_delimited, require_finite
from m3oe_fast.data.domains import MAX_DOMAINS, DomainRule, parse_bins
from m3oe_fast.data.join import join_rows
from m3oe_fast.data.labels import LabelRule, parse_labels
from m3oe_fast.data.rawlog import RawLog, Source
from m3oe_fast.data.schema import DOMAIN_FIELD
from m3oe_fast.errors import DataError

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
TYPES = {"token": TOKEN, "token_seq": TOKEN, "float": NUMBER, "float_seq": None}
SEPARATOR = " "  # of a token_seq
HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Roles:
    """What the user says the columns are for."""

    domain_column: str | None
    bins: tuple[float, ...]
    labels: tuple[LabelRule, ...]
    dropped: tuple[str, ...]

    @property
    def no_feature(self) -> set[str]:
        """Columns that are no features; a domain column without bins is the field "domain"."""
        named = {TIME, *self.dropped, *(rule.column for rule in self.labels)}
        return named if self.bins or self.domain_column is None else {*named, self.domain_column}


def find(
    place: str,
    domain_column: str | None,
    domain_bins: str | None,
    labels: str | None,
    drop_columns: str | None,
) -> Source:
    """The log at ``place``, PATH or PATH#NAME; the other arguments are those of ``DataOptions``.

    Raises:
        DataError: no or several data sets there, no labels, or an option that cannot be read.
    """
    path, name = place, ""
    if "#" in place and not os.path.exists(place):
        path, _, name = place.rpartition("#")
    archive = Archive(path)
    stem = choose(archive, name)
    if not labels:
        columns = ", ".join(read_header(archive, f"{stem}.inter"))
        raise DataError(
            f"{archive.where(stem)}.inter: name the tasks, for example --labels "
            f"'click=rating>3,like=rating>4'; its columns are {columns}"
        )
    if domain_bins and not domain_column:
        raise DataError(f"--domain_bins {domain_bins}: of which column? name it with --domain_column")
    roles = Roles(
        domain_column,
        parse_bins(domain_bins) if domain_bins else (),
        parse_labels(labels),
        tuple(name.strip() for name in (drop_columns or "").split(",") if name.strip()),
    )
    if domain_column in {rule.column for rule in roles.labels}:
        raise DataError(
            f"--domain_column {domain_column}: a label follows from this column, so the domain would give the label "
            "away; choose another column"
        )
    members = [name for name in members_of(archive, stem) if name]
    identity = {
        "content": archive.digest(members),
        "stem": stem,
        "domain_column": domain_column,
        "bins": list(roles.bins),
        "labels": [rule.to_dict() for rule in roles.labels],
        "dropped": sorted(roles.dropped),
    }
    name = stem.rpartition("/")[2]
    return Source(f"recbole:{name}", identity, lambda: _read(archive, stem, roles))


def choose(archive: Archive, name: str = "") -> str:
    """The path, less ``.inter``, of the data set called ``name``, or of the only one.

    Raises:
        DataError: none, or several and no name.
    """
    stems = [member.removesuffix(".inter") for member in archive.names if member.endswith(".inter")]
    names = ", ".join(sorted(stem.rpartition("/")[2] for stem in stems))
    if not stems:
        raise DataError(
            f"{archive.path}: holds no RecBole atomic files (NAME.inter, NAME.user, NAME.item); check the path"
        )
    chosen = [stem for stem in stems if not name or stem.rpartition("/")[2] == name]
    if len(chosen) > 1:
        raise DataError(f"{archive.path}: holds several data sets ({names}); name one as in PATH#NAME")
    if not chosen:
        raise DataError(f"{archive.path}: holds no data set {name}; it holds {names}")
    return chosen[0]


def members_of(archive: Archive, stem: str) -> tuple[str, str | None, str | None]:
    """The members .inter, .user, .item of a data set; None where it has none."""
    user, item = (f"{stem}.{kind}" if f"{stem}.{kind}" in archive.names else None for kind in ("user", "item"))
    return f"{stem}.inter", user, item


def read_header(archive: Archive, member: str) -> dict[str, str]:
    """The columns of an atomic file and their types, keys of ``TYPES``.

    Raises:
        DataError: the file is empty, a column has no such type, or a name occurs twice.
    """
    where = archive.where(member)
    data = archive.read(member)
    line, _, _ = data.slice(0, min(data.size, HEADER_BYTES)).to_pybytes().partition(b"\n")
    columns: dict[str, str] = {}
    for text in line.decode("utf-8-sig", errors="replace").rstrip("\r").split("\t"):
        name, _, kind = text.partition(":")
        if kind not in TYPES:
            raise DataError(
                f"{where}, row 1: {text!r} is no typed column; the header must be NAME:TYPE, of "
                f"type {', '.join(TYPES)}, separated by tabs"
            )
        if name in columns:
            raise DataError(f"{where}, row 1: column {name} occurs twice; rename one")
        columns[name] = kind
    return columns


def read_atomic(archive: Archive, member: str) -> Table:
    """The token, token_seq (first token) and float columns of one atomic file.

    Raises:
        DataError: see ``read_header`` and ``read_delimited``.
    """
    kinds = read_header(archive, member)
    types = {name: TYPES[kind] for name, kind in kinds.items() if TYPES[kind] is not None}
    layout = Layout(tuple(kinds), header_rows=1)
    table = read_delimited(archive.read(member), archive.where(member), layout, types)
    for name, column in table.tokens.items():
        if kinds[name] == "token_seq":
            table.tokens[name] = column.renamed([canonical(first_token(text, SEPARATOR)) for text in column.values])
    return table


def _read(archive: Archive, stem: str, roles: Roles) -> RawLog:
    inter, user, item = members_of(archive, stem)
    log = read_atomic(archive, inter)
    tokens, numbers = dict(log.tokens), dict(log.numbers)
    left_out = roles.no_feature
    for member, key in ((user, USER), (item, ITEM)):
        if member:
            side = read_atomic(archive, member)
            _require_finite(side, side.numbers, left_out)
            _join(log, side, key, tokens, numbers)
    names = [*tokens, *numbers]
    _require(log, names, roles)
    _require_finite(log, numbers, left_out)
    fields = {name: column for name, column in tokens.items() if name not in left_out}
    if DOMAIN_FIELD in fields or DOMAIN_FIELD in numbers.keys() - left_out:
        raise DataError(
            f"{log.where}, field {DOMAIN_FIELD}: this name is the domain's own; rename the column, "
            f"drop it, or name it as --domain_column {DOMAIN_FIELD}"
        )
    dense = {name: column for name, column in numbers.items() if name not in left_out}
    label = [rule.apply(_values(log, rule.column, tokens, numbers), log.where, log.line) for rule in roles.labels]
    rule, domain = _domains(log, roles, tokens, numbers)
    return RawLog(
        where=log.where,
        fields=fields,
        dense=dense,
        domain=domain,
        domain_rule=rule,
        label=np.stack(label, axis=1),
        label_rules=roles.labels,
        user=tokens.get(USER),
        time=_values(log, TIME, tokens, numbers) if TIME in names else None,
        warnings=_sequence_warnings(archive, [inter, user, item]),
        separators=_separators(archive, [inter, user, item]),
    )


def _join(log: Table, side: Table, key: str, tokens: dict[str, Tokens], numbers: dict[str, np.ndarray]) -> None:
    """Add the columns of ``side``, one value for each row of ``log``."""
    rows = join_rows(log, side, key)
    for name in [*side.tokens, *side.numbers]:
        if name == key:
            continue
        if name in tokens or name in numbers:
            raise DataError(f"{side.where}, field {name}: another file has this column too; rename one")
        if name in side.tokens:
            tokens[name] = side.tokens[name].gather(rows)
        else:
            numbers[name] = np.append(side.numbers[name], np.nan)[rows]


def _require_finite(table: Table, numbers: dict[str, np.ndarray], left_out: set[str]) -> None:
    for name, column in numbers.items():
        if name not in left_out:
            remedy = "fill it in, or leave the column out with --drop_columns"
            require_finite(table, name, column, remedy)


def _require(log: Table, names: list[str], roles: Roles) -> None:
    asked = {"--domain_column": [roles.domain_column] if roles.domain_column else []}
    asked["--labels"] = [rule.column for rule in roles.labels]
    asked["--drop_columns"] = list(roles.dropped)
    for option, columns in asked.items():
        for name in columns:
            if name not in names:
                raise DataError(
                    f"{log.where}: has no column {name} ({option}), nor has a file joined to it; "
                    f"choose among {', '.join(names)}"
                )


def _values(log: Table, name: str, tokens: dict[str, Tokens], numbers: dict[str, np.ndarray]) -> np.ndarray:
    """A column as float64 [N], NaN where it is missing; a token must be the text of a number."""
    if name in numbers:
        return numbers[name]
    values = tokens[name].numbers()
    wrong = np.flatnonzero(np.isnan(values) & (tokens[name].codes >= 0))
    if len(wrong):
        text = tokens[name].values[tokens[name].codes[wrong[0]]]
        raise DataError(f"{log.at(int(wrong[0]), name)}: {text!r} is not a number; name another column")
    return values


def _domains(
    log: Table, roles: Roles, tokens: dict[str, Tokens], numbers: dict[str, np.ndarray]
) -> tuple[DomainRule, np.ndarray]:
    """The domain rule and each row's domain, int32 [N]."""
    name = roles.domain_column
    if name is None:
        return DomainRule(), np.zeros(len(next(iter([*tokens.values(), *numbers.values()]))), np.int32)
    if roles.bins:
        rule = DomainRule(name, edges=roles.bins)
        domain = rule.of_numbers(_values(log, name, tokens, numbers))
    elif name in numbers:
        raise DataError(f"{log.where}, field {name}: is a number; cut it with --domain_bins, for example 25,35")
    else:
        rule = DomainRule(name, texts=tuple(natural_order(list(tokens[name].values))))
        domain = np.append(rule.of_texts(tokens[name].values), np.int32(-1))[tokens[name].codes]
    if len(rule.names) > MAX_DOMAINS:
        raise DataError(
            f"{log.where}, field {name}: {len(rule.names)} domains, at most {MAX_DOMAINS} fit; use --domain_bins"
        )
    wrong = np.flatnonzero(domain < 0)
    if len(wrong):
        raise DataError(f"{log.at(int(wrong[0]), name)}: empty, so the row has no domain; fill it in")
    return rule, domain


def _separators(archive: Archive, members: list[str | None]) -> dict[str, str]:
    headers = [read_header(archive, member) for member in members if member]
    return {name: SEPARATOR for header in headers for name, kind in header.items() if kind == "token_seq"}


def _sequence_warnings(archive: Archive, members: list[str | None]) -> tuple[str, ...]:
    headers = {name: read_header(archive, name) for name in members if name}
    return tuple(
        f"{member.rpartition('/')[2]}: column {name} is a {kind}, "
        + ("of which only the first token is used" if kind == "token_seq" else "which is left out")
        for member, header in headers.items()
        for name, kind in header.items()
        if kind in ("token_seq", "float_seq")
    )
