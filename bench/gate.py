"""The correctness gate: a contender is timed only after its logits and gradients have met the
float64 oracle.

A contender's error may be at most 2 (logits) or 3 (gradients) times the error of the oracle's own
formulas in float32 with products at the contender's precision (`rounding.py`), plus a rounding
floor; in bf16x3 the logits must be within 1e-5. Oracles run in chunks of rows, so that a large
batch fits into memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.contender import Contender, named_gradients
from bench.workload import CHUNK_ROWS, Workload
from m3oe_fast import M3oE, folded, reference, rounding
from m3oe_fast.config import FUSION_NAMES

LOGIT_RATIO, LOGIT_FLOOR = 2.0, 1e-6
GRADIENT_RATIO, GRADIENT_FLOOR = 3.0, 1e-5
SPLIT_LOGIT_LIMIT = 1e-5
TRAINING = frozenset({"train", "step"})

# Logits [B, T] from parameters by name, x [B, I] and domain [B].
Formula = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


class GateError(Exception):
    """A contender computes something else; the message names it, the quantity and both errors."""


class Finding(NamedTuple):
    """Relative error (Frobenius) of one quantity, and what is allowed."""

    quantity: str
    error: float
    allowed: float


class Oracle(NamedTuple):
    """float64 results, and the relative errors of the same formulas in float32, by precision of the
    products and quantity.
    """

    logits: Tensor
    gradients: dict[str, Tensor]
    units: dict[str, dict[str, float]]


def make_oracle(workload: Workload, gradients: bool, precisions: Sequence[str] = ("fp32",)) -> Oracle:
    """Run the reference in float64, and in float32 with products at each of these precisions, on the
    workload's batch; gradients only if asked for.
    """
    formulas = {precision: _reference(workload, precision) for precision in ("fp32", *precisions)}
    return _oracle(workload, gradients, formulas)


def make_routed_oracle(workload: Workload, gradients: bool) -> Oracle:
    """The same in fp32 by `folded.py`, which looks at a row's own domain only: for numbers of domains
    whose pairs on every row would not fit into memory.
    """
    return _oracle(workload, gradients, {"fp32": _routed(workload)})


def _oracle(workload: Workload, gradients: bool, formulas: Mapping[str, Formula]) -> Oracle:
    logits, exact = _run(workload, torch.float64, gradients, formulas["fp32"])
    units = {}
    for precision, formula in formulas.items():
        rounded, eager = _run(workload, torch.float32, gradients, formula)
        units[precision] = _gradient_errors(eager, exact) | {
            "logits": relative_error(rounded, logits),
            "probabilities": relative_error(rounded.sigmoid(), logits.sigmoid()),
        }
    return Oracle(logits, exact, units)


def check(contender: Contender, workload: Workload, oracle: Oracle, measures: Sequence[str]) -> list[Finding]:
    """Compare a contender with the oracle in everything that these measures use, and in the logits.

    Opponents in reduced precision are measured, not judged: how far off they are stands beside
    their times.

    Raises:
        GateError: an error is larger than allowed, or not finite.
    """
    findings = find(contender, workload, oracle, measures)
    judged = contender.own or contender.precision == "fp32"
    for finding in findings:
        # Not `error > allowed`: that lets NaN pass.
        if not math.isfinite(finding.error) or (judged and not finding.error <= finding.allowed):
            raise GateError(
                f"{contender.name}: {finding.quantity} is off by {finding.error:.1e}, allowed {finding.allowed:.1e}"
            )
    return findings


def find(contender: Contender, workload: Workload, oracle: Oracle, measures: Sequence[str]) -> list[Finding]:
    """The errors of a contender in everything that these measures use, without a judgement."""
    findings = [*_check_forward(contender, workload, oracle, measures)]
    if TRAINING & set(measures):
        contender.train(workload.batch)
        errors = _gradient_errors(contender.gradients(), oracle.gradients)
        units = oracle.units[contender.precision]
        findings += [
            Finding(f"gradient of {name}", error, GRADIENT_RATIO * units[name] + GRADIENT_FLOOR)
            for name, error in errors.items()
        ]
    return findings


def fusion_as_one(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients by name, those of the fusion logits that there are side by side as "fusion logits"."""
    rest = {name: gradient for name, gradient in gradients.items() if name not in FUSION_NAMES}
    fusion = [gradients[name].flatten() for name in FUSION_NAMES if name in gradients]
    return rest | ({"fusion logits": torch.cat(fusion)} if fusion else {})


