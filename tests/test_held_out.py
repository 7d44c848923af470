"""The rows of the fusion weights: how many, which, and in which batches."""

import dataclasses

import numpy as np
import pytest

from m3oe_fast.errors import DataError
from m3oe_fast.training import TrainOptions, held_out
from m3oe_fast.training.held_out import HeldOut
from m3oe_fast.training.options import HELD_OUT_MODES
from tests.test_trainer import make_dataset

OPTIONS = TrainOptions(batch_size=64, outer_fraction=0.2)


def make(rows=500, **options):
    return HeldOut(make_dataset(train=rows).train, dataclasses.replace(OPTIONS, **options), "made-up")


@pytest.mark.parametrize("bilevel", ["off", "joint", "published"])
def test_no_row_is_held_out_where_the_mode_has_no_use_for_it(bilevel):
    assert make(bilevel=bilevel).mask is None


@pytest.mark.parametrize("bilevel", HELD_OUT_MODES)
def test_about_the_fraction_is_held_out_and_the_seed_decides_which(bilevel):
    first, again, other = make(bilevel=bilevel), make(bilevel=bilevel), make(bilevel=bilevel, seed=1)
    assert 70 < first.mask.sum() < 130
    assert np.array_equal(first.mask, again.mask)
    assert not np.array_equal(first.mask, other.mask)


def test_batches_hold_the_rows_of_the_mask_and_no_other():
    part = make_dataset().train
    chosen = HeldOut(part, OPTIONS, "made-up")
    wanted = {tuple(row) for row in part.take(np.flatnonzero(chosen.mask)).dense.tolist()}
    found = {tuple(row) for number in range(8) for row in chosen.batch(number).dense.tolist()}
    assert found <= wanted
    assert len(found) > 0.9 * len(wanted)
    assert len(chosen.batch(0).domain) == chosen.batch_rows == 64


def test_batches_come_in_any_order_the_same():
    one, other = make(), make()
    forwards = [one.rows(number) for number in range(5)]
    backwards = [other.rows(number) for number in reversed(range(5))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))


def test_memory_is_bounded_by_a_number_of_rows(monkeypatch):
    monkeypatch.setattr(held_out, "MAX_ROWS", 50)
    assert 25 < make(outer_fraction=0.9).mask.sum() < 80


def test_the_choice_is_made_in_chunks_of_any_size(monkeypatch):
    whole = make().mask
    monkeypatch.setattr(held_out, "_CHUNK", 7)
    assert np.array_equal(make().mask, whole)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_both_levels_keep_a_row(fraction):
    mask = make(rows=2, outer_fraction=fraction).mask
    assert mask.sum() == 1


def test_one_row_cannot_be_divided():
    with pytest.raises(DataError, match="use bilevel off or joint"):
        make(rows=1)
