"""Scores a part of a dataset, batch by batch, and measures every (domain, task) pair of it."""

from __future__ import annotations

import torch
from torch import nn

from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.metrics import Meter, Scores
from m3oe_fast.models.family import Family
from m3oe_fast.training.profile import Stopwatch

EVALUATION_ROWS = 8192
"""Rows scored at once in evaluation: enough to keep the kernels busy, and a few tens of MB."""
NO_MEMBER = "no member has this pair"


@torch.no_grad()
def evaluate(model: nn.Module, part: Part, dataset: Dataset, clock: Stopwatch | None = None) -> Scores:
    """Score a part of ``dataset`` and measure every (domain, task) pair; memory does not grow with a large part.

    Args:
        model: put into ``eval()`` mode meanwhile.
        part: of ``dataset``.
        dataset: names domains and tasks.
        clock: is told how long scoring and measuring took.
    """
    clock = clock or Stopwatch()
    device = device_of(model)
    was_training = model.training
    model.eval()
    meter = Meter(dataset.schema.domains, dataset.schema.tasks)
    start = 0
    try:
        for batch in clock.each("read", part.batches(EVALUATION_ROWS)):
            with clock("score"):
                logits = model(*to_device(batch, device).inputs).cpu().numpy()
            with clock("metrics"):
                end = start + len(logits)
                meter.update(logits, batch.domain.numpy(), batch.label.numpy(), part.users(start, end))
                start = end
    finally:
        model.train(was_training)
    with clock("metrics"):
        scores = meter.compute()
    if not isinstance(model, Family):
        return scores
    schema = dataset.schema
    return scores.explained({(schema.domains[d], schema.tasks[t]) for d, t in model.missing_pairs()}, NO_MEMBER)


def unscored(part: Part, dataset: Dataset) -> Scores:
    """The pairs of a part, without a value: there are no weights worth measuring."""
    meter = Meter(dataset.schema.domains, dataset.schema.tasks)
    for batch in part.batches(EVALUATION_ROWS):
        meter.update(torch.zeros_like(batch.label).numpy(), batch.domain.numpy(), batch.label.numpy(), None)
    return meter.compute().withheld("no epoch was finished")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    return next(model.parameters()).device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; itself if it is there already."""
    if device.type == "cpu":
        return batch
    return pinned(batch, device).map(lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch, tensors on the CPU, as ``device`` copies it without making the program wait: page-locked for a GPU."""
    if device.type != "cuda":
        return batch
    return batch.map(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())
