"""What a run remembers: a record per epoch, the fusion weights' way, the early stopper, the best weights, and where in
an epoch it stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Epoch:
    """What one finished epoch left in the history.

    Attributes:
        epoch: counted from 1.
        step: steps done in the run by its end.
        lr: the network's learning rate in its last step.
        train_loss: mean over the rows of their step's loss.
        samples: rows the network was trained on.
        seconds, cpu_seconds: wall and process time of training and validation together.
        validation_seconds: the validation's part of ``seconds``.
        val: ``Scores.to_dict`` of the validation part.
        fusion: the fusion weights after the sigmoid.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    samples: int
    seconds: float
    cpu_seconds: float
    validation_seconds: float
    val: dict[str, Any]
    fusion: dict[str, Any]

    @property
    def samples_per_second(self) -> float:
        """Rows per second of wall time, validation included."""
        return self.samples / self.seconds

    def to_record(self) -> dict[str, Any]:
        """The epoch as one line of metrics.jsonl."""
        return dataclasses.asdict(self) | {"samples_per_second": self.samples_per_second}

    def to_row(self, domains: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
        """The epoch as one row of metrics.csv."""
        row: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("epoch", "step", "lr", "train_loss", "seconds", "validation_seconds", "samples_per_second")
        }
        for metric, values in self.val.items():
            if metric == "overall":
                for name, of_tasks in values.items():
                    row |= {f"val_overall_{name}/{task}": value for task, value in of_tasks.items()}
            else:
                row |= {f"val_{metric}/{name}": value for name, value in values.items()}
        return row | flat_fusion(self.fusion, domains, tasks)


def flat_fusion(fusion: Mapping[str, Any], domains: Sequence[str], tasks: Sequence[str]) -> dict[str, float]:
    """Fusion weights by one name each: ``alpha_task``, or with one per domain, task or pair ``alpha_task/like``,
    ``alpha_task/home/like``.

    Args:
        fusion: ``M3oE.fusion_values``.
        domains, tasks: their names.
    """
    flat: dict[str, float] = {}
    for name, value in fusion.items():
        if not isinstance(value, list):
            flat[name] = value
            continue
        own = domains if name.endswith("domain") else tasks
        for index, item in enumerate(value):
            if isinstance(item, list):  # [D][T]
                flat |= {f"{name}/{domains[index]}/{task}": w for task, w in zip(tasks, item, strict=True)}
            else:
                flat[f"{name}/{own[index]}"] = item
    return flat


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
class Partial:
    """How far an unfinished epoch has come.

    Attributes:
        step: its steps that are done.
        rows: its rows that were seen.
        loss_sum: sum over these steps of loss times rows.
        seconds, cpu_seconds: wall and process time so far.
    """

    step: int = 0
    rows: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Progress:
    """Where a run stands; replaced whole, so an interruption leaves no half of it.

    Attributes:
        history: the finished epochs.
        stopper: of early stopping.
        best_weights: a state_dict of the best epoch; None before the first.
        partial: the epoch that has begun.
        fusion: the way of the fusion weights: (epoch, step of the run, value of each weight).
    """

    history: tuple[Epoch, ...] = ()
    stopper: Stopper = Stopper()
    best_weights: Mapping[str, Tensor] | None = None
    partial: Partial = Partial()
    fusion: list[list[float]] = field(default_factory=list)

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history)

    @property
    def position(self) -> tuple[int, int]:
        """Finished epochs, and finished steps of the next one."""
        return self.epoch, self.partial.step
