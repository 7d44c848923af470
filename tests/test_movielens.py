"""MovieLens in its three published forms: the same log whichever was read."""

import shutil
import zipfile

import numpy as np
import pytest

from m3oe_fast.data import movielens
from m3oe_fast.data.build import encode_rows
from m3oe_fast.data.encode import Encoder
from m3oe_fast.errors import DataError

from .log_files import edit, make_ratings, write, write_1m, write_100k, write_recbole, zipped

FIELDS = ["user_id", "movie_id", "gender", "occupation", "zip", "genre"]
WRITERS = {"movielens-1m": write_1m, "movielens-100k": write_100k}


@pytest.fixture
def ratings():
    return make_ratings()


def read(name, path):
    return movielens.find(name, str(path)).read()


def texts(column):
    return [column.values[code] for code in column.codes]


@pytest.mark.parametrize("name", WRITERS)
def test_columns_domains_and_labels(name, ratings, tmp_path):
    log = read(name, WRITERS[name](tmp_path, ratings))
    assert list(log.fields) == FIELDS
    assert list(log.dense) == ["age"]
    columns = [texts(log.fields[field]) for field in FIELDS]
    for row, (user, movie, rating, time) in enumerate(ratings.rows):
        gender, age, work, zip_code = ratings.users[user]
        wanted = [str(user), str(movie), gender, work, zip_code, ratings.movies[movie][1][0]]
        assert [column[row] for column in columns] == wanted
        assert log.dense["age"][row] == age
        assert log.domain[row] == (0 if age < 25 else 1 if age < 35 else 2)
        assert log.label[row].tolist() == [rating > 3, rating > 4]
        assert log.time[row] == time


def test_seven_id_fields_and_one_dense(ratings, tmp_path):
    """I = 7*16 + 1 = 113 as in the published configuration."""
    log = read("movielens-1m", write_1m(tmp_path, ratings))
    schema = Encoder.fit(log, np.arange(300)).schema
    assert schema.fields == (*FIELDS, "domain")
    assert schema.dense == ("age",)
    assert schema.domains == ("<25", "25-34", ">=35")


def test_every_form_of_100k_is_the_same_log(ratings, tmp_path):
    forms = [
        write_100k(tmp_path / "a" / "ml-100k", ratings),
        write_recbole(tmp_path / "b", ratings),
    ]
    forms.append(zipped(forms[0], tmp_path / "ml-100k.zip", "ml-100k/"))
    forms.append(zipped(forms[1], tmp_path / "r.whl", "recbole/dataset_example/ml-100k/"))
    forms.append(tmp_path / "a")
    rows = np.arange(len(ratings.rows))
    stored = []
    for form in forms:
        log = read("movielens-100k", form)
        stored.append(encode_rows(log, Encoder.fit(log, rows[:300]), rows))
    for other in stored[1:]:
        assert other.keys() == stored[0].keys()
        assert all(np.array_equal(other[name], stored[0][name]) for name in other)


def test_zip_of_1m(ratings, tmp_path):
    folder = write_1m(tmp_path / "ml-1m", ratings)
    packed = read("movielens-1m", zipped(folder, tmp_path / "ml-1m.zip", "ml-1m/"))
    assert np.array_equal(packed.label, read("movielens-1m", folder).label)


