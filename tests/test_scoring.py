"""Scoring files: the bits of ``M3oE.score``, kept columns, files that cannot be scored."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from m3oe_fast import M3oE, M3oEConfig
from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.encode import Encoder
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.scoring import ALL, open_inputs, score_files

from .small_run import ITEMS, USERS, raw_rows


@pytest.fixture(scope="module", params=["cpu", "reference"])
def model(request):
    """An untrained model whose weights differ enough for every score to be its own."""
    rng = np.random.default_rng(3)
    rows = 200
    tokens = {
        name: Tokens(rng.integers(0, size, rows, np.int32), [str(value) for value in range(size)])
        for name, size in (("user_id", USERS), ("item_id", ITEMS))
    }
    rule = DomainRule("age", edges=(25.0, 35.0))
    age = rng.uniform(15, 60, rows)
    log = RawLog(
        "log",
        tokens,
        {"timestamp": np.linspace(0, 1500, rows)},
        rule.of_numbers(age),
        rule,
        np.zeros((rows, 2), np.float32),
        (LabelRule("click", "rating", ">", 3.0), LabelRule("like", "rating", ">", 4.0)),
    )
    encoder = Encoder.fit(log, np.arange(rows))
    schema = encoder.schema
    config = M3oEConfig(
        schema.vocab_sizes,
        1,
        3,
        2,
        shared_experts=2,
        embed_dim=4,
        star_dim=8,
        hidden_dim=8,
        expert_dims=(4,),
        tower_dim=4,
    )
    model = M3oE(config, backend=request.param)
    model.encoder = encoder
    with np.errstate(all="ignore"):
        model.embedding.data.normal_()
    return model.eval()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def score(model, source, **options):
    """The output's content."""
    count = score_files(model, open_inputs(Path(source)), Path("out.parquet"), **options)
    table = pq.read_table("out.parquet")
    assert len(table) == count
    return table


def scores_of(table):
    return np.stack([table[f"score_{task}"].to_numpy() for task in ("click", "like")], 1)


def test_scores_have_the_bits_of_model_score(model):
    frame = raw_rows(1000)
    frame.to_parquet("in.parquet", row_group_size=300)
    table = score(model, "in.parquet")
    assert table.schema == pa.schema([("score_click", pa.float32()), ("score_like", pa.float32())])
    expected = model.score(frame)
    assert len(np.unique(expected)) > 1000
    assert scores_of(table).tobytes() == expected.tobytes()


def test_more_rows_than_are_scored_at_once(model):
    frame = raw_rows(70_000)
    frame.to_parquet("in.parquet", row_group_size=20_000)
    heard = []
    table = score(model, "in.parquet", keep=["note"], advance=heard.append)
    assert scores_of(table).tobytes() == model.score(frame).tobytes()
    assert table["note"].to_pylist() == list(frame["note"])
    assert heard == [65_536, 70_000 - 65_536]
    groups = pq.ParquetFile("out.parquet").metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == heard


@pytest.mark.parametrize("batch_size", [1, 7, 300, 5000])
def test_any_batch_size_scores_every_row_in_order(model, batch_size):
    frame = raw_rows(40 if batch_size == 1 else 1000)
    frame.to_parquet("in.parquet", row_group_size=300)
    table = score(model, "in.parquet", keep=["note"], batch_size=batch_size)
    np.testing.assert_allclose(scores_of(table), model.score(frame), rtol=1e-5)
    assert table["note"].to_pylist() == list(frame["note"])
    assert pq.ParquetFile("out.parquet").num_row_groups == 1


def test_csv_scores_as_parquet_does(model):
    frame = raw_rows(500)
    frame["note"] = ['a "quoted", one' if row == 3 else "" for row in range(500)]
    frame.to_csv("in.csv", index=False)
    table = score(model, "in.csv", keep=ALL)
    assert scores_of(table).tobytes() == model.score(pd.read_csv("in.csv", dtype=str)).tobytes()
    np.testing.assert_array_equal(scores_of(table), model.score(frame))
    assert table["note"].to_pylist() == list(frame["note"])
    assert table.schema.field("user_id").type == pa.string()


