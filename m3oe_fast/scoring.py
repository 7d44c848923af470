"""Raw rows in Parquet or CSV files -> their scores in one Parquet file, in memory that does not grow with the rows.

Rows keep their order, file after file. A score is a column ``score_<task>``, float32: P(label = 1), with the bits
that ``M3oE.score`` has for the file's rows in a frame.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from m3oe_fast.cli.output import writing
from m3oe_fast.data.log_files import CsvFile, LogFile, ParquetFile
from m3oe_fast.data.prefetch import ahead
from m3oe_fast.data.tabular import ENDINGS
from m3oe_fast.errors import ConfigError, DataError, UserError
from m3oe_fast.model import SCORED_AT_ONCE
from m3oe_fast.models import AnyModel

if TYPE_CHECKING:
    from m3oe_fast.data import Encoder

ROW_GROUP_ROWS = 1 << 16
"""Rows of a row group of the output, at least."""
ALL = ("all",)

Advance = Callable[[int], None]


def open_inputs(path: Path) -> tuple[LogFile, ...]:
    """The Parquet or CSV files at ``path``: itself, or those in the folder, in the order of their names.

    Raises:
        DataError: there is none, there are both kinds, or one cannot be read.
    """
    if path.is_dir():
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
        found = [(entry, _kind(entry)) for entry in entries if not entry.name.startswith((".", "_"))]
        files = [(entry, kind) for entry, kind in found if kind is not None]
        if not files:
            raise DataError(f"{path}: holds no .parquet or .csv files (folders in it are not looked into)")
        if len({kind for _, kind in files}) > 1:
            raise DataError(f"{path}: holds both .parquet and .csv files; score them one by one")
    else:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; check the path")
        if (kind := _kind(path)) is None:
            endings = ", ".join(ending for several in ENDINGS.values() for ending in several)
            raise DataError(f"{path}: neither Parquet nor CSV by its name; call it *{endings}")
        files = [(path, kind)]
    return tuple(ParquetFile(file) if kind == "parquet" else CsvFile(file, ",", ()) for file, kind in files)


def score_files(
    model: AnyModel,
    files: Sequence[LogFile],
    output: Path,
    *,
    keep: Sequence[str] = (),
    batch_size: int = SCORED_AT_ONCE,
    advance: Advance = lambda rows: None,
) -> int:
    """Score every row of ``files`` and write ``output``, which is whole or, after an error, as it was before.

    Args:
        model: with its vocabularies, in ``eval()`` mode, as ``M3oE.load`` returns it for a run.
        files: as ``open_inputs`` returns them, at least one.
        output: the Parquet file to write. One that is there is replaced.
        keep: columns of the input that the output has before the scores; ``ALL`` are all of them. Columns of CSV
            files are texts.
        batch_size: rows encoded and scored at once.
        advance: called now and then with the rows scored since the last call.

    Returns:
        The rows scored.

    Raises:
        ConfigError: the model holds no vocabularies, or a kept column is called as a score.
        DataError: a column is missing or a value malformed; the message names file and row.
        UserError: the output cannot be written.
    """
    if model.encoder is None:
        raise ConfigError(
            "this model holds no vocabularies, so nobody knows what its ids mean; use a run's checkpoint, and for a "
            "member of a form the folder of the whole run"
        )
    jobs = [_Job(file, model.encoder) for file in files]
    schema = _output_schema(files, keep, model.encoder.schema.tasks)
    for job in jobs:
        job.check(schema)
    try:
        with writing(output) as stream:
            return _write(stream, schema, (job.scored(model, schema, batch_size) for job in jobs), advance)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


class _Job:
    """One file, and the columns of it that the encoder reads."""

    def __init__(self, file: LogFile, encoder: Encoder) -> None:
        self._file, self._encoder = file, encoder
        names = ((name, *encoder.aliases.get(name, ())) for name in encoder.columns)
        self._needed = [next((name for name in several if name in file.types), None) for several in names]

    def check(self, schema: pa.Schema) -> None:
        """Raise DataError for a column that is missing."""
        empty = pd.DataFrame({name: pd.Series(dtype=object) for name in self._file.types})
        self._encode(lambda: self._encoder.transform(empty), 0)
        for name in schema.names[: len(schema) - len(self._encoder.schema.tasks)]:
            if name not in self._file.types:
                raise DataError(f"{self._file.path}: has no column {name}, which --keep asks for")

    def scored(self, model: AnyModel, schema: pa.Schema, rows: int) -> Generator[pa.Table, None, None]:
        """The output's rows, at most ``rows`` at a time."""
        tasks = self._encoder.schema.tasks
        kept = schema.names[: len(schema) - len(tasks)]
        first = 0
        for block in ahead(_blocks(self._file.batches(list(dict.fromkeys([*self._needed, *kept]))), rows), 1):
            frame = _frame(block.select(self._needed))
            scores = self._encode(lambda frame=frame: model.score(frame), first)
            columns = [self._cast(block.column(name), schema.field(name)) for name in kept]
            columns += [pa.array(np.ascontiguousarray(scores[:, place])) for place in range(len(tasks))]
            yield pa.table(columns, schema=schema)
            first += len(block)

    def _encode(self, work: Callable[[], np.ndarray], first: int) -> np.ndarray:
        """What ``work`` returns; its errors are about rows of the file, not of a frame that begins at row ``first``."""
        try:
            return work()
        except DataError as error:
            place = re.match(r"frame(?:, row (\d+))?", str(error))
            if place is None:
                raise
            row = f", row {self._file.row_name(first + int(place[1]) - 1)}" if place[1] else ""
            raise DataError(f"{self._file.path}{row}{str(error)[place.end() :]}") from error

    def _cast(self, column: pa.ChunkedArray, field: pa.Field) -> pa.ChunkedArray:
        try:
            return column.cast(field.type)
        except pa.ArrowException as error:
            raise DataError(
                f"{self._file.path}, field {field.name}: is of type {column.type}, and of {field.type} in the first "
                "file; convert it, or leave it out of --keep"
            ) from error


