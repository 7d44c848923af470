"""Training: options, the loop, its history and resume, evaluation, run folders, what a terminal shows."""

from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.trainer import Result, Trainer

__all__ = ["Result", "TrainOptions", "Trainer"]
