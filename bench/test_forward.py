"""Logits from ids, without gradients."""

from collections.abc import Callable


def test_forward(measure: Callable[[str], None]) -> None:
    measure("forward")
