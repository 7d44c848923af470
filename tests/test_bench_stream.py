"""`bench.stream`: both ways read the same rows, which the gate sees, and the document has its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# Last, so that an installed m3oe_fast comes before the source folder.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import child, generated, report, stream
from bench.gate import GateError
from m3oe_fast.data import DataOptions, load_options

ROWS = 40_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("stream")
    generated.write(place / "log", ROWS, bags=False)
    assert stream.prepare(place) == ROWS
    return place


def options_of(place, *more):
    return stream._parse(["--rows", str(ROWS), "--window", "16384", "--data_path", str(place / "prepared"), *more])


def test_both_ways_read_every_training_row(place):
    dataset = load_options(DataOptions(data=f"prepared:{place / 'prepared'}"))
    options = options_of(place)
    windows, whole = (stream.read(dataset, window, options) for window in (options.window, ROWS))
    assert windows["rows"] == whole["rows"] == len(dataset.train) > options.window
    assert windows["checksum"] == whole["checksum"] > 0


def test_document_of_a_run(place, monkeypatch):
    monkeypatch.setattr(child, "run", lambda module, argv: json.loads(json.dumps(stream.run_one(stream._parse(argv)))))
    options = options_of(place, "--rounds", "2")
    argv = ["--rows", str(ROWS), "--window", "16384", "--rounds", "2"]
    document = json.loads(json.dumps(stream.run(argv, options)))
    assert [row["task"] for row in document["measurements"]] == ["read windows", "read memory"]
    assert all(len(row["all_rows_per_second"]) == 2 for row in document["measurements"])
    assert "data_path" not in document["settings"]
    text = report.render(document)
    assert "| read, windows |" in text
    assert "| read, whole" in text
    assert str(place) not in json.dumps(document)


def test_gate_refuses_ways_that_read_other_rows(place, monkeypatch):
    def run(module, argv):
        row = {"task": argv[-1], "what": "read", "way": argv[-1][5:], "rows": 1, "rows_per_second": 1, "peak_bytes": 1}
        return {"measurements": [row | {"checksum": len(argv[-1])}]}

    monkeypatch.setattr(child, "run", run)
    with pytest.raises(GateError, match="do not read the same rows"):
        stream.run([], options_of(place, "--rounds", "1"))
