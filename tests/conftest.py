"""Every test runs with uninitialised memory filled with NaN: torch's allocations and the kernels' scratch memory.

Generated examples have no time limit, so a busy machine fails no test, and are the same every time under CI.
"""

import os
import signal

import pytest
import torch
from hypothesis import settings

from m3oe_fast import _extension

settings.register_profile("steady", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("steady")

# What a script starts in the background ignores Ctrl-C, and so would every process that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True)
    _extension.load().poison_workspace(True)
    yield
    torch.use_deterministic_algorithms(False)
    _extension.load().poison_workspace(False)


@pytest.fixture(scope="module")
def one_thread():
    """For tests on sizes at which threads cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
