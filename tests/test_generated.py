"""The generated log: the same rows every time, whatever the length, and something to learn in them."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from bench import generated
from m3oe_fast.data import load


def read(folder):
    return pq.read_table(sorted(folder.glob("*.parquet"))).to_pandas() if folder.exists() else None


def test_rows_are_reproducible_and_a_longer_log_begins_alike(tmp_path):
    for name, rows in (("a", 3000), ("b", 3000), ("c", 5000)):
        generated.write(tmp_path / name, rows, users=500, items=100, block_rows=700)
    one, two, longer = (read(tmp_path / name) for name in "abc")
    assert one.equals(two)
    assert longer[:3000].equals(one)
    assert (len(one), len(longer)) == (3000, 5000)


def test_files_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(generated, "FILE_BLOCKS", 2)
    generated.write(tmp_path / "a", 1000, users=50, items=20, block_rows=300)
    files = [pq.ParquetFile(path) for path in sorted((tmp_path / "a").glob("*.parquet"))]
    assert [[f.metadata.row_group(g).num_rows for g in range(f.num_row_groups)] for f in files] == [
        [300, 300],
        [300, 100],
    ]


@pytest.mark.parametrize("bags", [True, False])
def test_it_is_prepared_as_it_says(tmp_path, bags):
    schema = generated.write(tmp_path / "log", 20_000, users=1000, items=300, bags=bags)
    data = load(f"parquet:{tmp_path / 'log'}", schema=str(schema), cache_dir=str(tmp_path / "cache"), split="temporal")
    assert len(data.schema.fields) == 9
    assert (data.schema.dense, data.schema.bags) == (("item_age_days",), ("tags",) if bags else ())
    assert data.schema.domains == ("home", "live", "search")
    assert data.schema.tasks == ("click", "long_view")
    assert data.warnings == ()
    share = np.nanmean(data.train.label, axis=0)
    assert 0.1 < share[1] < share[0] < 0.6
    assert data.counts["train"]["users"] > 500


def test_command(tmp_path, capsys):
    assert generated.main(["--rows", "100", "--out", str(tmp_path / "log"), "--no_bags"]) == 0
    assert f"parquet:{tmp_path / 'log'} --schema {tmp_path / 'log' / 'schema.yaml'}" in capsys.readouterr().out
    assert "tags" not in read(tmp_path / "log")
