"""Learning-rate schedules as pure functions of the step: a resumed run needs no state of them."""

from __future__ import annotations

import math

from m3oe_fast.training.options import TrainOptions


def rate_factor(options: TrainOptions, step: int, steps_per_epoch: int) -> float:
    """What the learning rate is multiplied with in a step.

    Args:
        options: ``schedule`` and what belongs to it, ``warmup``, ``epochs``.
        step: steps done before, from the start of the run.
        steps_per_epoch: at least 1.

    Returns:
        A factor above 0, and at most 1 unless ``schedule_gamma`` is greater. The warm-up's steps have 1/warmup,
        2/warmup, ... 1; behind it, linear and cosine fall from 1 and would be 0 in the step after the last.
    """
    if step < options.warmup:
        return (step + 1) / options.warmup
    if options.schedule == "constant":
        return 1.0
    if options.schedule == "step":
        return options.schedule_gamma ** (step // steps_per_epoch // options.schedule_step)
    left = max(options.epochs * steps_per_epoch - options.warmup, 1)
    done = min((step - options.warmup) / left, 1.0)
    return 1.0 - done if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
