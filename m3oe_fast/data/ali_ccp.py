r"""Ali-CCP (Alibaba Click and Conversion Prediction): skeleton rows joined with the common features of their users.

The publisher gives two files for training and two for testing, without header:

    sample_skeleton_{train,test}.csv   sample_id,click,buy,md5,n,features    about 42 and 43 million rows
    common_features_{train,test}.csv   md5,n,features                        about 730,000 rows

``features`` is n times ``field \x02 id \x03 value``, joined by \x01; ``md5`` names the row of the common file whose
features the skeleton row has as well. As other published work does, this reader keeps 23 fields and the values of 8,
drops rows bought without a click, takes the place of the display (301) as domain and knows ids seen 10 times or more.

The common file is read once into arrays: 8 bytes or less a value, only of these fields. The skeleton streams by.
Nothing goes row by row in Python.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from m3oe_fast.data.archive import Archive
from m3oe_fast.data.catalogue import CATALOGUE
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.feature_columns import Columns, FieldNames, Places, fill_in, fold, stack, to_arrow, value_name
from m3oe_fast.data.feature_lines import Lines, read_lines
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.log_schema import BagColumn, IdColumn, LogSchema
from m3oe_fast.data.tabular import TabularLog
from m3oe_fast.data.unpack import unpack
from m3oe_fast.errors import DataError

NAME = "ali-ccp"
PARTS = ("train", "test")
DOMAIN = "301"
IDS = (
    *("101", "121", "122", "124", "125", "126", "127", "128", "129"),  # the user
    *("205", "206", "207", "216"),  # the item: itself, category, shop, brand
    *("508", "509", "702", "853"),  # the user's past with category, shop, brand and intention of this item
)
BAGS = ("210", "109_14", "110_14", "127_14", "150_14")  # intentions; categories, shops, brands, intentions of the past
VALUED = ("109_14", "110_14", "127_14", "150_14", "508", "509", "702", "853")
BAG_VALUES = 8  # of a bag in a row; some users have hundreds, which would make hundreds of GB of 85 million rows
MIN_COUNT = 10
SKELETON = ("sample_id", "click", "purchase", "md5", "n", "features")
COMMON = ("md5", "n", "features")
SCHEMA = LogSchema(
    ids=tuple(IdColumn(name, min_count=MIN_COUNT) for name in IDS),
    bags=tuple(BagColumn(name, min_count=MIN_COUNT) for name in BAGS),
    dense=tuple(map(value_name, VALUED)),
    domain=DomainRule(DOMAIN),
    labels=(LabelRule("click", "click"), LabelRule("purchase", "purchase")),
    user="101",
)
FIELDS = FieldNames((*IDS, DOMAIN), BAGS, VALUED, BAG_VALUES)
TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(FIELDS.single, pa.int32()),
    **dict.fromkeys(BAGS, pa.list_(pa.int32())),
    **dict.fromkeys(SCHEMA.dense, pa.float64()),
    **dict.fromkeys(("click", "purchase"), pa.int64()),
}


def find(data_path: str, cache: Path) -> TabularLog:
    """The log in the folder ``data_path``: the four csv files, or the two archives, in it or in folders of it.

    Archives are unpacked into ``cache``, once.

    Raises:
        DataError: no such folder, a file is missing or damaged, or the cache cannot be written.
    """
    folder = Archive(data_path)
    if not folder.is_folder:
        raise DataError(f"{folder.path}: is no folder; name the folder that holds the files of {NAME}")
    pairs = [_find_pair(folder, part, cache) for part in PARTS]
    files = tuple(JoinedFile(skeleton, common) for skeleton, common in pairs)
    joined = tuple(common for _, common in pairs)
    return TabularLog(NAME, folder.path, files, SCHEMA, joined, given_test=files[1:])


def _find_pair(folder: Archive, part: str, cache: Path) -> tuple[Path, Path]:
    """The skeleton file and the common file of "train" or "test"."""
    names = (f"sample_skeleton_{part}.csv", f"common_features_{part}.csv")
    skeleton, common = (folder.find(name) for name in names)
    if skeleton is not None and common is not None:
        return folder.path / skeleton, folder.path / common
    archive = folder.find(f"sample_{part}.tar.gz")
    if archive is None:
        lacking = names[0] if skeleton is None else names[1]
        published = CATALOGUE[NAME]
        raise DataError(
            f"{folder.path}: lacks {lacking}, or sample_{part}.tar.gz with it; fetch {published.file_names} from "
            f"{published.page} ({published.why_by_hand})"
        )
    place = cache / f"{NAME}-files-{folder.digest([archive])}"
    unpack(folder.path / archive, names, place)
    return place / names[0], place / names[1]


class JoinedFile:
    """A ``LogFile``: a skeleton file, each row with the features of its row in the common file.

    A field that a skeleton row has itself is taken from there. Where a row has none, an id is null, a bag empty and a
    value 0. Rows with a purchase but no click are left out; ``row_name`` counts lines of the skeleton file.
    """

    rows: int | None = None

    def __init__(self, skeleton: Path, common: Path) -> None:
        self.path, self.types = skeleton, dict(TYPES)
        self._common_path = common
        self._skipped = np.empty(0, np.int64)  # for each row left out, how many rows before it were kept

    def batches(self, columns: Collection[str]) -> Iterator[pa.RecordBatch]:
        """As ``LogFile.batches``.

        Raises:
            DataError: a line of either file cannot be read, or a row has no common features.
        """
        self._skipped = np.empty(0, np.int64)
        kept_before = 0
        for lines in read_lines(self.path, SKELETON):
            arrays = {name: lines.whole(name) for name in ("click", "purchase")}
            kept = (arrays["click"] != 0) | (arrays["purchase"] != 1)
            before = kept_before + np.cumsum(kept)
            self._skipped = np.append(self._skipped, before[~kept])
            kept_before = int(before[-1])
            if not arrays.keys() >= set(columns):
                arrays |= self._features(lines)
            yield pa.record_batch({name: to_arrow(arrays[name][kept]) for name in columns})

    def row_name(self, row: int) -> str:
        """As ``LogFile.row_name``."""
        return str(row + 1 + int(np.searchsorted(self._skipped, row, side="right")))

    def _features(self, lines: Lines) -> Columns:
        columns = fold(lines, FIELDS)
        common, places = self._common
        place = places.of(lines.keys("md5"))
        unknown = place < 0
        if unknown.any():
            fault = f"{self._common_path} has no such row; fetch both files again, from one archive"
            raise lines.error(int(np.argmax(unknown)), "md5", fault)
        fill_in(columns, common, place)
        return columns

    @cached_property
    def _common(self) -> tuple[Columns, Places]:
        keys, blocks = [], []
        for lines in read_lines(self._common_path, COMMON):
            keys.append(lines.keys("md5"))
            blocks.append(fold(lines, FIELDS))
        return stack(blocks), Places(np.concatenate(keys))
