"""Census-Income (KDD): persons of the US census surveys of 1994 and 1995, the usual small multi-task data set.

The publisher gives ``census-income.data`` (199,523 rows) and ``census-income.test`` (99,762), here also packed as
``.gz``: 42 columns without header, separated by a comma and a blank. As the papers on multi-task ranking do, the tasks
are income above 50,000 dollars and never married, the instance weight is left out, and numbers are dense. The domain
is the sex: the publisher knows no domains, and of its columns this one divides the rows evenly with tasks alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from m3oe_fast.data.archive import Archive
from m3oe_fast.data.catalogue import CATALOGUE
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.log_files import TOKEN, CsvFile
from m3oe_fast.data.log_schema import IdColumn, LogSchema
from m3oe_fast.data.tabular import TabularLog
from m3oe_fast.errors import DataError

NAME = "census-income"
FILES = ("census-income.data", "census-income.test")
COLUMNS = (
    *("age", "class of worker", "industry code", "occupation code", "education", "wage per hour"),
    *("enrolled in education", "marital status", "major industry", "major occupation", "race", "hispanic origin"),
    *("sex", "labor union", "reason for unemployment", "employment", "capital gains", "capital losses", "dividends"),
    *("tax filer status", "previous region", "previous state", "household and family", "household summary"),
    *("instance weight", "migration msa", "migration region", "migration within region", "same house a year ago"),
    *("migration sunbelt", "persons worked for", "family members under 18", "birth country of father"),
    *("birth country of mother", "birth country", "citizenship", "own business", "veterans questionnaire"),
    *("veterans benefits", "weeks worked", "year", "income"),
)
DENSE = ("age", "wage per hour", "capital gains", "capital losses", "dividends", "persons worked for", "weeks worked")
DOMAIN = DomainRule("sex", texts=("Female", "Male"))
INCOMES = ("- 50000.", "50000+.")
NEVER_MARRIED = "Never married"
LABELS = {"income": "income above 50000", "never_married": "never married"}  # task -> our column of 0 and 1
_IDS = tuple(
    name for name in COLUMNS if name not in (*DENSE, DOMAIN.column, "marital status", "income", "instance weight")
)
SCHEMA = LogSchema(
    ids=tuple(map(IdColumn, _IDS)),
    bags=(),
    dense=DENSE,
    domain=DOMAIN,
    labels=tuple(LabelRule(task, column) for task, column in LABELS.items()),
)


def find(data_path: str) -> TabularLog:
    """The log in the folder ``data_path``, or in folders of it.

    Raises:
        DataError: no such folder, or a file is missing or no text.
    """
    folder = Archive(data_path)
    if not folder.is_folder:
        raise DataError(f"{folder.path}: is no folder; name the folder that holds {' and '.join(FILES)}")
    files = []
    for name in FILES:
        found = folder.find(name) or folder.find(f"{name}.gz")
        if found is None:
            raise DataError(f"{folder.path}: lacks {name}, packed as .gz or not; fetch it from {CATALOGUE[NAME].page}")
        files.append(CensusFile(folder.path / found))
    return TabularLog(NAME, folder.path, tuple(files), SCHEMA, given_test=(files[1],))


class CensusFile:
    """A ``LogFile``: the publisher's columns without the blanks around texts, and the labels as 0 and 1.

    Raises:
        DataError: the file cannot be read, or its first row has not 42 columns.
    """

    rows: int | None = None

    def __init__(self, path: Path) -> None:
        self._text = CsvFile(path, ",", DENSE, names=COLUMNS)
        self.path = path
        self.types = {**self._text.types, **dict.fromkeys(LABELS.values(), pa.int8())}

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """As ``LogFile.batches``.

        Raises:
            DataError: a row has not 42 columns, a number is none, an income is not one of ``INCOMES``.
        """
        needed = {_SOURCES.get(name, name) for name in columns}
        first = 0
        for batch in self._text.batches(sorted(needed)):
            arrays = {name: _trimmed(batch.column(name)) for name in needed}
            if "income" in needed:
                self._check_income(arrays["income"], first)
                arrays[LABELS["income"]] = pc.equal(arrays["income"], INCOMES[1]).cast(pa.int8())
            if "marital status" in needed:
                arrays[LABELS["never_married"]] = pc.equal(arrays["marital status"], NEVER_MARRIED).cast(pa.int8())
            yield pa.record_batch({name: arrays[name] for name in columns})
            first += batch.num_rows

    def row_name(self, row: int) -> str:
        """As ``LogFile.row_name``."""
        return self._text.row_name(row)

    def _check_income(self, income: pa.Array, first: int) -> None:
        known = pc.is_in(income, pa.array(INCOMES)).to_numpy(zero_copy_only=False)
        if not known.all():
            row = int(np.argmin(known))
            raise DataError(
                f"{self.path}, row {self.row_name(first + row)}, field income: {income[row].as_py()!r} is not one of "
                f"{' and '.join(map(repr, INCOMES))}; fetch the file again"
            )


_SOURCES = {LABELS["income"]: "income", LABELS["never_married"]: "marital status"}


def _trimmed(column: pa.Array) -> pa.Array:
    return pc.utf8_trim(column, " ") if column.type == TOKEN else column
