"""What a run remembers between two epochs: a record per epoch, the early stopper, the best weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Epoch:
    """What one finished epoch left in the history.

    Attributes:
        epoch: counted from 1.
        train_loss: mean over the rows of their batch's loss.
        samples: rows the network was trained on.
        seconds, cpu_seconds: wall and process time of training and validation together.
        validation_seconds: the validation's part of ``seconds``.
        val: ``Scores.to_dict`` of the validation part.
        fusion: the fusion weights after the sigmoid.
    """

    epoch: int
    train_loss: float
    samples: int
    seconds: float
    cpu_seconds: float
    validation_seconds: float
    val: dict[str, dict[str, float | None]]
    fusion: dict[str, float | list[float]]

    @property
    def samples_per_second(self) -> float:
        """Rows per second of wall time, validation included."""
        return self.samples / self.seconds

    def to_row(self) -> dict[str, Any]:
        """The epoch as one row of metrics.csv."""
        row: dict[str, Any] = {
            "epoch": self.epoch,
            "train_loss": self.train_loss,
            "seconds": self.seconds,
            "validation_seconds": self.validation_seconds,
            "samples_per_second": self.samples_per_second,
        }
        for metric, values in self.val.items():
            row |= {f"val_{metric}/{name}": value for name, value in values.items()}
        for name, value in self.fusion.items():
            if isinstance(value, list):
                row |= {f"{name}/{index}": item for index, item in enumerate(value)}
            else:
                row[name] = value
        return row


@dataclass(frozen=True)
class Stopper:
    """Early stopping on a score where more is better and None is no score.

    As long as no epoch had a score, the latest one counts as the best and nothing stops.
    """

    best_epoch: int = 0
    best_score: float | None = None
    waited: int = 0

    def after(self, epoch: int, score: float | None) -> Stopper:
        """The stopper once ``epoch`` is known to have ``score``."""
        if self.best_score is None or (score is not None and score > self.best_score):
            return Stopper(epoch, score)
        return dataclasses.replace(self, waited=self.waited + 1)

    def exhausted(self, patience: int) -> bool:
        """Whether ``patience`` epochs in a row were no better; a patience of 0 never runs out."""
        return 0 < patience <= self.waited


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two epochs; replaced whole: Ctrl-C leaves no half epoch."""

    history: tuple[Epoch, ...] = ()
    stopper: Stopper = Stopper()
    best_weights: Mapping[str, Tensor] | None = None

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history)
