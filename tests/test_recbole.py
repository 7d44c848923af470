"""RecBole atomic files: joins, roles of columns, and every way they can be wrong."""

import numpy as np
import pytest

from m3oe_fast.data import recbole
from m3oe_fast.errors import DataError

from .log_files import edit, make_ratings, write, write_recbole, zipped

LABELS = "click=rating>3,like=rating>4"


@pytest.fixture
def ratings():
    return make_ratings(60, users=8, movies=9)


@pytest.fixture
def folder(tmp_path, ratings):
    return write_recbole(tmp_path / "ml", ratings)


def read(place, column="age", bins="25,35", labels=LABELS, drop=None):
    return recbole.find(str(place), column, bins, labels, drop).read()


def texts(column):
    return [None if code < 0 else column.values[code] for code in column.codes]


def test_rows_are_joined_with_their_user_and_item(folder, ratings):
    log = read(folder)
    assert list(log.fields) == [
        *("user_id", "item_id", "age", "gender", "occupation", "zip_code"),
        *("movie_title", "release_year", "class"),
    ]
    assert log.dense == {}
    for row, (user, movie, rating, time) in enumerate(ratings.rows):
        gender, age, _, _ = ratings.users[user]
        found = [texts(log.fields[name])[row] for name in ("user_id", "item_id", "age", "gender")]
        assert found == [str(user), str(movie), str(age), gender]
        assert texts(log.fields["class"])[row] == ratings.movies[movie][1][0]
        assert texts(log.fields["movie_title"])[row] == '"Cité"'
        assert log.domain[row] == (age >= 25) + (age >= 35)
        assert log.label[row].tolist() == [rating > 3, rating > 4]
        assert log.time[row] == time
    assert log.user.values == log.fields["user_id"].values


def test_label_columns_time_and_dropped_columns_are_no_features(folder):
    log = read(folder, None, None, labels="click=rating>3,adult=age>17", drop="zip_code, class")
    assert not {"rating", "age", "timestamp", "zip_code", "class"} & {*log.fields, *log.dense}
    assert read(folder, None, None, labels="adult=age>17").dense.keys() == {"rating"}


def test_domains_by_text_replace_their_column(folder, ratings):
    log = read(folder, column="gender", bins=None)
    assert log.domain_rule.names == ("F", "M")
    assert "gender" not in log.fields
    assert log.domain.tolist() == ["FM".index(ratings.users[user][0]) for user, *_ in ratings.rows]


def test_without_a_domain_column_there_is_one_domain(folder):
    log = read(folder, column=None, bins=None)
    assert log.domain_rule.names == ("all",)
    assert not log.domain.any()


def test_float_columns_are_dense_and_float_seq_is_left_out(folder):
    edit(folder / "ml-100k.user", "age:token", "age:float")
    edit(folder / "ml-100k.item", "class:token_seq", "class:float_seq")
    log = read(folder)
    assert set(log.dense) == {"age"}
    assert "class" not in log.fields
    assert any("class is a float_seq, which is left out" in line for line in log.warnings)


def test_missing_values(folder, ratings):
    """An empty token is missing, an empty rating is a label not observed."""
    user, movie, rating, time = ratings.rows[0]
    edit(folder / "ml-100k.inter", f"{user}\t{movie}\t{rating}\t{time}", f"{user}\t{movie}\t\t{time}")
    edit(folder / "ml-100k.user", f"\t{ratings.users[user][3]}\n", "\t\n")
    log = read(folder)
    assert np.isnan(log.label[0]).all()
    assert texts(log.fields["zip_code"])[0] is None


def test_item_without_a_row_in_the_item_file(folder, ratings):
    movie = ratings.rows[0][1]
    edit(folder / "ml-100k.item", f"\n{movie}\t", "\nother\t")
    assert texts(read(folder).fields["class"])[0] is None


def test_inter_file_alone(folder):
    (folder / "ml-100k.user").unlink()
    (folder / "ml-100k.item").unlink()
    assert list(read(folder, None, None).fields) == ["user_id", "item_id"]


def test_zip_and_wheel_hold_the_same_log(folder, tmp_path):
    wheel = zipped(folder, tmp_path / "r.whl", "recbole/dataset_example/ml-100k/")
    packed, plain = read(wheel), read(folder)
    assert np.array_equal(packed.label, plain.label)
    assert [*map(texts, packed.fields.values())] == [*map(texts, plain.fields.values())]


def test_one_of_several_data_sets(folder, ratings):
    write_recbole(folder, make_ratings(20), "other")
    with pytest.raises(DataError, match=r"several data sets \(ml-100k, other\); name one as in PATH#"):
        read(folder)
    assert len(read(f"{folder}#other")) == 20
    assert len(read(f"{folder}#ml-100k")) == len(ratings.rows)
    with pytest.raises(DataError, match="holds no data set nope; it holds ml-100k, other"):
        read(f"{folder}#nope")


