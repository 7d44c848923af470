"""The Triton kernels on the CPU, interpreted: `TRITON_INTERPRET=1 pytest tests/interpreted`.

A process of its own, as Triton decides when it defines a kernel. Its interpreter runs every program one operation after
the other in NumPy: right, but slow, so cases here are smaller than those of the compiled kernels.
"""

from __future__ import annotations

import pytest

from m3oe_fast import kernels
from m3oe_fast.ops import load


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if kernels.installed() and kernels.interpreted():
        load("triton")  # the raw ops are there for a test that runs alone, too
        return
    for item in items:
        if "interpreted" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="needs Triton and TRITON_INTERPRET=1"))


@pytest.fixture(autouse=True)
def triton_ran(request: pytest.FixtureRequest):
    """Every test here launches Triton kernels, or says that it does not."""
    before = kernels.launches()
    yield
    if request.node.get_closest_marker("launches_nothing") is None:
        assert kernels.launches() > before
