"""Training batches: each row once, the same from any start and with any prefetching, in bounded memory."""

import json
import math
import subprocess
import sys
import threading
from itertools import chain, islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3oe_fast.data import reader as reading
from m3oe_fast.data import store
from m3oe_fast.data.dataset import Part
from m3oe_fast.data.reader import Reader
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import CheckpointError, DataError

ROWS = 101
BLOCK = 8
SCHEMA = Schema(("item", "domain"), (ROWS, 4), ("age",), ("a", "b", "c"), ("t",), ("tags",), (ROWS,), ("sum",), True)


def make_columns(rows=ROWS):
    """Every column tells the number of its row."""
    number = np.arange(rows)
    lengths = number % 4
    return {
        "id:item": number.astype(np.uint8),
        "id:domain": (number % 3 + 1).astype(np.uint8),
        "dense": number.astype(np.float32)[:, None],
        "domain": (number % 3).astype(np.uint8),
        "label": (number % 2).astype(np.float32)[:, None],
        "weight": number.astype(np.float32),
        "bag:tags": (np.repeat(number, lengths), np.concatenate([[0], np.cumsum(lengths)])),
    }


def numbers_of(batch):
    """The rows of a batch, of which every column must tell the same."""
    number = batch.ids[:, 0]
    assert torch.equal(batch.ids[:, 1].long(), number.long() % 3 + 1)
    assert torch.equal(batch.dense[:, 0], number.float())
    assert torch.equal(batch.domain, number.long() % 3)
    assert torch.equal(batch.label[:, 0], number.float() % 2)
    assert torch.equal(batch.row_weight, number.float())
    lists = [batch.bags[0].values[a:b].tolist() for a, b in pairwise(batch.bags[0].offsets)]
    assert lists == [[row] * (row % 4) for row in number.tolist()]
    return number.tolist()


def flat(lists):
    return list(chain.from_iterable(lists))


def epoch_of(reader, number=0, start=0):
    return [numbers_of(batch) for batch in reader.epoch(number, start)]


def make_skip(share, seed=0):
    return np.random.default_rng(seed).random(ROWS) < share


@pytest.fixture(scope="module", params=[24, 30, 1000])
def part(request, tmp_path_factory):
    """From a file whose segments end between blocks, within blocks, or of one segment; blocks are small."""
    path = tmp_path_factory.mktemp("part") / "p"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SEGMENT_ROWS", request.param)
        with store.PartWriter(path) as writer:
            writer.append(make_columns())
    file = store.PartFile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_ROWS", BLOCK)
        yield Part(file.segments, SCHEMA, "p", file.copyto)


@given(
    batch_size=st.integers(1, 120),
    seed=st.integers(0, 3),
    share=st.sampled_from([0, 0.1, 0.9]),
    window=st.sampled_from([0, 1, 8, 20, 40, 100, 101, 500]),
    epoch=st.integers(0, 3),
    prefetch=st.integers(0, 3),
)
def test_every_kept_row_once_in_full_batches(part, batch_size, seed, share, window, epoch, prefetch):
    skip = make_skip(share)
    reader = Reader(part, batch_size, seed, skip=skip, window=window, prefetch=prefetch)
    found = epoch_of(reader, epoch)
    assert sorted(flat(found)) == np.flatnonzero(~skip).tolist()
    assert reader.rows == np.count_nonzero(~skip)
    assert len(found) == reader.steps_per_epoch
    assert {len(batch) for batch in found[:-1]} <= {batch_size}
    assert 0 < len(found[-1]) <= batch_size


@pytest.mark.parametrize("window", [0, 8, 24])
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("batch_size", [5, 7, 30])
def test_any_start_gives_the_rest_of_the_epoch(part, window, prefetch, batch_size):
    skip = make_skip(0.3)
    whole = epoch_of(Reader(part, batch_size, 3, skip=skip, window=window, prefetch=0), 2)
    reader = Reader(part, batch_size, 3, skip=skip, window=window, prefetch=prefetch)
    for start in range(len(whole) + 1):
        assert epoch_of(reader, 2, start) == whole[start:]


def test_windows_before_the_start_are_not_read(part, monkeypatch):
    read = []
    monkeypatch.setattr(Part, "read", lambda self, ranges, read_=Part.read: read.append(ranges) or read_(self, ranges))
    reader = Reader(part, 4, 0, window=16, prefetch=0)
    epoch_of(reader)
    whole = read.copy()
    assert len(whole) == math.ceil(ROWS / 16)
    assert sorted(flat(whole)) == [(start, min(start + BLOCK, ROWS)) for start in range(0, ROWS, BLOCK)]
    read.clear()
    assert len(list(islice(reader.epoch(0, 20), 1))) == 1
    assert read == whole[5:6]


