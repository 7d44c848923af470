"""The YAML that describes a log: what it may say, and how it is refused."""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pytest

from m3oe_fast.data import tabular
from m3oe_fast.data.domains import DomainRule
from m3oe_fast.data.labels import LabelRule
from m3oe_fast.data.log_schema import BagColumn, IdColumn, read_schema
from m3oe_fast.errors import DataError

from .tabular_files import SCHEMA

LABELS = "labels: {click: click}\n"


def read(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return read_schema(path)


def test_everything_at_once(tmp_path):
    schema = read(tmp_path, SCHEMA)
    assert schema.ids == (IdColumn("user_id"), IdColumn("item", 0, 3), IdColumn("query", 50))
    assert schema.bags == (
        BagColumn("genres", separator="|"),
        BagColumn("words", 20, pooling="sum", separator=" "),
    )
    assert schema.dense == ("price",)
    assert schema.domain == DomainRule("tab")
    assert schema.labels == (LabelRule("click", "click"), LabelRule("long_view", "seconds", ">=", 30.0))
    assert (schema.timestamp, schema.user, schema.weight) == ("time", "user_id", "weight")
    assert json.loads(json.dumps(schema.to_dict())) == json.loads(json.dumps(read(tmp_path, SCHEMA).to_dict()))


def test_defaults_hold_for_fields_without_their_own(tmp_path):
    text = (
        "min_count: 4\nencoding: hash\nbuckets: 9\nids: [a, {name: b, encoding: vocabulary}, {name: c, buckets: 7}]\n"
    )
    assert read(tmp_path, text + LABELS).ids == (IdColumn("a", 9), IdColumn("b", 0, 4), IdColumn("c", 7))


def test_little_is_needed(tmp_path):
    schema = read(tmp_path, "dense: [x]\n" + LABELS)
    assert (schema.ids, schema.bags, schema.domain.names, schema.delimiter) == ((), (), ("all",), ",")


def test_domains_by_bins_and_values(tmp_path):
    assert read(tmp_path, "ids: [a]\ndomain: {column: a, bins: [25, 35]}\n" + LABELS).domain.names == (
        "<25",
        "25-34",
        ">=35",
    )
    values = read(tmp_path, "ids: [a]\ndomain: {column: t, values: [1, 2.0, x]}\n" + LABELS)
    assert values.domain.names == ("1", "2", "x")


def test_a_user_may_be_an_id_and_several_labels_may_share_a_column(tmp_path):
    schema = read(tmp_path, "ids: [u]\nuser: u\nlabels: {a: r>1, b: r>2}\n")
    assert [rule.column for rule in schema.labels] == ["r", "r"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys such as ids"),
        ("- a", "must hold keys such as ids"),
        ("a: [", r"s.yaml, line 1: no valid YAML"),
        ("ids: [a]\nids: [b]\n", r"line 2: no valid YAML \(key ids occurs twice\)"),
        ("labels: {a: x, a: y}\n", r"no valid YAML \(key a occurs twice\)"),
        ("idz: [a]\n" + LABELS, "s.yaml, idz: unknown key, did you mean ids\\?; the keys are ids, dense"),
        ("1: [a]\n" + LABELS, "s.yaml, 1: unknown key; the keys are"),
        ("ids: [{name: a, mincount: 2}]\n" + LABELS, r"ids\[0\].mincount: unknown key, did you mean min_count\?"),
        ("ids: [a]\ndomain: {colum: t}\n" + LABELS, r"domain.colum: unknown key, did you mean column\?"),
        ("bags: [{name: a, poling: sum}]\n" + LABELS, r"bags\[0\].poling: unknown key, did you mean pooling\?"),
        ("ids: [{min_count: 2}]\n" + LABELS, r"ids\[0\].name: is missing"),
        ("ids: a\n" + LABELS, "ids: 'a' is no list"),
        ("ids: [true]\n" + LABELS, r"ids\[0\].name: True is no column name"),
        ("ids: [{name: a, min_count: 0}]\n" + LABELS, r"ids\[0\].min_count: 0 is no whole number in range"),
        ("ids: [{name: a, min_count: yes}]\n" + LABELS, r"min_count: True is no whole number"),
        ("ids: [a]\nencoding: hsh\n" + LABELS, r"encoding: 'hsh' is unknown, did you mean hash\?; choose one of"),
        ("ids: [{name: a, encoding: [x]}]\n" + LABELS, r"encoding: \['x'\] is unknown"),
        ("ids: [{name: a, encoding: hash}]\n" + LABELS, r"ids\[0\].buckets: encoding hash needs the number"),
        ("ids: [{name: a, buckets: 5}]\n" + LABELS, r"ids\[0\].buckets: only encoding hash has buckets"),
        ("ids: [{name: a, encoding: hash, buckets: 99999999999}]\n" + LABELS, "no whole number in range"),
        (
            "ids: [{name: a, encoding: hash, buckets: 5, min_count: 2}]\n" + LABELS,
            r"ids\[0\].min_count: a hash learns no vocabulary",
        ),
        ("bags: [{name: a, pooling: max}]\n" + LABELS, r"bags\[0\].pooling: 'max' is unknown.*mean, sum"),
        ('bags: [{name: a, separator: ""}]\n' + LABELS, r"bags\[0\].separator: '' is no text"),
        ("ids: [a]\n", "labels: name the tasks"),
        ("ids: [a]\nlabels: {}\n", "labels: name the tasks"),
        ("ids: [a]\nlabels: {click: 1}\n", "labels.click: cannot read click: 1"),
        ("ids: [a]\nlabels: {click: b >> 1}\n", "s.yaml, labels.click: cannot read 'click=b >> 1'"),
        ("ids: [a]\nlabels: {a=b: c}\n", "labels.a=b: cannot read"),
        (LABELS, "ids: the log has no feature"),
        ("ids: [a, a]\n" + LABELS, "ids: column a is named twice"),
        ("ids: [a]\ndense: [a]\n" + LABELS, "dense: column a is already under ids; a column has one role"),
        ("ids: [click]\n" + LABELS, "ids: column click gives a label, so as a feature it would give the label away"),
        ("dense: [r]\nlabels: {like: r>3}\n", "dense: column r gives a label"),
        ("bags: [r]\nlabels: {like: r>3}\n", "bags: column r gives a label"),
        ("ids: [a]\ndomain: click\n" + LABELS, "domain: a label follows from column click"),
        ("ids: [a]\ndomain: {column: r, bins: [1]}\nlabels: {x: r>1}\n", "domain: a label follows from column r"),
        ("ids: [a]\ndomain: a\n" + LABELS, "domain: column a is already under ids"),
        ("ids: [a]\nweight: a\n" + LABELS, "weight: column a is already under ids"),
        ("ids: [a]\nweight: click\n" + LABELS, "weight: column click is already under labels"),
        ("ids: [a]\ntimestamp: t\nweight: t\n" + LABELS, "weight: column t is already under timestamp"),
        ("ids: [domain]\n" + LABELS, "ids: domain is the name of the domain's own field"),
        ("ids: [a]\ndomain: {bins: [1]}\n" + LABELS, "domain.column: is missing"),
        ("ids: [a]\ndomain: {column: t, bins: [1], values: [a]}\n" + LABELS, "domain: has both bins and values"),
        ("ids: [a]\ndomain: {column: t, bins: [2, 1]}\n" + LABELS, "domain.bins: the edges must increase"),
        ("ids: [a]\ndomain: {column: t, bins: [x]}\n" + LABELS, "domain.bins: .* are not numbers"),
        ("ids: [a]\ndomain: {column: t, bins: [.nan]}\n" + LABELS, "domain.bins: not numbers"),
        ("ids: [a]\ndomain: {column: t, bins: []}\n" + LABELS, "domain.bins: .* are not numbers"),
        ("ids: [a]\ndomain: {column: t, values: []}\n" + LABELS, "domain.values: is empty"),
        ("ids: [a]\ndomain: {column: t, values: [a, a]}\n" + LABELS, "domain.values: a occurs twice"),
        ("ids: [a]\ndomain: {column: t, values: [no]}\n" + LABELS, r"domain.values\[0\]: False is no text"),
        ("ids: [a]\ntimestamp: [t]\n" + LABELS, r"timestamp: \['t'\] is no column name"),
        ("ids: [a]\ndelimiter: ';;'\n" + LABELS, "delimiter: ';;' is no single character"),
    ],
)
def test_refusals_name_file_key_and_remedy(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "s.yaml") in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match=r"no\.yaml: cannot be read: No such file or directory; check --schema"):
        read_schema(tmp_path / "no.yaml")
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_schema(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"ids: [\xff\xfe]")
    with pytest.raises(DataError, match=r"b\.yaml: no valid YAML"):
        read_schema(tmp_path / "b.yaml")


def test_yaml_anchors_and_merges_are_read(tmp_path):
    text = "ids: [&x {name: a, min_count: 2}, {<<: *x, name: b}]\n"
    assert read(tmp_path, text + LABELS).ids == (IdColumn("a", 0, 2), IdColumn("b", 0, 2))


def test_the_example_of_the_documentation_is_read(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^ {4}.*\n|^\n)+", text, re.MULTILINE)]
    (example,) = (block for block in blocks if block.strip().startswith("ids:"))
    (rows,) = (block for block in blocks if block.strip().startswith("user_id,"))
    path = tmp_path / "part-0.csv"
    path.write_text(rows.strip() + "\n")
    (tmp_path / "s.yaml").write_text(example)
    log = tabular.find("csv", str(path), str(tmp_path / "s.yaml"))
    assert log.count_rows() == 2
    assert set(log.columns()) == set(log.files[0].types)
    (chunk,) = log.chunks(log.columns())
    assert chunk.label(log.schema.labels).tolist()[0] == [1.0, 1.0]
    assert np.diff(chunk.time("time")) > 0