def _kind(path: Path) -> str | None:
    return next((kind for kind, endings in ENDINGS.items() if path.name.endswith(endings)), None)


def _output_schema(files: Sequence[LogFile], keep: Sequence[str], tasks: Sequence[str]) -> pa.Schema:
    types = files[0].types
    names = list(types) if tuple(keep) == ALL else list(dict.fromkeys(keep))
    scores = [f"score_{task}" for task in tasks]
    for name in names:
        if name not in types:
            raise DataError(f"{files[0].path}: has no column {name}, which --keep asks for; it has {', '.join(types)}")
        if name in scores:
            raise ConfigError(f"the column {name} of the input is called as a score; leave it out of --keep")
    return pa.schema([(name, types[name]) for name in names] + [(name, pa.float32()) for name in scores])


def _blocks(batches: Iterable[pa.RecordBatch], rows: int) -> Generator[pa.Table, None, None]:
    """The same rows, ``rows`` at a time; the last block may be short."""
    pending: list[pa.RecordBatch] = []
    missing = rows
    for batch in batches:
        start = 0
        while start < len(batch):
            piece = batch.slice(start, missing)
            pending.append(piece)
            start += len(piece)
            missing -= len(piece)
            if not missing:
                yield pa.Table.from_batches(pending)
                pending, missing = [], rows
    if pending:
        yield pa.Table.from_batches(pending)


def _frame(table: pa.Table) -> pd.DataFrame:
    """Arrow columns as ``Encoder.transform`` takes them; whole numbers stay whole where some are missing."""
    plain = [
        column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
        for column in table.columns
    ]
    series = {
        name: column.to_pandas(types_mapper=_nullable.get) if column.null_count else column.to_pandas()
        for name, column in zip(table.column_names, plain, strict=True)
    }
    return pd.DataFrame(series, index=pd.RangeIndex(len(table)))


_nullable = {
    getattr(pa, name)(): dtype()
    for name, dtype in (
        *((f"int{bits}", getattr(pd, f"Int{bits}Dtype")) for bits in (8, 16, 32, 64)),
        *((f"uint{bits}", getattr(pd, f"UInt{bits}Dtype")) for bits in (8, 16, 32, 64)),
    )
}


def _write(stream: BinaryIO, schema: pa.Schema, parts: Iterable[Iterable[pa.Table]], advance: Advance) -> int:
    total = 0
    pending: list[pa.Table] = []
    with pq.ParquetWriter(stream, schema) as writer:
        for tables in parts:
            for table in tables:
                pending.append(table)
                total += len(table)
                if sum(map(len, pending)) >= ROW_GROUP_ROWS:
                    writer.write_table(pa.concat_tables(pending))
                    pending = []
                advance(len(table))
        if pending:
            writer.write_table(pa.concat_tables(pending))
    return total
