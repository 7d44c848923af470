"""The correctness gate: a contender is timed only after its logits and gradients have met the
float64 oracle.

A contender's error may be at most 2 (logits) or 3 (gradients) times the error of the oracle's own
formulas in float32, plus a rounding floor. Both oracles run in chunks of rows, so that a large
batch fits into memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bench.contender import Contender, named_gradients
from bench.workload import CHUNK_ROWS, Workload
from m3oe_fast import M3oE, reference

LOGIT_RATIO, LOGIT_FLOOR = 2.0, 1e-6
GRADIENT_RATIO, GRADIENT_FLOOR = 3.0, 1e-5


class GateError(Exception):
    """A contender computes something else; the message names it, the quantity and both errors."""


class Finding(NamedTuple):
    """Relative error (Frobenius) of one quantity, and what is allowed."""

    quantity: str
    error: float
    allowed: float


class Oracle(NamedTuple):
    """float64 results, and the relative errors of the same formulas in float32, by quantity."""

    logits: Tensor
    gradients: dict[str, Tensor]
    units: dict[str, float]


def make_oracle(workload: Workload, gradients: bool) -> Oracle:
    """Run the reference in float64 and float32 on the workload's batch; gradients only if asked
    for.
    """
    logits, exact = _run(workload, torch.float64, gradients)
    logits32, eager = _run(workload, torch.float32, gradients)
    units = {name: relative_error(eager[name], exact[name]) for name in exact}
    return Oracle(logits, exact, units | {"logits": relative_error(logits32, logits)})


def check(contender: Contender, workload: Workload, oracle: Oracle, measures: tuple[str, ...]) -> list[Finding]:
    """Compare a contender with the oracle in everything that these measures use.

    Raises:
        GateError: an error is larger than allowed, or not finite.
    """
    batch = workload.batch
    found: dict[str, float] = {}
    with torch.no_grad():
        if "forward" in measures:
            found["logits from ids"] = relative_error(contender.forward(batch), oracle.logits)
        if "network" in measures:
            found["logits from x"] = relative_error(contender.network(workload.x, batch.domain), oracle.logits)
    findings = [
        _finding(name, error, oracle.units["logits"], LOGIT_RATIO, LOGIT_FLOOR) for name, error in found.items()
    ]
    if {"train", "step"} & set(measures):
        contender.train(batch)
        own = contender.gradients()
        for name, exact in oracle.gradients.items():
            error = relative_error(own[name], exact)
            findings.append(_finding(f"gradient of {name}", error, oracle.units[name], GRADIENT_RATIO, GRADIENT_FLOOR))
    for finding in findings:
        # Not `error > allowed`: that lets NaN pass.
        if not finding.error <= finding.allowed:
            raise GateError(
                f"{contender.name}: {finding.quantity} is off by {finding.error:.1e}, allowed {finding.allowed:.1e}"
            )
    return findings


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact tensor; the plain norm if that is
    zero.
    """
    if value.shape != exact.shape:
        return float("inf")
    scale = exact.norm().item()
    return (value.double() - exact.double()).norm().item() / (scale or 1.0)


def _finding(quantity: str, error: float, unit: float, ratio: float, floor: float) -> Finding:
    return Finding(quantity, error, ratio * unit + floor)


def _run(workload: Workload, dtype: torch.dtype, gradients: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model = M3oE(workload.config, backend="reference").to(dtype)
    model.load_state_dict(workload.model.state_dict())
    batch = workload.batch
    chunks = list(zip(*(tensor.split(CHUNK_ROWS) for tensor in batch[:3]), strict=True))
    with torch.no_grad():
        logits = torch.cat([model(*chunk) for chunk in chunks])
    if not gradients:
        return logits, {}
    # The loss couples the rows only through logits, so its gradient there sends each chunk on its
    # way.
    leaf = logits.clone().requires_grad_()
    label = batch.label.to(dtype)
    reference.pair_losses(leaf, batch.domain, label, workload.config.num_domains).sum().backward()
    for chunk, upstream in zip(chunks, leaf.grad.split(CHUNK_ROWS), strict=True):
        model(*chunk).backward(upstream)
    return logits, named_gradients(model)