def test_kept_columns_keep_their_types_and_come_first(model):
    frame = raw_rows(50)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.append_column("tags", pa.array([["a", "b"]] * 49 + [None]))
    table = table.append_column("big", pa.array([2**62 + 1, None] * 25))
    table = table.append_column("when", pa.array([1] * 50, pa.timestamp("us")))
    pq.write_table(table, "in.parquet")
    found = score(model, "in.parquet", keep=["when", "big", "tags", "when", "user_id"])
    assert found.column_names == ["when", "big", "tags", "user_id", "score_click", "score_like"]
    for name in ("when", "big", "tags", "user_id"):
        assert found[name].equals(table[name])
    assert score(model, "in.parquet", keep=ALL).column_names == [*table.column_names, "score_click", "score_like"]


def test_whole_numbers_with_gaps_and_categories_are_the_ids_they_spell(model):
    frame = raw_rows(60)
    expected = model.score(frame)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.set_column(1, "item_id", table["item_id"].dictionary_encode())
    gaps = pa.array([None if row == 7 else user for row, user in enumerate(frame["user_id"].tolist())], pa.int64())
    pq.write_table(table.set_column(0, "user_id", gaps), "in.parquet")
    found = scores_of(score(model, "in.parquet"))
    same = np.arange(60) != 7
    assert found[same].tobytes() == expected[same].tobytes()
    unknown = frame.assign(user_id="nobody")
    assert found[7].tobytes() == model.score(unknown)[7].tobytes()


def test_a_folder_is_its_files_in_order_of_their_names(model):
    frame = raw_rows(90)
    Path("in/below").mkdir(parents=True)
    for number, name in enumerate(("b.parquet", "a.parquet", "c.parquet")):
        rows = slice(30 * number, 30 * number + 30)
        frame[rows].assign(note=f"{name}").to_parquet(f"in/{name}")
    Path("in/_SUCCESS").write_text("")
    Path("in/.a.parquet.crc").write_text("x")
    Path("in/readme.txt").write_text("x")
    table = score(model, "in", keep=["note"])
    assert table["note"].to_pylist() == ["a.parquet"] * 30 + ["b.parquet"] * 30 + ["c.parquet"] * 30
    assert scores_of(table)[30:60].tobytes() == model.score(frame[:30]).tobytes()


def test_no_rows_are_an_output_without_rows(model):
    raw_rows(0).to_parquet("in.parquet")
    table = score(model, "in.parquet", keep=["timestamp"])
    assert table.schema.names == ["timestamp", "score_click", "score_like"]
    assert len(table) == 0
    raw_rows(0).to_csv("in.csv", index=False)
    assert len(score(model, "in.csv")) == 0


# What cannot be scored ---------------------------------------------------------------------------


def refused(model, source, error=DataError, **options):
    """The message, after which there is no output and nothing half-written."""
    before = sorted(map(str, Path().rglob("*")))
    with pytest.raises(error) as caught:
        score_files(model, open_inputs(Path(source)), Path("new/out.parquet"), **options)
    assert sorted(map(str, Path().rglob("*"))) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_bad_value_is_named_by_its_row_in_the_file(model):
    frame = raw_rows(100)
    frame.loc[76, "age"] = np.nan
    frame.to_parquet("in.parquet", row_group_size=30)
    message = refused(model, "in.parquet", batch_size=20)
    assert message.startswith("in.parquet, row 77 (row group 2), field age: ") and "is in no domain (<25" in message
    frame = raw_rows(100)
    frame["timestamp"] = frame["timestamp"].astype(str)
    frame.loc[50, "timestamp"] = "soon"
    frame.to_csv("in.csv", index=False)
    message = refused(model, "in.csv", batch_size=20)
    assert message.startswith("in.csv, row 52, field timestamp: 'soon' is not a number")  # row 1 is the header