def test_all_rows_at_once_is_the_permutation_of_the_part(part):
    skip = make_skip(0.2)
    order = part.permutation(5, 1)
    order = order[~skip[order]]
    for window in (0, ROWS, 10 * ROWS):
        reader = Reader(part, 10, 5, skip=skip, window=window)
        assert reader.window == 0
        assert flat(epoch_of(reader, 1)) == order.tolist()


@pytest.mark.parametrize("window", [0, 16, 40])
def test_seeds_and_epochs_differ(part, window):
    readers = [Reader(part, ROWS, seed, window=window) for seed in range(3)]
    orders = {tuple(epoch_of(reader, number)[0]) for reader in readers for number in range(3)}
    assert len(orders) == 9


def test_windows_mix_blocks_from_everywhere(part):
    """Not the neighbours of the file, nor the blocks of an earlier epoch."""
    reader = Reader(part, 32, 0, window=32)
    blocks = [{row // BLOCK for row in batch} for batch in epoch_of(reader, 0)]
    assert max(map(len, blocks)) >= 4
    assert blocks != [{row // BLOCK for row in batch} for batch in epoch_of(reader, 1)]
    for batch in epoch_of(reader):
        assert batch != sorted(batch)


def test_window_whose_rows_are_all_left_out(part):
    skip = np.ones(ROWS, bool)
    skip[[3, 50, 51]] = False
    assert sorted(flat(epoch_of(Reader(part, 2, 0, skip=skip, window=8)))) == [3, 50, 51]


def test_batches_own_writable_memory(part):
    reader = Reader(part, 7, 0, window=16, prefetch=0)
    whole = epoch_of(reader)
    found = []
    for batch in reader.epoch(0):
        found.append(numbers_of(batch))
        batch.map(lambda tensor: tensor.fill_(0))
    assert found == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"seed": -1}, "seed -1"),
        ({"window": -1}, "window -1"),
        ({"prefetch": -1}, "prefetch -1"),
        ({"skip": np.zeros(3, bool)}, r"skip is bool \(3,\), must be bool \(101,\)"),
        ({"skip": np.zeros(ROWS, int)}, r"skip is int64 \(101,\), must be bool"),
    ],
)
def test_arguments_out_of_range(part, arguments, message):
    with pytest.raises(ValueError, match=message):
        Reader(part, **{"batch_size": 4, "seed": 0, **arguments})


def test_no_row_left(part):
    with pytest.raises(DataError, match="no training rows are left"):
        Reader(part, 4, 0, skip=np.ones(ROWS, bool))


@pytest.mark.parametrize(("number", "start"), [(0, -1), (0, 27), (-1, 0)])
def test_batch_that_does_not_exist(part, number, start):
    with pytest.raises(ValueError, match="an epoch has 26 batches"):
        Reader(part, 4, 0).epoch(number, start)


# Position ------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_state_goes_on_behind_the_last_batch_handed_out(part, window, prefetch):
    whole = epoch_of(Reader(part, 10, 1, window=window), 4)
    first = Reader(part, 10, 1, window=window, prefetch=prefetch)
    batches = first.epoch(4)
    for taken in range(len(whole) + 1):
        second = Reader(part, 10, 1, window=window, prefetch=1)
        if taken:
            assert numbers_of(next(batches)) == whole[taken - 1]
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert second.position == (4, taken)
            assert epoch_of(second, *second.position) == whole[taken:]
    batches.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed 2, here it is 1; resume with the seed of the run"),
        ({"batch_size": 9}, "batch_size 9, here it is 10"),
        ({"window": 0}, "window 0, here it is 16"),
        ({"rows": 100}, "rows 100, here it is 101"),
        ({"rows": None}, "rows None, here it is 101"),
        ({"batch": 12}, "epoch 0, batch 12 of 11; the checkpoint is damaged"),
        ({"batch": -1}, "batch -1 of 11"),
        ({"epoch": "3"}, "epoch 3, batch 0 of 11"),
        ({"epoch": True}, "epoch True"),
    ],
)
def test_state_of_another_reader(part, change, message):
    reader = Reader(part, 10, 1, window=16)
    with pytest.raises(CheckpointError, match=message):
        reader.load_state_dict({**reader.state_dict(), **change})
    assert reader.position == (0, 0)


# The thread ----------------------------------------------------------------------------------


def prefetching():
    return [thread for thread in threading.enumerate() if "prefetch" in thread.name]


@pytest.mark.parametrize("window", [0, 16])
def test_stopping_early_ends_the_thread(part, window):
    reader = Reader(part, 2, 0, window=window, prefetch=2)
    batches = reader.epoch(0)
    next(batches)
    assert len(prefetching()) == 1
    batches.close()
    assert prefetching() == []
    assert len(epoch_of(reader)) == reader.steps_per_epoch
    assert prefetching() == []


