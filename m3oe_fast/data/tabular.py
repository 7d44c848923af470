"""Logs of any size in Parquet or CSV files: found, checked against their schema, and read in chunks.

``parquet:PATH`` and ``csv:PATH`` name a file, or a folder whose *.parquet (*.csv, packed or not) files, in order of
their names, are the log.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import pyarrow as pa

from m3oe_fast.data.archive import kind_of
from m3oe_fast.data.arrow_columns import is_list, is_number, is_text, is_time
from m3oe_fast.data.chunk import Chunk
from m3oe_fast.data.log_files import CHUNK_ROWS, CsvFile, LogFile, ParquetFile
from m3oe_fast.data.log_schema import LogSchema, read_schema
from m3oe_fast.data.published_counts import Published
from m3oe_fast.errors import DataError

Format = Literal["parquet", "csv"]
ENDINGS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "csv": (".csv", ".csv.gz", ".csv.bz2", ".csv.lz4", ".csv.zst"),
}
DIGEST_BYTES = 1 << 20
MAX_LISTED = 30  # columns in a message


@dataclass(frozen=True)
class TabularLog:
    """A log that has been found and whose columns fit its schema; no row has been read.

    Attributes:
        name: what the user calls it.
        path: the file or folder.
        files: at least one.
        schema: what the columns are for.
        joined: further files that rows of ``files`` take columns from.
        given_test: those of ``files`` that the publisher gives for testing, if any.
        published: what a publication counts in its domains, if we know one.
    """

    name: str
    path: Path
    files: tuple[LogFile, ...]
    schema: LogSchema
    joined: tuple[Path, ...] = ()
    given_test: tuple[LogFile, ...] = ()
    published: Published | None = None

    @cached_property
    def identity(self) -> dict[str, object]:
        """Everything the rows depend on, plain JSON types. Reads every file once, which takes about a second per GB.

        Raises:
            DataError: a file cannot be read.
        """
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(file_digest, [*(file.path for file in self.files), *self.joined]))
        return {"files": digests, "schema": self.schema.to_dict()}

    def columns(self, *roles: str) -> tuple[str, ...]:
        """The columns that have one of these roles; without any, all that a role is given."""
        return tuple(dict.fromkeys(name for name, role in self.schema.roles() if not roles or role in roles))

    def chunks(self, columns: Collection[str]) -> Iterator[Chunk]:
        """These columns (at least one) of all rows that count, in order, in chunks of at most about ``CHUNK_ROWS``.

        Raises:
            DataError: a file is damaged, or a CSV line cannot be read.
        """
        if not self.schema.drop_others:
            yield from self.all_chunks(columns)
            return
        start = 0
        for chunk in self.all_chunks(tuple({*columns, self.schema.domain.column})):
            kept = chunk.within(self.schema.domain, start)
            start += len(kept)
            if len(kept):
                yield kept

    def all_chunks(self, columns: Collection[str]) -> Iterator[Chunk]:
        """As ``chunks``, with the rows that the schema drops."""
        start = 0
        for file in self.files:
            first = 0
            for table in _gathered(file.batches(columns)):
                yield Chunk(table, file, first, start)
                first += table.num_rows
                start += table.num_rows

    def count_rows(self) -> int:
        """The rows that count: Parquet files say it, CSV files and files with rows to drop are read.

        Raises:
            DataError: as ``chunks``.
        """
        if not self.schema.drop_others and all(file.rows is not None for file in self.files):
            return sum(file.rows for file in self.files)
        column = self.columns("labels")[:1]
        return sum(map(len, self.chunks(column)))


def find(kind: Format, place: str, schema: str | None) -> TabularLog:
    """The log in the files at ``place``, described by the YAML file ``schema``.

    Raises:
        DataError: no such files, one that cannot be read, a wrong schema, or columns that do not fit it.
    """
    path = Path(os.path.expanduser(place))
    paths = _list(kind, path)
    if schema is None:
        columns = _listed(_open(kind, paths[0], None).types)
        raise DataError(f"{path}: say what its columns are for with --schema FILE.yaml (docs/data.md); {columns}")
    described = read_schema(Path(os.path.expanduser(schema)))
    files = tuple(_open(kind, file, described) for file in paths)
    log = TabularLog(f"{kind}:{path.resolve().name}", path, files, described)
    for file in files:
        check_columns(log, file)
    if kind == "parquet":
        _check_same(log)
    return log


def _list(kind: Format, path: Path) -> list[Path]:
    found = kind_of(path)
    if found is None:
        raise DataError(f"{path}: no such file or folder; check the path")
    if found == "file":
        return [path]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
    files = [entry for entry in entries if entry.name.endswith(ENDINGS[kind]) and not entry.name.startswith((".", "_"))]
    if not files:
        ending = ENDINGS[kind][0]
        raise DataError(f"{path}: holds no files *{ending} (folders in it are not looked into); check the path")
    return files


def _open(kind: Format, path: Path, schema: LogSchema | None) -> LogFile:
    if kind_of(path) != "file":
        raise DataError(f"{path}: is no file; remove it from the folder, or name a file")
    if kind == "parquet":
        return ParquetFile(path)
    return CsvFile(path, schema.delimiter if schema else ",", _number_columns(schema) if schema else ())


def _number_columns(schema: LogSchema) -> set[str]:
    """The columns of CSV files that are read as numbers: a text that is none is then an error at once."""
    numeric = {*schema.dense, *(rule.column for rule in schema.labels), schema.weight}
    if schema.domain.edges:
        numeric.add(schema.domain.column)
    return numeric - {column.name for column in schema.ids}


def check_columns(log: TabularLog, file: LogFile) -> None:
    """Check that every column is there and of a type that its role can use.

    Raises:
        DataError: one is not.
    """
    schema = log.schema
    for name, role in schema.roles():
        if name not in file.types:
            raise DataError(f"{file.path}: has no column {name} ({role} in the schema); {_listed(file.types)}")
    separators = {column.name: column.separator for column in schema.bags}
    for name, role in schema.roles():
        kind = file.types[name]
        if role == "bags":
            if is_text(kind) and separators[name] is None:
                raise DataError(
                    f"{file.path}, field {name}: holds texts; say what separates their values, as in "
                    f'{{name: {name}, separator: "|"}}'
                )
            fits, wanted = (
                is_list(kind) or is_text(kind) or pa.types.is_null(kind),
                "lists or separated texts",
            )
        elif role == "timestamp":
            fits, wanted = is_time(kind) or is_number(kind) or is_text(kind), "times, numbers or texts"
        elif role in ("ids", "user"):
            fits, wanted = is_text(kind) or is_number(kind) or pa.types.is_date(kind), "texts or numbers"
        else:
            fits, wanted = is_text(kind) or is_number(kind), "texts or numbers"
        if not fits:
            raise DataError(f"{file.path}, field {name}: is of type {kind}, but {role} takes {wanted}; convert it")


def _check_same(log: TabularLog) -> None:
    """A column is the same kind of thing in every file."""
    first = log.files[0]
    for file in log.files[1:]:
        for name in log.columns():
            ours, theirs = file.types[name], first.types[name]
            exact = name == log.schema.timestamp
            if ours != theirs if exact else _family(ours) != _family(theirs):
                raise DataError(
                    f"{file.path}, field {name}: is of type {ours}, but {theirs} in {first.path.name}; write the files "
                    "with one schema"
                )


def _family(kind: pa.DataType) -> str:
    """Types whose values compare as ids: whole numbers become floats where a file has gaps."""
    if is_list(kind):
        return f"lists of {_family(kind.value_type)}"
    return "text" if is_text(kind) else "number" if is_number(kind) else str(kind)


def _gathered(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Batches of few rows joined to about ``CHUNK_ROWS``; none is empty."""
    pending: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        pending.append(batch)
        rows += batch.num_rows
        if rows >= CHUNK_ROWS // 2:
            yield _joined(pending)
            pending, rows = [], 0
    if rows:
        yield _joined(pending)


def _joined(batches: list[pa.RecordBatch]) -> pa.Table:
    table = pa.Table.from_batches(batches)
    return table if len(batches) == 1 else table.unify_dictionaries().combine_chunks()


def _listed(types: dict[str, pa.DataType]) -> str:
    names = list(types)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"its columns are {', '.join(names[:MAX_LISTED])}{more}"


def file_digest(path: Path) -> str:
    """Digest of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.blake2b(digest_size=20)
    try:
        with path.open("rb") as file:
            while block := file.read(DIGEST_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the file") from error
    return digest.hexdigest()