def test_the_output_that_was_there_survives_an_error(model):
    frame = raw_rows(100)
    frame.to_parquet("in.parquet")
    score(model, "in.parquet")
    before = Path("out.parquet").read_bytes()
    frame.assign(age=-np.inf).to_parquet("in.parquet")
    frame.loc[99, "timestamp"] = np.inf
    frame.to_parquet("in.parquet")
    with pytest.raises(DataError, match="row 100"):
        score_files(model, open_inputs(Path("in.parquet")), Path("out.parquet"), batch_size=10)
    assert Path("out.parquet").read_bytes() == before


def test_a_missing_column_is_named_before_anything_is_scored(model, monkeypatch):
    Path("in").mkdir()
    raw_rows(10).to_parquet("in/a.parquet")
    raw_rows(10).drop(columns="item_id").to_parquet("in/b.parquet")
    monkeypatch.setattr(M3oE, "score", lambda *_: pytest.fail("scored"))
    message = refused(model, "in")
    assert message.startswith("in/b.parquet: column item_id is missing; needed are user_id, item_id, timestamp, age")
    raw_rows(10).drop(columns="note").to_parquet("in/b.parquet")
    assert refused(model, "in", keep=["note"]) == "in/b.parquet: has no column note, which --keep asks for"
    assert "in/a.parquet: has no column nope, which --keep asks for; it has user_id" in refused(
        model, "in", keep=["nope"]
    )


def test_a_kept_column_of_another_type_is_named(model):
    Path("in").mkdir()
    raw_rows(10).assign(note=1).to_parquet("in/a.parquet")
    raw_rows(10).to_parquet("in/b.parquet")
    message = refused(model, "in", keep=["note"])
    assert message.startswith("in/b.parquet, field note: is of type ") and "of int64 in the first file" in message


def test_a_kept_column_called_as_a_score_is_refused(model):
    raw_rows(10).assign(score_like=1.0).to_parquet("in.parquet")
    message = refused(model, "in.parquet", ConfigError, keep=ALL)
    assert message == "the column score_like of the input is called as a score; leave it out of --keep"
    assert len(score(model, "in.parquet")) == 10


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.1])
def test_a_file_cut_short_is_refused(model, kept):
    raw_rows(500).to_parquet("whole.parquet")
    content = Path("whole.parquet").read_bytes()
    Path("in.parquet").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=r"^in\.parquet: is a Parquet file that is cut short"):
        open_inputs(Path("in.parquet"))


def test_damage_inside_a_file_is_refused(model):
    raw_rows(500).to_parquet("in.parquet", compression="gzip")
    content = bytearray(Path("in.parquet").read_bytes())
    content[40:400] = bytes(360)
    Path("in.parquet").write_bytes(content)
    assert refused(model, "in.parquet").startswith("in.parquet: cannot be read: GZipCodec failed")


@pytest.mark.parametrize(
    ("names", "source", "message"),
    [
        ([], "in", "in: no such file or folder; check the path"),
        (["in/readme.txt"], "in", r"in: holds no \.parquet or \.csv files"),
        (["in/a.parquet", "in/b.csv"], "in", r"in: holds both \.parquet and \.csv files"),
        (["in.json"], "in.json", r"in\.json: neither Parquet nor CSV by its name; call it \*\.parquet, \.csv"),
        (["in.parquet"], "in.parquet", r"in\.parquet: is empty"),
        (["in.csv"], "in.csv", r"in\.csv: is empty"),
    ],
)
def test_no_input_is_named(names, source, message):
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
    with pytest.raises(DataError, match=f"^{message}"):
        open_inputs(Path(source))


def test_a_ragged_csv_line_is_named(model):
    Path("in.csv").write_text("user_id,item_id,age,timestamp\n1,2,30,4\n1,2,30\n")
    assert refused(model, "in.csv").startswith("in.csv, row 3: 3 columns where the header has 4")


def test_a_model_without_vocabularies_cannot_score_rows():
    raw_rows(5).to_parquet("in.parquet")
    bare = M3oE(M3oEConfig((3,), 0, 1, 1, star_dim=2, hidden_dim=2), backend="reference")
    with pytest.raises(ConfigError, match="this model holds no vocabularies"):
        score_files(bare, open_inputs(Path("in.parquet")), Path("out.parquet"))