def test_identity_follows_content_and_roles(folder):
    def identity(**roles):
        options = {"column": "age", "bins": "25,35", "labels": LABELS, "drop": None, **roles}
        return recbole.find(str(folder), *options.values()).identity

    before = identity()
    assert identity() == before
    assert identity(bins="25") != before
    assert identity(labels="click=rating>3") != before
    edit(folder / "ml-100k.user", "writer", "reader")
    assert identity() != before


@pytest.mark.parametrize(
    ("kind", "old", "new", "message"),
    [
        ("inter", "user_id:token\t", "user_id\t", r"inter, row 1: 'user_id' is no typed column"),
        ("inter", "rating:float", "rating:real", r"inter, row 1: 'rating:real' is no typed column"),
        ("user", "age:token", "user_id:token", "user, row 1: column user_id occurs twice"),
        ("user", "user_id:token", "uid:token", "user: has no id column user_id to join by"),
        ("user", "age:token", "item_id:token", "user, field item_id: another file has this col"),
        ("item", "class:token_seq", "domain:token", "inter, field domain: this name is the dom"),
        ("user", "\n2\t", "\n1\t", "user, row 3, field user_id: occurs a second time"),
    ],
)
def test_bad_files(folder, kind, old, new, message):
    edit(folder / f"ml-100k.{kind}", old, new)
    with pytest.raises(DataError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)


def test_wrong_separator(folder):
    path = folder / "ml-100k.inter"
    path.write_text(path.read_text().replace("\t", ","))
    with pytest.raises(DataError, match=r"ml-100k\.inter, row 1: .* separated by tabs"):
        read(folder)


def test_truncated_row(folder):
    path = folder / "ml-100k.inter"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], lines[5][:4]]))
    with pytest.raises(DataError, match=r"ml-100k\.inter, row 6: .* the line is cut short"):
        read(folder)


def test_float_that_is_none(folder, ratings):
    edit(folder / "ml-100k.user", "age:token", "age:float")
    edit(folder / "ml-100k.user", f"\n2\t{ratings.users[2][1]}\t", "\n2\tNaN\t")
    with pytest.raises(DataError, match=r"user, row 3, field age: no finite.*--drop_columns"):
        read(folder, column="gender", bins=None)
    assert "age" not in read(folder, column="gender", bins=None, drop="age").dense


def test_user_without_a_row_has_no_dense_feature_and_no_domain(folder, ratings):
    user = ratings.rows[0][0]
    edit(folder / "ml-100k.user", f"\n{user}\t", "\nother\t")
    with pytest.raises(DataError, match=r"inter, row 2, field age: empty, so the row has no domain"):
        read(folder)
    edit(folder / "ml-100k.user", "age:token", "age:float")
    with pytest.raises(DataError, match=r"inter, row 2, field age: no finite number"):
        read(folder, column=None, bins=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": None}, r"ml-100k\.inter: name the tasks, for example .*columns are user_id, "),
        ({"labels": "click=score>3"}, r"has no column score \(--labels\).*choose among user_id, "),
        ({"labels": "click=gender>3"}, r"row 2, field gender: '[MF]' is not a number"),
        (
            {"labels": "click=rating"},
            r"inter, row \d+, field rating: label click is \d, not 0 or 1",
        ),
        ({"labels": "click=rating=>3"}, "--labels: cannot read 'click=rating=>3'"),
        ({"column": "ages"}, r"has no column ages \(--domain_column\)"),
        ({"column": "gender"}, r"row 2, field gender: '[MF]' is not a number; name another column"),
        (
            {"column": "timestamp", "bins": None},
            "field timestamp: is a number; cut it with --domain_bins",
        ),
        ({"column": "rating"}, "--domain_column rating: a label follows from this column"),
        ({"column": "rating", "bins": None}, "--domain_column rating: a label follows"),
        ({"column": None}, "--domain_bins 25,35: of which column"),
        ({"bins": "35,25"}, "the edges must increase"),
        ({"drop": "zip"}, r"has no column zip \(--drop_columns\)"),
    ],
)
def test_bad_options(folder, options, message):
    with pytest.raises(DataError, match=message) as caught:
        read(folder, **options)
    assert "\n" not in str(caught.value)


def test_folder_without_atomic_files(tmp_path):
    with pytest.raises(DataError, match="holds no RecBole atomic files"):
        read(tmp_path)


def test_wheel_without_atomic_files(tmp_path):
    write(tmp_path / "w" / "setup.py", ["pass"])
    with pytest.raises(DataError, match=r"w\.whl: holds no RecBole atomic files"):
        read(zipped(tmp_path / "w", tmp_path / "w.whl"))


def test_label_errors_count_empty_lines(folder):
    path = folder / "ml-100k.inter"
    header, *rows = path.read_text().splitlines()
    fields = [row.split("\t") for row in rows]
    lines = ["\t".join([user, item, "7" if i == 3 else "1", time]) for i, (user, item, _, time) in enumerate(fields)]
    path.write_text("\n".join([header, "", *lines[:2], "", *lines[2:]]))
    with pytest.raises(DataError, match=r"inter, row 7, field rating: label click is 7"):
        read(folder, labels="click=rating")
