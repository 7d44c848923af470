"""Ali-CCP: skeleton and common features joined as a plain dictionary would, whatever the block size; faults by row."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from m3oe_fast.data import ali_ccp, feature_lines, load
from m3oe_fast.data.ali_ccp import BAG_VALUES, BAGS, SCHEMA, VALUED, JoinedFile
from m3oe_fast.data.unpack import unpack
from m3oe_fast.errors import DataError

from .ali_ccp_files import DOMAINS, make_part, write_archive, write_part, written

SINGLE = (*ali_ccp.IDS, "301")


@pytest.fixture(scope="module")
def parts():
    return {"train": make_part(600, 20, 0), "test": make_part(400, 15, 1)}


@pytest.fixture
def folder(tmp_path, parts):
    for name, part in parts.items():
        write_part(tmp_path / "files", name, part)
    return tmp_path / "files"


def expected(part):
    """The rows of a part, joined one by one."""
    for click, buy, key, own in part.rows:
        if buy and not click:
            continue
        row = {"click": click, "purchase": buy}
        for name in (*SINGLE, *BAGS):
            found = [(code, float(value)) for field, code, value in own if field == name]
            found = found or [(code, float(value)) for field, code, value in part.common[key] if field == name]
            if name in BAGS:
                row[name] = [code for code, _ in sorted(found, key=lambda pair: -pair[1])[:BAG_VALUES]]
                value = sum(value for _, value in found) / max(len(found), 1)
            else:
                row[name], value = found[0] if found else (None, 0.0)
            if name in VALUED:
                row[f"D{name}"] = pytest.approx(value, rel=1e-12)
        yield row


def joined(folder, part):
    return JoinedFile(folder / f"sample_skeleton_{part}.csv", folder / f"common_features_{part}.csv")


def prepare(tmp_path, folder, **options):
    return load("ali-ccp", str(folder), cache_dir=str(tmp_path / "cache"), **options)


def refused(tmp_path, folder, message, **options):
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path, folder, **options)
    assert "\n" not in str(caught.value)
    left = [path.name for path in (tmp_path / "cache").iterdir()] if (tmp_path / "cache").exists() else []
    assert not [name for name in left if not name.startswith("ali-ccp-files-")]


@pytest.mark.parametrize("block", [100, 5000, 1 << 22])
def test_rows_are_those_of_a_plain_join(folder, parts, monkeypatch, block):
    monkeypatch.setattr(feature_lines, "BLOCK_BYTES", block)
    file = joined(folder, "train")
    rows = [row for batch in file.batches(list(file.types)) for row in batch.to_pylist()]
    assert rows == list(expected(parts["train"]))
    assert any(len(row["109_14"]) == BAG_VALUES for row in rows)


def test_columns_may_be_asked_for_and_have_the_stated_types(folder):
    file = joined(folder, "train")
    for columns in (["click"], ["301", "109_14"], ["D508", "purchase", "101"]):
        batch = next(file.batches(columns))
        assert batch.schema == pa.schema([(name, file.types[name]) for name in columns])
    assert {name for name, _ in SCHEMA.roles()} == set(file.types)


def test_labels_alone_need_no_common_file(folder, parts):
    (folder / "common_features_train.csv").unlink()
    rows = sum(batch.num_rows for batch in joined(folder, "train").batches(["click"]))
    assert rows == sum(1 for click, buy, *_ in parts["train"].rows if click or not buy)


def test_common_file_is_read_once(folder):
    file = joined(folder, "train")
    first = [batch.to_pylist() for batch in file.batches(["101"])]
    (folder / "common_features_train.csv").unlink()
    assert [batch.to_pylist() for batch in file.batches(["101"])] == first


@pytest.mark.parametrize("block", [300, 1 << 22])
def test_rows_are_counted_as_lines_of_the_skeleton(folder, parts, monkeypatch, block):
    monkeypatch.setattr(feature_lines, "BLOCK_BYTES", block)
    file = joined(folder, "train")
    for _ in range(2):
        kept = sum(batch.num_rows for batch in file.batches(["click"]))
    lines = [number for number, (click, buy, *_) in enumerate(parts["train"].rows, 1) if click or not buy]
    assert kept == len(lines) < len(parts["train"].rows)
    assert [int(file.row_name(row)) for row in range(kept)] == lines


def test_the_last_of_equal_keys_counts_and_the_skeleton_before_the_common_file(tmp_path):
    part = make_part(1, 1, 0)
    key = next(iter(part.common))
    part.rows = [(1, 0, key, [("301", DOMAINS[0], "1.0"), ("101", 7, "1.0"), ("508", 1, "0.5"), ("508", 2, "1.5")])]
    write_part(tmp_path, "train", part)
    with (tmp_path / "common_features_train.csv").open("a") as file:
        file.write(f"{key},{written([('101', 8, '1.0'), ('121', 9, '1.0')])}\n{'f' * 40},0,\n")
    row = next(joined(tmp_path, "train").batches(["101", "121", "122", "508", "D508", "110_14"])).to_pylist()
    assert row == [{"101": 7, "121": 9, "122": None, "508": 1, "D508": 0.5, "110_14": []}]


def test_official_split_trains_on_the_given_file_and_halves_the_test_file(tmp_path, folder, parts):
    data = prepare(tmp_path, folder, split="official")
    kept = {name: list(expected(part)) for name, part in parts.items()}
    assert len(data.train) == len(kept["train"])
    assert len(data.val) + len(data.test) == len(kept["test"])
    assert 0.4 < len(data.val) / len(kept["test"]) < 0.6
    other = prepare(tmp_path, folder, split="official", split_seed=1)
    assert (len(other.val) + len(other.test), len(other.train)) == (len(kept["test"]), len(kept["train"]))
    labels = [np.sort(part.take(np.arange(len(part))).label.numpy(), 0) for part in (data.val, other.val)]
    assert len(data.val) != len(other.val) or not np.array_equal(*labels)


def test_prepared_rows(tmp_path, folder, parts):
    data = prepare(tmp_path, folder, split="official")
    rows = list(expected(parts["train"]))
    assert data.schema.fields == (*ali_ccp.IDS, "domain")
    assert data.schema.bags == BAGS
    assert data.schema.dense == tuple(f"D{name}" for name in VALUED)
    assert data.schema.tasks == ("click", "purchase")
    assert data.schema.domains == tuple(map(str, DOMAINS))
    batch = data.train.take(np.arange(len(rows)))
    assert batch.label.tolist() == [[row["click"], row["purchase"]] for row in rows]
    assert batch.domain.tolist() == [DOMAINS.index(row["301"]) for row in rows]
    seen = [row["205"] for row in rows if row["205"] is not None]
    known = sorted(code for code in set(seen) if seen.count(code) >= ali_ccp.MIN_COUNT)
    assert 0 < len(known) < len(set(seen))
    wanted = [known.index(row["205"]) + 1 if row["205"] in known else 0 for row in rows]
    assert batch.ids[:, ali_ccp.IDS.index("205")].tolist() == wanted
    values, offsets = batch.bags[BAGS.index("127_14")]
    assert np.diff(np.append(offsets, len(values))).tolist()[: len(rows)] == [len(row["127_14"]) for row in rows]


def test_user_split_goes_by_field_101(tmp_path, folder):
    data = prepare(tmp_path, folder, split="user")
    users = [set(part.take(np.arange(len(part))).ids[:, 0].tolist()) for part in (data.train, data.val)]
    assert users[1] <= {0}, "users of val are unknown to the vocabulary of train"
    assert len(users[0]) > 5


def test_archives_are_unpacked_once_and_give_the_same_rows(tmp_path, folder):
    plain = prepare(tmp_path, folder)
    packed = tmp_path / "packed" / "in"
    for part in ("train", "test"):
        write_archive(packed / f"sample_{part}.tar.gz", folder, part)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in packed.iterdir())
    assert prepare(tmp_path, packed.parent).folder == plain.folder
    unpacked = sorted((tmp_path / "cache").glob("ali-ccp-files-*/*.csv"), key=lambda path: path.name)
    assert [path.name for path in unpacked] == sorted(path.name for path in folder.iterdir())
    times = [path.stat().st_mtime_ns for path in unpacked]
    unpacked[0].unlink()
    prepare(tmp_path, packed)
    assert [path.stat().st_mtime_ns for path in unpacked][1:] == times[1:]
    assert sorted((path.name, path.stat().st_mtime_ns) for path in packed.iterdir()) == before


def test_csv_files_may_lie_in_folders_beside_an_archive(tmp_path, folder):
    mixed = tmp_path / "mixed"
    write_archive(mixed / "sample_test.tar.gz", folder, "test")
    (mixed / "sample_train").mkdir()
    for file in folder.glob("*_train.csv"):
        shutil.copy(file, mixed / "sample_train")
    assert prepare(tmp_path, mixed).folder == prepare(tmp_path, folder).folder


def test_nothing_there(tmp_path, folder):
    with pytest.raises(DataError, match=r"ali-ccp needs --data_path.*sample_train.tar.gz.*tianchi"):
        load("ali-ccp", cache_dir=str(tmp_path / "cache"))
    refused(tmp_path, tmp_path / "gone", "gone: no such file or folder")
    refused(tmp_path, folder / "sample_skeleton_train.csv", "not an intact zip")
    (folder / "common_features_test.csv").unlink()
    refused(
        tmp_path, folder, r"lacks common_features_test.csv, or sample_test.tar.gz.*fetch sample_train.*tianchi.*login"
    )
    refused(tmp_path, folder, "needs a timestamp|lacks", split="temporal")


FAULTS = {
    "cut line": (lambda text: text[:-30], r"row \d+, field (n|features): "),
    "lost columns": (lambda text: text.replace("5,", "5;", 1), "row 5: 5 columns where 6 are expected"),
    "wrong count": (lambda text: "\n".join(_count(text.split("\n"), 3)), r"row 3, field n: says 99 features, \d+ fol"),
    "unknown key": (lambda text: "\n".join(_key(text.split("\n"), 4)), "row 4, field md5: .*common_features_train.csv"),
    "bad value": (lambda text: text.replace("\x03", "\x03x", 1000), "row 1, field features: 'x.*' is no number"),
    "bad id": (lambda text: text.replace("205\x024", "205\x02-4", 1), r"row \d+, field features: '-4.*' is no number"),
    "great id": (lambda text: text.replace("205\x02", "205\x0299999", 1), r"row \d+, field features: '99999"),
    "bad click": (lambda text: text.replace("1,0,0,", "1,2,0,", 1), r"row \d+, field click: label click is 2, not 0"),
    "no domain": (lambda text: text.replace("301\x02", "302\x02", 1), "row 1, field 301: None is in no domain"),
    "empty": (lambda text: "", "sample_skeleton_train.csv: is empty; fetch"),
    "binary": (lambda text: "\x00\x01\x02" * 1000, "row 1: 1 columns where 6"),
    "empty line": (lambda text: text.replace("\n", "\n\n", 1), "row 2: 1 columns where 6"),
}


def _count(lines, row):
    columns = lines[row - 1].split(",")
    return [*lines[: row - 1], ",".join([*columns[:4], "99", columns[5]]), *lines[row:]]


def _key(lines, row):
    columns = lines[row - 1].split(",")
    return [*lines[: row - 1], ",".join([*columns[:3], "0" * 16, *columns[4:]]), *lines[row:]]


def change_text(path, change):
    before = path.read_bytes().decode()
    after = change(before)
    assert after != before
    path.write_bytes(after.encode())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_name_file_row_and_remedy(tmp_path, folder, fault):
    change, message = FAULTS[fault]
    change_text(folder / "sample_skeleton_train.csv", change)
    refused(tmp_path, folder, message)


def test_faults_in_the_common_file(tmp_path, folder):
    change_text(folder / "common_features_test.csv", lambda text: text.replace("\x02", "\x01", 1))
    refused(
        tmp_path, folder, r"common_features_test.csv, row 1, field features: a feature is not field\\x02id\\x03value"
    )


def test_a_cache_that_cannot_be_written(tmp_path, folder):
    for part in ("train", "test"):
        write_archive(tmp_path / "packed" / f"sample_{part}.tar.gz", folder, part)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"cannot be written: .*free 1 MB there, or choose another --cache_dir"):
        load("ali-ccp", str(tmp_path / "packed"), cache_dir=str(tmp_path / "file"))


def test_unpacking_that_was_stopped_is_gone_on_with(tmp_path, folder, monkeypatch):
    archive, place = tmp_path / "sample_train.tar.gz", tmp_path / "place"
    write_archive(archive, folder, "train")
    names = ("sample_skeleton_train.csv", "common_features_train.csv")
    copy = shutil.copyfileobj

    def stopped(source, target, length):
        copy(source, target, length)
        if len(list(place.iterdir())) == 2:  # the second file, not renamed yet
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(shutil, "copyfileobj", stopped)
        with pytest.raises(KeyboardInterrupt):
            unpack(archive, names, place)
    assert [path.name for path in place.iterdir()] == [names[1]]
    time = (place / names[1]).stat().st_mtime_ns
    unpack(archive, names, place)
    assert all((place / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert (place / names[1]).stat().st_mtime_ns == time


def test_damaged_archives(tmp_path, folder):
    packed = tmp_path / "packed"
    for part in ("train", "test"):
        write_archive(packed / f"sample_{part}.tar.gz", folder, part)
    path = packed / "sample_test.tar.gz"
    data = path.read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"no archive", data[:2000] + bytes(200) + data[2200:]):
        path.write_bytes(damaged)
        refused(tmp_path, packed, "sample_test.tar.gz: (is damaged .*|lacks .*); fetch the file again")
    write_archive(path, folder, "train")
    refused(tmp_path, packed, "sample_test.tar.gz: lacks common_features_test.csv, sample_skeleton_test.csv; fetch")
    left = list((tmp_path / "cache").rglob("*_test.csv*"))
    assert left == [], "nothing half-unpacked stays"


def test_data_path_is_only_read(tmp_path, folder):
    before = {path: path.read_bytes() for path in Path(folder).iterdir()}
    prepare(tmp_path, folder)
    assert {path: path.read_bytes() for path in Path(folder).iterdir()} == before
