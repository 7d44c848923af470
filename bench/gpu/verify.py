"""The gate before the clock: `bench.gate` on the device, a limit for opponents, and the same bits twice.

m3oe_fast is held to the rule of `bench.gate` at its precision. Opponents may be `OPPONENT_SLACK` times as far off in
their logits, and in fp32 in their gradients; what autocast does to gradients is only required to be finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import gate
from bench.gate import Finding, GateError
from bench.gpu.contenders import DeviceContender
from bench.gpu.feed import Supply
from bench.workload import Batch

OPPONENT_SLACK = 5.0
MEASURES = ("forward", "step")


@dataclass(frozen=True)
class Oracles:
    """The float64 results for rows as drawn and for rows sorted by domain; the gradients are the same."""

    drawn: gate.Oracle
    ordered: gate.Oracle


def make_oracles(supply: Supply, precisions: tuple[str, ...]) -> Oracles:
    """Run the reference on the gate's batch; its products in float32 must be exact (`device.matmul_precision`)."""
    drawn = gate.make_oracle(supply.drawn, True, precisions)
    return Oracles(drawn, drawn._replace(logits=drawn.logits[supply.order]))


def check(contender: DeviceContender, supply: Supply, oracles: Oracles) -> list[Finding]:
    """Compare a contender with the oracle, with its own limits in the findings.

    Raises:
        GateError: an error is larger than allowed or not finite, or m3oe_fast's bits differ between two runs.
    """
    work, oracle = (supply.ordered, oracles.ordered) if contender.takes_ordered else (supply.drawn, oracles.drawn)
    found = gate.find(contender, work, oracle, MEASURES)
    found = [finding._replace(allowed=_allowed(contender, finding)) for finding in found]
    for finding in found:
        # Not `error > allowed`: that lets NaN pass.
        if not (math.isfinite(finding.error) and finding.error <= finding.allowed):
            raise GateError(
                f"{contender.name}: {finding.quantity} is off by {finding.error:.1e}, allowed {finding.allowed:.1e}"
            )
    if contender.own:
        _same_bits(contender, supply)
    return found


def record(contender: DeviceContender, found: list[Finding]) -> dict[str, Any]:
    """Of a contender the quantity closest to its allowed error, and the error of its logits."""
    worst = max(found, key=lambda f: f.error / f.allowed)
    kept = worst._asdict() | {"allowed": worst.allowed if math.isfinite(worst.allowed) else None}
    return {"name": contender.name, "logit_error": gate.logit_error(found, "forward"), "closest": kept}


def _allowed(contender: DeviceContender, finding: Finding) -> float:
    if contender.own:
        return finding.allowed
    if contender.precision == "fp32" or finding.quantity.startswith("logits"):
        return OPPONENT_SLACK * finding.allowed
    return math.inf


def _same_bits(contender: DeviceContender, supply: Supply) -> None:
    batch = supply.drawn.batch
    first, second = _results(contender, batch), _results(contender, batch)
    for name, tensor in first.items():
        if not torch.equal(tensor, second[name]):
            raise GateError(f"{contender.name}: {name} differs between two runs on the same batch")


def _results(contender: DeviceContender, batch: Batch) -> dict[str, Tensor]:
    with torch.no_grad():
        logits = contender.forward(batch).clone()
    contender.train(batch)
    return {"logits": logits} | {f"gradient of {n}": g.clone() for n, g in contender.gradients().items()}
