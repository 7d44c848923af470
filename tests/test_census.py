"""Rows of other domains are dropped where the schema says so, counted all the same, and named by their own rows."""

import numpy as np
import pandas as pd
import pytest

from m3oe_fast.data import load, tabular
from m3oe_fast.data.census import take_census
from m3oe_fast.errors import DataError

from .tabular_files import SCHEMA, make_frame, write_csv, write_parquet, write_schema

WRITERS = {"csv": write_csv, "parquet": write_parquet}


def schema(tmp_path, domain):
    return write_schema(tmp_path / "s.yaml", SCHEMA.replace("domain: tab", f"domain: {domain}"))


def prepare(tmp_path, kind, frame, domain, **options):
    WRITERS[kind](tmp_path / kind, frame)
    cache = str(tmp_path / "cache")
    return load(f"{kind}:{tmp_path / kind}", schema=schema(tmp_path, domain), cache_dir=cache, **options)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("split", ["official", "random", "temporal", "user"])
def test_as_if_the_other_rows_had_never_been_there(tmp_path, kind, split):
    frame = make_frame(900)
    dropped = prepare(tmp_path, kind, frame, "{column: tab, values: [shop, home], others: drop}", split=split)
    kept = frame[frame["tab"].isin(["shop", "home"])]
    other = prepare(tmp_path / "kept", kind, kept, "{column: tab, values: [shop, home]}", split=split)
    assert (dropped.schema, dropped.counts, dropped.warnings) == (other.schema, other.counts, other.warnings)
    assert dropped.encoder.to_dict() == other.encoder.to_dict()
    for part in ("train", "val", "test"):
        mine, theirs = (getattr(log, part) for log in (dropped, other))
        rows = np.arange(len(mine))
        for one, two in zip(mine.take(rows)[:3], theirs.take(rows)[:3], strict=True):
            assert np.array_equal(one, two)
    rows = frame["tab"].value_counts()
    assert dropped.notes == (
        f"rows by tab: shop: {rows['shop']}, home: {rows['home']}; left out {rows['live']} (live: {rows['live']})",
    )
    assert other.notes == ()


def test_census_counts_gaps_and_distinct_values(tmp_path):
    frame = make_frame(700).assign(tab=lambda f: f["tab"].where(f.index % 5 > 0))
    write_csv(tmp_path / "csv", frame)
    text = schema(tmp_path, "{column: tab, values: [home, live], others: drop}")
    census = take_census(tabular.find("csv", str(tmp_path / "csv"), text), ("user_id", "item"))
    assert census.rows == {**frame["tab"].value_counts(), "": frame["tab"].isna().sum()}
    for name in ("user_id", "item"):
        wanted = [frame[frame["tab"] == tab][name].nunique() for tab in ("home", "live")]
        assert census.counts.distinct[name] == tuple(wanted)
    assert f"(empty): {frame['tab'].isna().sum()}" in census.note(("home", "live"))


def test_long_lists_are_cut(tmp_path):
    frame = make_frame(900).assign(tab=[f"t{n % 60}" for n in range(900)])
    values = ", ".join(f"t{n}" for n in range(25))
    (note,) = prepare(tmp_path, "csv", frame, f"{{column: tab, values: [{values}], others: drop}}").notes
    assert "t19: 15 and 5 more; left out 525 (t25: 15" in note and note.endswith("t44: 15 and 15 more)")


def test_a_domain_without_rows_is_refused(tmp_path):
    with pytest.raises(
        DataError, match="field tab: no row has hom, which is to be a domain; the values are home, live, s"
    ):
        prepare(tmp_path, "csv", make_frame(300), "{column: tab, values: [hom], others: drop}")
    assert not list((tmp_path / "cache").iterdir())


def test_raw_rows_of_other_domains_are_still_refused(tmp_path):
    frame = make_frame(600)
    dataset = prepare(tmp_path, "csv", frame, "{column: tab, values: [shop, home], others: drop}")
    with pytest.raises(DataError, match="'live' is in no domain"):
        dataset.encoder.transform(frame)
    assert len(dataset.encoder.transform(frame[frame["tab"] != "live"]).ids) == (frame["tab"] != "live").sum()


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("{column: tab, others: drop}", "domain.others: only listed values leave others"),
        ("{column: tab, bins: [1], others: drop}", "domain.others: only listed values leave others"),
        ("{column: tab, values: [home], others: dorp}", "domain.others: 'dorp' is unknown, did you mean drop"),
    ],
)
def test_wrong_schemas(tmp_path, domain, message):
    with pytest.raises(DataError, match=message):
        prepare(tmp_path, "csv", make_frame(50), domain)


def test_refuse_is_the_default(tmp_path):
    for more in ("", ", others: refuse"):
        with pytest.raises(DataError, match="is in no domain"):
            prepare(tmp_path, "csv", pd.DataFrame(make_frame(300)), f"{{column: tab, values: [home]{more}}}")
