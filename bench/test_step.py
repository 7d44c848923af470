"""The whole training step: zero_grad, forward, loss, backward, Adam."""

from collections.abc import Callable


def test_step(measure: Callable[[str], None]) -> None:
    measure("step")
