"""Scores a part of a dataset and measures every (domain, task) pair of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from m3oe_fast import metrics
from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Dataset, Part
from m3oe_fast.metrics import Scores

EVALUATION_ROWS = 8192
"""Rows scored at once in evaluation: enough to keep the kernels busy, and a few tens of MB."""


def evaluate(model: nn.Module, part: Part, dataset: Dataset) -> Scores:
    """Score a part of ``dataset`` and measure every (domain, task) pair."""
    schema = dataset.schema
    return metrics.evaluate(
        score(model, part, len(schema.tasks)), part.domain, part.label, schema.domains, schema.tasks
    )


def unscored(part: Part, dataset: Dataset) -> Scores:
    """The pairs of a part, without a value: there are no weights worth measuring."""
    schema = dataset.schema
    nothing = np.zeros((len(part), len(schema.tasks)), dtype=np.float32)
    counted = metrics.evaluate(nothing, part.domain, part.label, schema.domains, schema.tasks)
    return counted.withheld("no epoch was finished")


@torch.no_grad()
def score(model: nn.Module, part: Part, num_tasks: int) -> np.ndarray:
    """Logits float32 [N, T] of every row of ``part`` in stored order."""
    device = device_of(model)
    was_training = model.training
    model.eval()
    logits = np.empty((len(part), num_tasks), dtype=np.float32)
    start = 0
    for batch in part.batches(EVALUATION_ROWS):
        batch = to_device(batch, device)
        end = start + len(batch.domain)
        logits[start:end] = model(batch.ids, batch.dense, batch.domain).cpu().numpy()
        start = end
    model.train(was_training)
    return logits


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie."""
    return next(model.parameters()).device


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on ``device``; itself if it is there already."""
    if device.type == "cpu":
        return batch
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in pinned(batch, device)))


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch, tensors on the CPU, as ``device`` copies it without making the program wait: page-locked for a GPU."""
    return Batch(*(tensor.pin_memory() for tensor in batch)) if device.type == "cuda" else batch
