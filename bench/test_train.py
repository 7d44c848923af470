"""Forward from ids, loss and backward."""

from collections.abc import Callable


def test_train(measure: Callable[[str], None]) -> None:
    measure("train")
