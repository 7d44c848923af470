"""Tiles: every row has a place in a tile of its own domain, whatever the domains are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3oe_fast.models.tiles import MOST_ROWS, Tiles


def check(domain: torch.Tensor, num_domains: int) -> Tiles:
    tiles = Tiles.of(domain, num_domains)
    batch = len(domain)
    assert len(tiles.place.unique()) == batch == len(tiles.place)
    assert torch.equal(tiles.domain[tiles.place // tiles.rows], domain.long())
    values = torch.randn(batch, 3)
    spread = tiles.spread(values)
    assert spread.shape == (len(tiles.domain), tiles.rows, 3)
    assert torch.equal(tiles.collect(spread), values)
    torch.testing.assert_close(spread.abs().sum(), values.abs().sum())  # the padding is zero
    return tiles


@settings(max_examples=150)
@given(st.data(), st.integers(1, 9), st.integers(0, 300))
def test_any_batch(data, num_domains, batch):
    seed = data.draw(st.integers(0, 2**31))
    present = data.draw(st.lists(st.integers(0, num_domains - 1), min_size=1))
    drawn = torch.randint(len(present), (batch,), generator=torch.Generator().manual_seed(seed))
    check(torch.tensor(present)[drawn], num_domains)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("counts", "name"),
    [([4096], "one"), ([0, 0, 4096], "last"), ([1] * 511, "one-each"), ([4000, 0, 95, 1], "skewed"), ([0, 0], "empty")],
)
def test_uneven_domains(counts, name, dtype):
    domain = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    check(domain[torch.randperm(len(domain))].to(dtype), len(counts))


def test_padding_stays_below_a_quarter_of_the_batch():
    for batch in (1, 12, 400, 4096, 65_536):
        for num_domains in (1, 3, 40, 5000):
            tiles = Tiles.of(torch.arange(batch) % num_domains, num_domains)
            assert tiles.rows <= MOST_ROWS and batch <= len(tiles.domain) * tiles.rows <= 1.25 * batch


def test_rows_keep_their_order_within_a_domain():
    domain = torch.randint(3, (500,))
    place = Tiles.of(domain, 3).place
    for d in range(3):
        own = place[domain == d]
        assert torch.equal(own, own.sort().values)


def test_gradients_pass_through_untouched():
    tiles = Tiles.of(torch.randint(4, (50,)), 4)
    values, weight = torch.randn(50, 2, requires_grad=True), torch.randn(50, 2)
    (tiles.collect(tiles.spread(values)) * weight).sum().backward()
    assert torch.equal(values.grad, weight)
