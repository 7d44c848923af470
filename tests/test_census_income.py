"""Census-Income in the format of its publisher: 42 columns, a comma and a blank between them, no header."""

import gzip

import numpy as np
import pytest

from m3oe_fast.data import census_income, load
from m3oe_fast.data.census_income import COLUMNS, DENSE, SCHEMA
from m3oe_fast.errors import DataError

from .log_files import edit

MARITAL = ("Never married", "Married-civilian spouse present", "Divorced")


def make_rows(count, seed):
    """Rows of texts, as between the commas of the file but without the blanks."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        row = {name: f"{name} {rng.integers(3)}" for name in COLUMNS}
        row |= {name: str(rng.integers(90)) for name in DENSE}
        row |= {"birth country": rng.choice(["?", "United-States"]), "industry code": str(rng.integers(52))}
        row |= {"sex": rng.choice(["Female", "Male"]), "marital status": rng.choice(MARITAL)}
        row |= {"instance weight": f"{rng.random() * 1000:.2f}", "income": rng.choice(["- 50000.", "50000+."])}
        rows.append(row)
    return rows


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(", ".join(row[name] for name in COLUMNS) + "\n" for row in rows))


@pytest.fixture
def rows():
    return {"data": make_rows(300, 0), "test": make_rows(200, 1)}


@pytest.fixture
def folder(tmp_path, rows):
    for ending, part in rows.items():
        write(tmp_path / "files" / f"census-income.{ending}", part)
    return tmp_path / "files"


def prepare(tmp_path, folder, **options):
    return load("census-income", str(folder), cache_dir=str(tmp_path / "cache"), **options)


def refused(tmp_path, folder, message, **options):
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, folder, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_42_columns_of_which_39_are_features():
    assert len(COLUMNS) == len(set(COLUMNS)) == 42
    features = {column.name for column in SCHEMA.ids} | set(SCHEMA.dense) | {SCHEMA.domain.column}
    assert set(COLUMNS) - features == {"marital status", "income", "instance weight"}


def test_rows_under_the_official_split(tmp_path, folder, rows):
    data = prepare(tmp_path, folder, split="official")
    assert (len(data.train), len(data.val) + len(data.test)) == (300, 200)
    assert min(len(data.val), len(data.test)) > 70
    assert data.schema.tasks == ("income", "never_married")
    assert data.schema.domains == ("Female", "Male")
    batch = data.train.take(np.arange(300))
    part = rows["data"]
    wanted = [[row["income"] == "50000+.", row["marital status"] == "Never married"] for row in part]
    assert batch.label.tolist() == wanted
    assert batch.domain.tolist() == [int(row["sex"] == "Male") for row in part]
    age = np.array([int(row["age"]) for row in part])
    assert np.allclose(batch.dense[:, DENSE.index("age")], (age - age.min()) / (age.max() - age.min()))
    field = data.schema.fields.index("birth country")
    texts = data.encoder.vocabularies["birth country"]
    assert [texts[code - 1] for code in batch.ids[:, field]] == [row["birth country"] for row in part]


def test_packed_files_and_files_in_a_folder_give_the_same_rows(tmp_path, folder):
    packed = tmp_path / "packed" / "census"
    packed.mkdir(parents=True)
    for file in folder.iterdir():
        with gzip.open(packed / f"{file.name}.gz", "wb") as target:
            target.write(file.read_bytes())
    plain, other = (prepare(tmp_path, path) for path in (folder, tmp_path / "packed"))
    for name in ("train", "val", "test"):
        ours, theirs = getattr(plain, name), getattr(other, name)
        rows = np.arange(len(ours))
        assert len(theirs) == len(ours)
        assert np.array_equal(ours.take(rows).ids, theirs.take(rows).ids)
        assert np.array_equal(ours.take(rows).label, theirs.take(rows).label)


def test_raw_rows_are_encoded_as_prepared_ones(tmp_path, folder, rows):
    import pandas as pd

    data = prepare(tmp_path, folder, split="official")
    encoded = data.encoder.transform(pd.DataFrame(rows["data"]))
    stored = data.train.take(np.arange(300))
    assert np.array_equal(encoded.ids, stored.ids)
    assert np.array_equal(encoded.dense, stored.dense)
    assert np.array_equal(encoded.domain, stored.domain)


def test_nothing_there(tmp_path, folder):
    with pytest.raises(
        DataError, match=r"census-income needs --data_path: .*fetch census-income.data and .*archive.ics"
    ):
        load("census-income", cache_dir=str(tmp_path / "cache"))
    refused(tmp_path, tmp_path / "gone", "gone: no such file or folder")
    (folder / "census-income.test").unlink()
    refused(tmp_path, folder, r"files: lacks census-income.test, packed as .gz or not; fetch it from")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", - 50000.", "", r"census-income.data, row 1: 41 columns where 42 are expected"),
        (" - 50000.", " -50000", r"row \d+, field income: '-50000' is not one of '- 50000.' and '50000\+.'; fetch"),
        (", Female,", ", F,", r"row \d+, field sex: 'F' is in no domain \(Female, Male\)"),
    ],
)
def test_faults_name_file_row_and_remedy(tmp_path, folder, rows, old, new, message):
    rows["data"][0] |= {"income": "- 50000.", "sex": "Female"}
    write(folder / "census-income.data", rows["data"])
    edit(folder / "census-income.data", old, new)
    refused(tmp_path, folder, message)


@pytest.mark.parametrize("value", ["old", "", "nan"])
def test_bad_numbers(tmp_path, folder, rows, value):
    rows["data"][6]["age"] = value
    write(folder / "census-income.data", rows["data"])
    refused(tmp_path, folder, "census-income.data, row 7, field age: ('old' is not a number|nan is no finite number)")


def test_empty_and_binary_files(tmp_path, folder):
    for content, message in ((b"", "is empty"), (b"\xff\xfe" * 500, "columns where 42|not UTF-8")):
        (folder / "census-income.test").write_bytes(content)
        refused(tmp_path, folder, f"census-income.test.*: .*({message})")


def test_splits_that_need_what_the_log_lacks(tmp_path, folder):
    refused(tmp_path, folder, "split user needs a user", split="user")
    refused(tmp_path, folder, "split temporal needs a timestamp", split="temporal")


def test_labels_alone(folder):
    file = census_income.find(str(folder)).files[0]
    batch = next(file.batches(["never married"]))
    assert batch.schema.names == ["never married"]
    assert batch.num_rows == 300
