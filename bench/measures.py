"""The four measurements, by name.

forward  logits from ids, without gradients
network  logits from x, without gradients: the kernels alone, no embedding
train    forward from ids, loss and backward
step     zero_grad, forward, loss, backward, Adam

`bench.latency` has one more: predict, probabilities from ids without gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.contender import Contender
from bench.workload import Workload

MEASURES = ("forward", "network", "train", "step")


def calls(what: str, contender: Contender, workload: Workload) -> dict[str, Callable[[], object]]:
    """What is timed, by printed name; a step once for every Adam variant of the contender."""
    batch, x = workload.batch, workload.x
    if what == "forward":
        return {contender.name: torch.no_grad()(lambda: contender.forward(batch))}
    if what == "predict":
        return {contender.name: torch.no_grad()(lambda: contender.predict(batch))}
    if what == "network":
        return {contender.name: torch.no_grad()(lambda: contender.network(x, batch.domain))}
    if what == "train":
        return {contender.name: lambda: contender.train(batch)}
    return {
        contender.name + ("" if kind == "fused" else f", {kind} Adam"): contender.stepper(batch, contender.adam(kind))
        for kind in contender.optimizers
    }
