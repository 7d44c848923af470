"""Encoders learn from the training rows only, and encode frames as they encoded the log."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data.build import encode_rows
from m3oe_fast.data.columns import Tokens
from m3oe_fast.data.demo import frame as demo_frame
from m3oe_fast.data.demo import generate
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.encode import Encoder
from m3oe_fast.data.hashing import buckets_of
from m3oe_fast.data.labels import parse_labels
from m3oe_fast.data.rawlog import RawLog
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import DataError

NAN = float("nan")


AGES = DomainRule("age", edges=(25.0,))


def make_encoder(ages=AGES):
    """Rows 0..3 train; row 4 brings a new item and a wider price."""
    item = Tokens.merged(np.arange(5), ["10", "9", "", "10", "77"])
    price = np.array([2.0, 4.0, 3.0, 4.0, 9.0])
    rules = parse_labels("click=rating>3,seen=seen")
    domain = np.array([0, 1, 1, 0, 1], np.int32)
    label = np.zeros((5, 2), np.float32)
    log = RawLog("log", {"item": item}, {"price": price}, domain, ages, label, rules)
    return log, Encoder.fit(log, np.arange(4))


def make_frame(**columns):
    return pd.DataFrame({"item": [9, 10], "price": [2, 4], "age": [20, 30], **columns})


def test_vocabulary_and_scaler_come_from_training_rows_only():
    log, encoder = make_encoder()
    assert encoder.vocabularies["item"] == ("9", "10")
    assert encoder.schema.fields == ("item", "domain")
    assert encoder.schema.vocab_sizes == (3, 3)
    assert encoder.encode("item", log.fields["item"]).tolist() == [2, 1, 0, 2, 0]
    assert encoder.scale("price", log.dense["price"]).tolist() == [0, 1, 0.5, 1, 1]


def test_constant_feature_is_zero():
    log, _ = make_encoder()
    encoder = Encoder.fit(log, np.array([1, 3]))
    assert encoder.scale("price", np.array([4.0, 5.0])).tolist() == [0, 0]


def test_domain_unseen_in_training_is_row_0_of_the_domain_field():
    log, _ = make_encoder()
    encoder = Encoder.fit(log, np.array([0, 3]))
    batch = encoder.transform(make_frame())
    assert batch.domain.tolist() == [0, 1]
    assert batch.ids[:, 1].tolist() == [1, 0]


@pytest.mark.parametrize(
    "items",
    [[9, 10, 11], [9.0, 10.0, NAN], ["9", "10", None], ["9.0", "10.00", "10.5"], pd.Categorical(["9", "10", "x"])],
)
def test_ids_compare_by_text_whatever_the_dtype(items):
    _, encoder = make_encoder()
    frame = pd.DataFrame({"item": items, "price": 3.0, "age": 20})
    assert encoder.transform(frame).ids[:, 0].tolist() == [1, 2, 0]


def test_dtypes_and_labels():
    _, encoder = make_encoder()
    batch = encoder.transform(make_frame(rating=[5, None], other=["x", "y"]), labels=True)
    dtypes = [tensor.dtype for tensor in batch[:4]]
    assert dtypes == [torch.int32, torch.float32, torch.int64, torch.float32]
    assert np.array_equal(batch.label, [[1, NAN], [NAN, NAN]], equal_nan=True)


def test_no_rows():
    _, encoder = make_encoder()
    shapes = [tuple(tensor.shape) for tensor in encoder.transform(make_frame()[:0])[:4]]
    assert shapes == [(0, 2), (0, 1), (0,), (0, 2)]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (make_frame().drop(columns="item"), "frame: column item is missing; needed are item, price, age"),
        (make_frame().drop(columns="age"), "frame: column age is missing"),
        (make_frame(item=[["9"], ["10"]]), "frame, field item: a value is no text or number"),
        (make_frame(price=["1", ""]), "frame, row 2, field price: nan is no finite number"),
        (pd.concat([make_frame(), make_frame()], axis=1), "frame: column age occurs 2 times"),
        (make_frame(price=[1, NAN]), "frame, row 2, field price: nan is no finite number"),
        (make_frame(price=["1", "x"]), "frame, row 2, field price: 'x' is not a number"),
        (make_frame(age=[20, NAN]), "frame, row 2, field age: .*nan.* is in no domain"),
        (make_frame(seen=[1, 2]), "frame, row 2, field seen: label seen is 2, not 0 or 1"),
        (make_frame(rating=[1, "good"]), "frame, row 2, field rating: 'good' is not a number"),
    ],
)
def test_bad_frames(frame, message):
    _, encoder = make_encoder()
    with pytest.raises(DataError, match=message):
        encoder.transform(frame, labels=True)


def test_unknown_domain_text():
    _, encoder = make_encoder(DomainRule("tab", texts=("home", "live")))
    frame = make_frame(tab=["live", "shop"])
    with pytest.raises(DataError, match=r"row 2, field tab: 'shop' is in no domain \(home, live\)"):
        encoder.transform(frame)
    assert encoder.transform(frame[:1]).domain.tolist() == [1]


def test_frames_are_encoded_as_the_log_was():
    log, frame = generate(3000, seed=5), demo_frame(3000, seed=5)
    rows = np.arange(3000)
    encoder = Encoder.fit(log, rows[:1000])
    stored, batch = encode_rows(log, encoder, rows), encoder.transform(frame, labels=True)
    for place, name in enumerate(encoder.schema.fields):
        assert np.array_equal(stored[f"id:{name}"], batch.ids[:, place]), name
    assert (batch.ids == 0).any(), "no unknown id: the test proves little"
    assert np.array_equal(stored["dense"], batch.dense)
    assert np.array_equal(stored["domain"], batch.domain)
    assert np.array_equal(stored["label"], batch.label, equal_nan=True)


def test_dict_survives_json_and_weights_only(tmp_path):
    log, frame = generate(500, seed=5), demo_frame(500, seed=5)
    encoder = Encoder.fit(log, np.arange(400))
    torch.save(encoder.to_dict(), tmp_path / "e.pt")
    for values in (
        json.loads(json.dumps(encoder.to_dict())),
        torch.load(tmp_path / "e.pt", weights_only=True),
    ):
        again = Encoder.from_dict(values)
        assert again == encoder
        assert all(map(torch.equal, again.transform(frame)[:3], encoder.transform(frame)[:3]))


@given(st.lists(st.text(max_size=3), min_size=1, max_size=20), st.data())
def test_known_ids_are_distinct_and_in_range(texts, data):
    train = data.draw(st.lists(st.integers(0, len(texts) - 1), min_size=1))
    column = Tokens.merged(np.arange(len(texts)), texts)
    domain = np.zeros(len(texts), np.int32)
    label = np.zeros((len(texts), 1), np.float32)
    rules = parse_labels("t=t")
    log = RawLog("log", {"x": column}, {}, domain, DomainRule(), label, rules)
    encoder = Encoder.fit(log, np.array(train))
    ids = dict(zip(texts, encoder.encode("x", column).tolist(), strict=True))
    seen = {texts[row] for row in train} - {""}
    assert sorted(ids[text] for text in seen) == list(range(1, encoder.schema.vocab_sizes[0]))
    assert all(ids[text] == 0 for text in set(texts) - seen)


@pytest.mark.parametrize("columns", [{"seen": [1, 2]}, {"rating": [1, "good"]}])
def test_scoring_does_not_look_at_labels(columns):
    _, encoder = make_encoder()
    assert torch.isnan(encoder.transform(make_frame(**columns)).label).all()


@pytest.mark.parametrize("kept", ["5", "5.0"])
@pytest.mark.parametrize("asked", ["5", "5.0", 5, 5.0])
def test_whole_numbers_are_one_id_however_they_are_written(kept, asked):
    column = pa.chunked_array([pa.array([kept, "x"]).dictionary_encode()])
    item, ones = Tokens.from_arrow(column), np.ones((2, 1), np.float32)
    log = RawLog("log", {"item": item}, {}, np.zeros(2, np.int32), DomainRule(), ones, parse_labels("t=t"))
    encoder = Encoder.fit(log, np.arange(2))
    assert encoder.transform(pd.DataFrame({"item": [asked]})).ids[0, 0] == 1


def make_sequence_encoder():
    genre = Tokens.merged(np.arange(2), ["War", "Drama"])
    label, rules = np.zeros((2, 1), np.float32), parse_labels("t=t")
    log = RawLog(
        "log",
        {"genre": genre},
        {},
        np.array([1, 0], np.int32),
        DomainRule("genre", texts=("Drama", "War")),
        label,
        rules,
    )
    log = replace(log, separators={"genre": "| ", "unused": " "}, aliases={"genre": ("genres", "class")})
    return Encoder.fit(log, np.arange(2))


@pytest.mark.parametrize("name", ["genre", "genres", "class"])
def test_first_token_counts_under_every_name_of_the_column(name):
    encoder = Encoder.from_dict(json.loads(json.dumps(make_sequence_encoder().to_dict())))
    assert encoder == make_sequence_encoder()
    assert encoder.separators == {"genre": "| "}
    batch = encoder.transform(pd.DataFrame({name: ["War|Drama", " Drama War", "Drama", "War"]}))
    assert batch.ids.tolist() == [[2, 2], [1, 1], [1, 1], [2, 2]]
    assert batch.domain.tolist() == [1, 0, 0, 1]


def test_missing_column_is_named_with_its_other_names():
    with pytest.raises(DataError, match=r"column genre \(or genres, class\) is missing; needed are genre \(or"):
        make_sequence_encoder().transform(pd.DataFrame({"kind": ["War"]}))


def test_values_too_far_apart():
    log, _ = make_encoder()
    wide = replace(log, dense={"price": np.array([1e308, -1e308, 0, 0, 0])})
    with pytest.raises(DataError, match=r"log, field price: its values, -1e\+308 to 1e\+308, lie too far apart"):
        Encoder.fit(wide, np.arange(4))


def test_values_far_outside_the_range_are_clipped_without_overflow():
    log, _ = make_encoder()
    encoder = Encoder.fit(replace(log, dense={"price": np.array([1e308, 2e307, 0, 0, 0])}), np.arange(4))
    with np.errstate(all="raise"):
        assert encoder.scale("price", np.array([-1.7e308, 1.7e308])).tolist() == [0, 1]


def make_bag_encoder():
    schema = Schema(
        ("query", "domain"), (11, 2), (), ("all",), ("t",), ("tags", "words"), (3, 6), ("mean", "sum"), weighted=True
    )
    vocabularies = {"domain": ("all",), "tags": ("5", "x")}
    return Encoder(
        schema,
        vocabularies,
        {},
        DomainRule(),
        parse_labels("t=t"),
        buckets={"query": 10, "words": 5},
        bag_separators={"words": " "},
    )


@pytest.mark.parametrize(
    "tags",
    [
        [["x", "y", "5"], None, []],
        [("x", "y", "5.0"), NAN, ()],
        [np.array(["x", "y", "5"]), None, np.array([], object)],
    ],
)
def test_bags_of_a_frame(tags):
    frame = pd.DataFrame({"query": [1, 2, None], "tags": tags, "words": ["a b", None, ""]})
    batch = make_bag_encoder().transform(frame)
    values, offsets = batch.bags[0]
    assert (values.tolist(), offsets.tolist()) == ([2, 0, 1], [0, 3, 3, 3])
    assert {values.dtype, offsets.dtype} == {torch.int64}
    assert batch.bags[1].values.tolist() == buckets_of(["a", "b"], 5).tolist()
    assert batch.bags[1].offsets.tolist() == [0, 2, 2, 2]
    assert batch.ids[:, 0].tolist() == buckets_of(["1", "2", ""], 10).tolist()
    assert batch.row_weight is None


def test_bags_of_no_rows():
    batch = make_bag_encoder().transform(pd.DataFrame({"query": [], "tags": [], "words": []}).astype(object))
    assert [bag.offsets.tolist() for bag in batch.bags] == [[0], [0]]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"tags": ["x", "y"]}, r"frame, field tags: is of type .*string; it must hold lists"),
        ({"words": [1, 2]}, "frame, field words: is of type int64; it must hold lists, or texts separated by ' '"),
        ({"tags": [["x", 5], []]}, "frame, field tags: .*; hold a list of texts or numbers in each row"),
        ({"tags": [["x"], "y"]}, "frame, field tags: .*; hold a list of texts or numbers in each row"),
        ({"tags": [[["x"]], [["y"]]]}, "frame, field tags: is of type list"),
    ],
)
def test_bad_bags(column, message):
    frame = pd.DataFrame({"query": [1, 2], "tags": [["x"], []], "words": ["a", "b"]}).assign(**column)
    with pytest.raises(DataError, match=message):
        make_bag_encoder().transform(frame)


def test_missing_bag_is_named():
    with pytest.raises(DataError, match="column tags is missing; needed are query, tags, words"):
        make_bag_encoder().transform(pd.DataFrame({"query": [1], "words": ["a"]}))
