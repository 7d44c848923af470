"""Logits from x, without gradients: the kernels alone, no embedding."""

from collections.abc import Callable


def test_network(measure: Callable[[str], None]) -> None:
    measure("network")
