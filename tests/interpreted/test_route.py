"""Counting sort by domain: against torch's stable sort."""

from __future__ import annotations

import pytest
import torch

from m3oe_fast import kernels


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rows", "domains", "present"), [(0, 3, 3), (1, 1, 1), (5000, 3, 3), (1024, 7, 2), (1025, 50, 49), (3000, 1, 1)]
)
def test_order_counts_and_labelled_rows(rows, domains, present, dtype):
    from m3oe_fast.kernels.flags import of
    from m3oe_fast.kernels.route import Routed

    generator = torch.Generator().manual_seed(0)
    domain = torch.randint(present, (rows,), generator=generator).to(dtype)
    label = torch.rand(rows, 3, generator=generator)
    label[torch.rand(rows, 3, generator=generator) < 0.4] = float("nan")
    routed = Routed(domain, domains, 3, of(domain.device), label)
    assert torch.equal(routed.order.long(), torch.argsort(domain, stable=True))
    assert torch.equal(routed.counts.long(), torch.bincount(domain.long(), minlength=domains))
    seen = torch.zeros(domains, 3, dtype=torch.int64).index_add(0, domain.long(), (~label.isnan()).long())
    assert torch.equal(routed.labelled.sum(0).long(), seen)
    kernels.check_inputs(domain.device)  # raises if a flag was set