def test_no_thread_without_prefetching(part):
    batches = Reader(part, 2, 0, prefetch=0).epoch(0)
    next(batches)
    assert prefetching() == []


@pytest.mark.parametrize("prefetch", [0, 2])
def test_file_that_shrinks_meanwhile(tmp_path, monkeypatch, prefetch):
    monkeypatch.setattr(reading, "BLOCK_ROWS", 1 << 12)
    rows = 1 << 15
    columns = {"domain": np.zeros(rows, np.uint8), "label": np.zeros((rows, 1), np.float32)}
    with store.PartWriter(tmp_path / "p") as writer:
        writer.append(columns)
    file = store.PartFile(tmp_path / "p")
    part = Part(file.segments, Schema((), (), (), ("a",), ("t",)), "p", file.copyto)
    batches = Reader(part, 100, 0, window=1 << 12, prefetch=prefetch).epoch(0)
    next(batches)
    (tmp_path / "p").write_bytes(b"")
    with pytest.raises(DataError, match="p: shorter than when it was opened; prepare the log again"):
        list(batches)
    assert prefetching() == []


@pytest.mark.parametrize("prefetch", [0, 2])
def test_pinning_reaches_every_tensor_in_the_thread(part, monkeypatch, prefetch):
    pinned, names = [], set()

    def pin(tensor):
        pinned.append(tensor.dtype)
        names.add(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    reader = Reader(part, ROWS, 0, prefetch=prefetch, pin=True)
    assert len(epoch_of(reader)) == 1
    assert len(pinned) == 7
    assert names == {"m3oe_fast prefetch" if prefetch else threading.current_thread().name}


# Memory --------------------------------------------------------------------------------------

CHILD = r"""
import json, re, sys
from contextlib import suppress
from pathlib import Path
import numpy as np
from m3oe_fast.data.dataset import Part
from m3oe_fast.data.reader import Reader
from m3oe_fast.data.schema import Schema
from m3oe_fast.data.store import PartFile

path, window = Path(sys.argv[1]), int(sys.argv[2])
fields = tuple("abcdefg")
schema = Schema(fields, (1 << 20,) * 7, ("x",), ("d",), ("t",))

def resident(field):
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)[1])

def pass_over(batches):
    rows = most = 0
    for batch in batches:
        rows += len(batch.domain)
        most = max(most, resident("VmRSS"))
    return rows, most

# What reading brings along once and for all: torch, threads.
small = {f"id:{field}": np.zeros(8192, np.uint32) for field in fields}
small |= {"dense": np.zeros((8192, 1), np.float32), "domain": np.zeros(8192, np.uint8)}
small["label"] = np.zeros((8192, 1), np.float32)
pass_over(Reader(Part(small, schema, "small"), 4096, 0).epoch(0))

before, watermark = resident("VmRSS"), False
with suppress(OSError):  # some systems do not let a process reset its watermark; then the samples have to do
    Path("/proc/self/clear_refs").write_text("5")
    watermark = True
file = PartFile(path)
part = Part(file.segments, schema, "p", file.copyto)
opened = resident("VmHWM" if watermark else "VmRSS")
rows, most = pass_over(part.batches(4096) if window < 0 else Reader(part, 4096, 0, window=window).epoch(0))
most = max(most, resident("VmHWM")) if watermark else most
print(json.dumps({"rows": rows, "opened": opened - before, "read": most - before}))
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """3 M rows of 37 bytes: 111 MB."""
    path = tmp_path_factory.mktemp("large") / "p"
    rng = np.random.default_rng(0)
    rows = 1 << 18
    with store.PartWriter(path) as writer:
        for _ in range(12):
            columns = {f"id:{field}": rng.integers(0, 1 << 20, rows, np.uint32) for field in "abcdefg"}
            columns["dense"] = np.ones((rows, 1), np.float32)
            columns["domain"] = np.zeros(rows, np.uint8)
            columns["label"] = np.ones((rows, 1), np.float32)
            writer.append(columns)
    return path


def memory_of(path, window):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), str(window)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


LIMIT = 40 << 20
"""Opening takes 10 MB for what it checks at a time, a window of 98,304 rows 4 MB; the file is 111 MB."""


@pytest.mark.parametrize("window", [100_000, -1], ids=["windows", "stored order"])
def test_memory_is_bounded_by_the_window_not_by_the_file(large_file, window):
    found = memory_of(large_file, window)
    assert found["rows"] == 12 << 18
    assert found["opened"] < LIMIT
    assert found["read"] < LIMIT


def test_memory_limit_would_notice_a_file_that_is_resident(large_file):
    """What the test above forbids, measured in the same way."""
    assert memory_of(large_file, 0)["read"] > 2 * LIMIT
