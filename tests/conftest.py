"""Every test runs with uninitialised memory filled with NaN: torch's allocations and the kernels' scratch memory."""

import pytest
import torch

from m3oe_fast import _extension


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    _extension.load().poison_workspace(True)
    yield
    torch.use_deterministic_algorithms(False)
    _extension.load().poison_workspace(False)