def logit_error(findings: Sequence[Finding], what: str) -> float:
    """The error of the logits that a measurement of this kind computes."""
    quantity = "logits from x" if what == "network" else "logits from ids"
    return next(finding.error for finding in findings if finding.quantity == quantity)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact tensor; the plain norm if that is
    zero.
    """
    if value.shape != exact.shape:
        return float("inf")
    scale = exact.norm().item()
    return (value.double() - exact.double()).norm().item() / (scale or 1.0)


@torch.no_grad()
def _check_forward(contender: Contender, workload: Workload, oracle: Oracle, measures: Sequence[str]) -> list[Finding]:
    batch, logits = workload.batch, oracle.logits
    errors = {}
    if set(measures) - {"network"}:
        errors["logits from ids"] = relative_error(contender.forward(batch), logits)
    if "network" in measures:
        errors["logits from x"] = relative_error(contender.network(workload.x, batch.domain), logits)
    if "predict" in measures:
        errors["probabilities"] = relative_error(contender.predict(batch), logits.sigmoid())
    units = oracle.units[contender.precision]

    def allowed(quantity: str) -> float:
        if contender.precision == "bf16x3":
            return SPLIT_LOGIT_LIMIT
        return LOGIT_RATIO * units[quantity.split()[0]] + LOGIT_FLOOR

    return [Finding(name, error, allowed(name)) for name, error in errors.items()]


def _gradient_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors by parameter name.

    The fusion logits are one quantity: the gradient of a single one can be what is left of a
    cancellation, its neighbours give the scale.
    """
    if not exact:
        return {}
    found, exact = fusion_as_one(found), fusion_as_one(exact)
    return {name: relative_error(found[name], exact[name]) for name in exact}


def _reference(workload: Workload, precision: str) -> Formula:
    matmul = rounding.matmul(precision)
    return lambda parameters, x, domain: reference.forward(parameters, workload.config, x, domain, matmul)


def _routed(workload: Workload) -> Formula:
    config = workload.config
    switches = {"star_linear": config.star_activation == "linear", "gate_detach": config.gate_detach}
    return lambda parameters, x, domain: folded.routed(x, domain, folded.fold(parameters, config), **switches)


def _run(workload: Workload, dtype: torch.dtype, gradients: bool, formula: Formula) -> tuple[Tensor, dict[str, Tensor]]:
    model = M3oE(workload.config, backend="reference").to(workload.batch.ids.device, dtype)
    model.load_state_dict(workload.model.state_dict())
    batch = workload.batch
    chunks = list(zip(*(tensor.split(CHUNK_ROWS) for tensor in batch[:3]), strict=True))

    def forward(ids: Tensor, dense: Tensor, domain: Tensor) -> Tensor:
        x = model.embed(ids, dense.to(dtype))
        return formula(dict(model.named_parameters()), x, domain)

    with torch.no_grad():
        logits = torch.cat([forward(*chunk) for chunk in chunks])
    if not gradients:
        return logits, {}
    # The loss couples the rows only through logits, so its gradient there sends each chunk on its
    # way.
    leaf = logits.clone().requires_grad_()
    label = batch.label.to(dtype)
    reference.pair_losses(leaf, batch.domain, label, workload.config.num_domains).sum().backward()
    for chunk, upstream in zip(chunks, leaf.grad.split(CHUNK_ROWS), strict=True):
        forward(*chunk).backward(upstream)
    return logits, named_gradients(model)
