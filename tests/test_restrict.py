"""Views of some domains and tasks of a log: the rows they hold, and how they are read."""

import numpy as np
import pytest
import torch

from m3oe_fast.data import restrict as module
from m3oe_fast.data.reader import Reader
from m3oe_fast.data.restrict import labelled_rows, restrict
from tests.test_seesaw import DOMAINS, TASKS, make_dataset, make_part

pytestmark = pytest.mark.usefixtures("one_thread")


def view(dataset, domains, tasks):
    return restrict(dataset, domains, tasks, labelled_rows(dataset, domains, tasks))


def pair(dataset, domain=1, task=1):
    return view(dataset, [domain], [task])


def test_a_pair_holds_its_labelled_rows_and_nothing_else():
    dataset = make_dataset()
    part, whole = pair(dataset).train, dataset.train
    rows = np.flatnonzero((whole.domain == 1) & ~np.isnan(whole.label[:, 1]))
    assert len(part) == len(rows) > 50
    np.testing.assert_array_equal(part.label, whole.label[rows, 1:])
    assert not part.domain.any()
    np.testing.assert_array_equal(part.users(5, 20), whole.users(0, len(whole))[rows[5:20]])
    assert len(part.users(0, 0)) == 0
    wanted, batch = whole.take(rows[[7, 3, 3]]), part.take(np.array([7, 3, 3]))
    assert torch.equal(batch.ids, wanted.ids)
    assert torch.equal(batch.dense, wanted.dense)
    assert torch.equal(batch.row_weight, wanted.row_weight)
    assert torch.equal(batch.bags[0].values, wanted.bags[0].values)
    assert torch.equal(batch.label, wanted.label[:, 1:])
    assert batch.domain.tolist() == [0, 0, 0]


def test_every_label_belongs_to_one_pair():
    dataset = make_dataset()
    found = [labelled_rows(dataset, [d], [t]) for d in range(3) for t in range(2)]
    for name in ("train", "val", "test"):
        assert sum(len(rows[name]) for rows in found) == (~np.isnan(getattr(dataset, name).label)).sum()


@pytest.mark.parametrize("window", [0, 1 << 14])
def test_a_reader_reads_it_like_any_other_part(window):
    part = pair(make_dataset()).train
    seen = np.concatenate([batch.dense.numpy() for batch in Reader(part, 32, seed=0, window=window).epoch(1)])
    np.testing.assert_array_equal(np.sort(seen[:, 0]), np.sort(part.take(np.arange(len(part))).dense.numpy()[:, 0]))
    stored = np.concatenate([batch.dense.numpy() for batch in part.batches(10)])
    np.testing.assert_array_equal(stored, part.take(np.arange(len(part))).dense.numpy())


def test_its_windows_hold_what_it_takes():
    part = pair(make_dataset()).train
    table = part.read([(4, 9), (0, 2)]).to_batch()
    taken = part.take(np.array([4, 5, 6, 7, 8, 0, 1]))
    for one, other in zip((*table[:5], *table.bags[0]), (*taken[:5], *taken.bags[0]), strict=True):
        assert torch.equal(one, other)
    assert len(part.read([])) == 0


def test_a_log_without_users_has_none():
    part = make_part(50, 0, users=False)
    assert pair(make_dataset(train=100, test=part)).test.users(0, 3) is None


def test_pairs_are_told_apart_by_identity():
    dataset = make_dataset()
    assert pair(dataset, 1, 0).identity != pair(dataset, 1, 1).identity != dataset.identity
    assert pair(dataset).schema.domains == ("<25",)


@pytest.mark.parametrize(("domains", "tasks"), [((1,), (0, 1)), ((0, 1, 2), (1,)), ((0, 2), (0, 1)), ((2,), (1,))])
def test_a_view_holds_the_labelled_rows_of_its_domains_and_tasks(domains, tasks):
    dataset = make_dataset()
    part_of = view(dataset, domains, tasks)
    whole, part = dataset.train, part_of.train
    label = whole.label[:, list(tasks)]
    rows = np.flatnonzero(np.isin(whole.domain, domains) & ~np.isnan(label).all(1))
    assert len(part) == len(rows) > 30 and part_of.counts["train"]["rows"] == len(rows)
    np.testing.assert_array_equal(part.domain, np.searchsorted(domains, whole.domain[rows]))
    np.testing.assert_array_equal(part.label, label[rows])
    batch, same = part.take(np.array([3, 0])), whole.take(rows[[3, 0]])
    assert batch.domain.tolist() == part.domain[[3, 0]].tolist() and batch.domain.dtype == torch.int64
    torch.testing.assert_close(batch.label, same.label[:, list(tasks)], equal_nan=True)
    assert torch.equal(batch.ids, same.ids) and torch.equal(batch.row_weight, same.row_weight)
    assert all(torch.equal(a, b) for x, y in zip(batch.bags, same.bags, strict=True) for a, b in zip(x, y, strict=True))
    assert part_of.schema.domains == tuple(DOMAINS[d] for d in domains)
    assert part_of.schema.tasks == tuple(TASKS[t] for t in tasks)
    read = part.read([(0, 2), (5, 6)])
    assert read.domain.tolist() == part.domain[[0, 1, 5]].tolist()


def test_views_of_other_parts_of_a_log_are_other_logs():
    dataset = make_dataset()
    views = [view(dataset, d, t) for d, t in (((0,), (0, 1)), ((0,), (0,)))]
    assert len({log.identity for log in (*views, dataset)}) == 3
    assert views[0].name == "made-up (home, all tasks)" and views[1].name == "made-up (home, click)"


@pytest.mark.parametrize("chunk", [1, 7, 1 << 18])
def test_rows_are_found_and_users_read_in_pieces(monkeypatch, chunk):
    dataset = make_dataset()
    whole, pieces = view(dataset, [1], [0, 1]), []
    monkeypatch.setattr(module, "_CHUNK", chunk)
    in_pieces = view(dataset, [1], [0, 1])
    users = in_pieces.train.users(0, len(in_pieces.train))
    np.testing.assert_array_equal(users, whole.train.users(0, len(whole.train)))
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(
            labelled_rows(dataset, [1], [0, 1])[part],
            np.flatnonzero((getattr(dataset, part).domain == 1) & ~np.isnan(getattr(dataset, part).label).all(1)),
        )
    real = dataset.train.users
    monkeypatch.setattr(dataset.train, "users", lambda start, stop: pieces.append(stop - start) or real(start, stop))
    in_pieces.train.users(3, 9)
    assert max(pieces) <= chunk


def test_a_domain_without_labels_is_an_empty_view():
    dataset = make_dataset()
    dataset.train.label[dataset.train.domain == 1] = np.nan
    empty = view(dataset, [1], [0, 1])
    assert len(empty.train) == 0 and empty.counts["train"]["rows"] == 0 and len(empty.train.users(0, 0)) == 0
    assert list(empty.train.batches(8)) == [] and len(empty.test) > 50