def test_publishers_zip_of_100k_as_it_is(ratings, tmp_path):
    """With the folds, the lists and the scripts that lie beside the log, and the film of which nothing is known."""
    ratings.movies[5] = ("unknown", ["unknown"])
    folder = write_100k(tmp_path / "ml-100k", ratings)
    item = folder / "u.item"
    edit(item, "|unknown|01-Jan-1995||http://us.imdb.com/M/title-exact?5|", "|unknown||||", "latin-1")
    item.write_bytes(item.read_bytes() + b"\n")
    for decoy in ("u1.base", "ua.test", "u.info", "u.genre", "u.occupation", "allbut.pl", "README"):
        write(folder / decoy, ["1\t2\t3\t4"])
    archive = zipped(folder, tmp_path / "ml-100k.zip", "ml-100k/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("ml-100k/", "")
        file.writestr("__MACOSX/ml-100k/._u.data", b"\0")
    log = read("movielens-100k", archive)
    assert len(log) == len(ratings.rows)
    genres = dict(zip(texts(log.fields["movie_id"]), texts(log.fields["genre"]), strict=True))
    assert genres["5"] == "unknown"
    assert genres["4"] == ratings.movies[4][1][0]


def test_incomplete_log_says_so(ratings, tmp_path):
    (line,) = read("movielens-1m", write_1m(tmp_path, ratings)).warnings
    assert "where the complete log has 210,747 / 395,556 / 393,906 (1,000,209 in all)" in line


def test_complete_log_says_nothing(ratings, tmp_path, monkeypatch):
    first = read("movielens-1m", write_1m(tmp_path, ratings))
    rows = tuple(np.bincount(first.domain, minlength=3).tolist())
    log = movielens.LOGS["movielens-1m"]
    monkeypatch.setitem(movielens.LOGS, "movielens-1m", type(log)(**{**vars(log), "domain_rows": rows}))
    assert read("movielens-1m", tmp_path).warnings == ()


@pytest.mark.parametrize("file", ["ratings.dat", "users.dat", "movies.dat"])
def test_missing_file(file, ratings, tmp_path):
    write_1m(tmp_path, ratings)
    (tmp_path / file).unlink()
    with pytest.raises(DataError, match=rf"lacks {file}; fetch ml-1m\.zip from"):
        read("movielens-1m", tmp_path)


def test_recbole_form_without_its_item_file(ratings, tmp_path):
    write_recbole(tmp_path, ratings)
    (tmp_path / "ml-100k.item").unlink()
    with pytest.raises(DataError, match=r"lacks ml-100k\.item"):
        read("movielens-100k", tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("ratings.dat", "::", ":", r"ratings\.dat, row 1: \d columns where 4 are expected"),
        (
            "ratings.dat",
            "::",
            "::x",
            r"ratings\.dat, row 1, field movie_id: 'x\d+' is not in .*movies",
        ),
        (
            "users.dat",
            "\n2::",
            "\n999::",
            r"ratings\.dat, row \d+, field user_id: '2' is not in .*users",
        ),
        ("users.dat", "\n2::", "\n1::", r"users\.dat, row 2, field user_id: occurs a second time"),
        ("movies.dat", "2::", "2,", r"movies\.dat, row 2: 2 columns where 3 are expected"),
    ],
)
def test_bad_rows(file, old, new, message, ratings, tmp_path):
    write_1m(tmp_path, ratings)
    edit(tmp_path / file, old, new)
    with pytest.raises(DataError, match=message) as caught:
        read("movielens-1m", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("separator", [",", "\t", ":"])
def test_wrong_separator(separator, ratings, tmp_path):
    write_1m(tmp_path, ratings)
    path = tmp_path / "ratings.dat"
    path.write_text(path.read_text().replace("::", separator))
    with pytest.raises(DataError, match=r"ratings\.dat, row 1: no '::' between columns"):
        read("movielens-1m", tmp_path)


@pytest.mark.parametrize(("name", "file"), [("movielens-1m", "ratings.dat"), ("movielens-100k", "u.data")])
def test_file_cut_in_a_row(name, file, ratings, tmp_path):
    WRITERS[name](tmp_path, ratings)
    path = tmp_path / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:7], lines[7][:2]]))
    with pytest.raises(DataError, match=rf"{file}, row 8: 1 columns where 4 are expected"):
        read(name, tmp_path)


def test_empty_file(ratings, tmp_path):
    write_1m(tmp_path, ratings)
    (tmp_path / "users.dat").write_text("")
    with pytest.raises(DataError, match=r"users\.dat, row 1: no '::'"):
        read("movielens-1m", tmp_path)


@pytest.mark.parametrize("wrong", ["", "old", "nan"])
def test_age_that_is_no_number(wrong, ratings, tmp_path):
    write_100k(tmp_path, ratings)
    age = ratings.users[1][1]
    edit(tmp_path / "u.user", f"1|{age}|", f"1|{wrong}|")
    with pytest.raises(DataError, match=r"u\.user, row 1, field age: "):
        read("movielens-100k", tmp_path)


def test_cut_zip(ratings, tmp_path):
    folder = write_1m(tmp_path / "ml-1m", ratings)
    path = zipped(folder, tmp_path / "ml-1m.zip")
    path.write_bytes(path.read_bytes()[:-30])
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"ml-1m\.zip: not an intact zip"):
        read("movielens-1m", path)
