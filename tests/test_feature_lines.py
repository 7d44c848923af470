"""Lines of features: read alike in blocks of any size, and no damage gets past with anything but a DataError."""

import numpy as np
import pytest

from m3oe_fast.data import feature_lines
from m3oe_fast.data.feature_columns import FieldNames, Places, fold, stack
from m3oe_fast.data.feature_lines import read_lines
from m3oe_fast.errors import DataError

COLUMNS = ("key", "n", "features")
FIELDS = (b"7", b"109_14")


def features_of(*features):
    return f"{len(features)}," + "\x01".join("{}\x02{}\x03{}".format(*feature) for feature in features)


def read(path, text, fields=FIELDS, valued=FIELDS):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    found = []
    for lines in read_lines(path, COLUMNS):
        features = lines.features(fields, valued)
        keys = lines.keys("key")
        found += [
            (int(lines.first + row), keys[row], fields[place], int(code), float(value))
            for row, place, code, value in zip(*features, strict=True)
        ]
    return found


LINES = [
    f"a,{features_of(('7', 1, '1.0'), ('109_14', 2147483647, '0.69315'))}",
    "bb,0,",
    f"ccc,{features_of(('unknown_field', 'x', 'y'), ('', 1, 1), ('109_14', 3, '1e-3'), ('7', 0, '-2'))}",
    f",{features_of(('77', 5, '1'), ('7', 6, '.5'))}",
    f"é,{features_of(('7', 8, '123456789.123456789'))}",
]
FOUND = [
    (0, b"a", b"7", 1, 1.0),
    (0, b"a", b"109_14", 2147483647, 0.69315),
    (2, b"ccc", b"109_14", 3, 1e-3),
    (2, b"ccc", b"7", 0, -2.0),
    (3, b"", b"7", 6, 0.5),
    (4, "é".encode(), b"7", 8, 123456789.123456789),
]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_are_the_same_in_blocks_of_any_size(tmp_path, monkeypatch, block, end):
    monkeypatch.setattr(feature_lines, "BLOCK_BYTES", block)
    assert read(tmp_path / "x", "\n".join(LINES) + end) == FOUND


def test_values_that_nobody_asks_for_are_not_read(tmp_path):
    line = f"a,{features_of(('7', 1, 'no number'), ('109_14', 2, '3'))}\n"
    assert read(tmp_path / "x", line, valued=FIELDS[1:]) == [(0, b"a", b"7", 1, 0.0), (0, b"a", b"109_14", 2, 3.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,1", "row 2: 2 columns where 3 are expected .key, n, features."),
        ("a,1,7\x021\x031,", "row 2: 4 columns"),
        ("a,1,", "row 2, field n: says 1 features, 0 follow"),
        ("a,2,7\x021\x031", "row 2, field n: says 2 features, 1 follow"),
        ("a,x,7\x021\x031", "row 2, field n: 'x' is no number in range"),
        ("a,-1,7\x021\x031", "row 2, field n: '-1' is no number in range"),
        ("a,,7\x021\x031", "row 2, field n: '' is no number in range"),
        ("a,1,7\x021", r"row 2, field features: a feature is not field\\x02id\\x03value"),
        ("a,1,7\x031\x021", "row 2, field features: a feature is not"),
        ("a,1,7\x021\x031\x031", "row 2, field features: a feature is not"),
        ("a,2,7\x021\x031\x01", "row 2, field features: a feature is not"),
        ("a,1,\x017\x021\x031", "row 2, field features: a feature is not"),
        ("a,1,7\x027\x021\x031", "row 2, field features: a feature is not"),
        ("a,1,7\x022147483648\x031", "row 2, field features: '2147483648' is no number in range"),
        ("a,1,7\x021.5\x031", "row 2, field features: '1.5' is no number in range"),
        ("a,1,7\x021\x03nan", "row 2, field features: 'nan' is no number in range"),
        ("a,1,7\x021\x03" + "1" * 50, "row 2, field features: '1111"),
        ("a,1,7\x021\x03", "row 2, field features: '' is no number in range"),
        ("a,1,7\x021\x03\xff", "row 2, field features: 'ÿ' is no number in range"),
        ("k" * 65 + ",0,", "row 2, field key: is longer than 64 characters"),
        ("", "row 2: 1 columns"),
    ],
)
def test_faults(tmp_path, line, message):
    good = f"a,{features_of(('7', 1, '1.0'))}\n"
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "x", f"{good}{line}\n{good}")
    assert "\n" not in str(caught.value)
    assert "fetch the file again" in str(caught.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="x: is empty; fetch"):
        read(tmp_path / "x", "")
    with pytest.raises(DataError, match="gone: cannot be read: No such file"):
        list(read_lines(tmp_path / "gone", COLUMNS))
    monkeypatch.setattr(feature_lines, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(feature_lines, "MAX_LINE_BYTES", 1 << 20)
    with pytest.raises(DataError, match="a line is longer than 1 MB"):
        read(tmp_path / "x", b"x" * ((1 << 20) + 5000))


def test_damage_is_refused_or_stays_in_its_row(tmp_path):
    rng = np.random.default_rng(0)
    good = "\n".join(LINES * 3).encode() + b"\n"
    whole = read(tmp_path / "x", good)
    kept = 0
    for _ in range(400):
        data = bytearray(good)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.choice([0, 1, 2, 3, 10, 44, 48, 57, 255])
        try:
            found = read(tmp_path / "x", bytes(data))
        except DataError:
            continue
        pairs = zip(good.split(b"\n"), bytes(data).split(b"\n"), strict=False)
        same = {row for row, (ours, theirs) in enumerate(pairs) if ours == theirs}
        assert [feature for feature in found if feature[0] in same] == [one for one in whole if one[0] in same]
        kept += 1
    assert 20 < kept < 300


def test_bags_keep_the_ids_of_the_greatest_values_and_the_mean_of_all(tmp_path):
    names = FieldNames(single=("7",), bags=("b",), valued=("7", "b"), most=2)
    bag = [("b", 1, "1"), ("7", 9, "4"), ("b", 2, "3"), ("b", 3, "3"), ("b", 4, "2"), ("7", 8, "5")]
    (tmp_path / "x").write_text(f"k,{features_of(*bag)}\nk,0,\nk,{features_of(('b', 5, '7'))}\n")
    columns = stack([fold(lines, names) for lines in read_lines(tmp_path / "x", COLUMNS)])
    assert columns["7"].tolist() == [9, -1, -1]
    assert columns["b"].tolist() == [[2, 3], [-1, -1], [5, -1]]
    assert columns["D7"][0] == 4
    assert columns["Db"][[0, 2]].tolist() == [2.25, 7]
    assert np.isnan(columns["D7"][1:]).all()
    assert np.isnan(columns["Db"][1])


def test_keys_of_other_lengths_are_unknown():
    places = Places(np.array([b"bb", b"aa", b"bb", b"cc"]))
    assert places.of(np.array([b"aa", b"bb", b"cc", b"aaa", b"a", b"", b"zz", b"ccc"])).tolist() == [
        *(1, 2, 3),
        *(-1,) * 5,
    ]
