"""Random networks of any size, shared by the tests of ops, model and backends."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from m3oe_fast.folded import ExpertLayer, NetworkWeights


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one network call; the id is what a failing test prints."""

    rows: int = 64
    inputs: int = 13
    hidden: int = 32
    widths: tuple[int, ...] = (16,)
    tower: int = 16
    domains: int = 3
    tasks: int = 2
    shared: int = 4
    star_linear: bool = False
    gate_detach: bool = True
    gated: int | None = None  # experts that the gates range over; None: the shared ones
    masked: bool = False
    representation: bool = True
    empty_domain: bool = False

    def __str__(self) -> str:
        sizes = (
            f"B{self.rows}-I{self.inputs}-H{self.hidden}-X{'x'.join(map(str, self.widths))}-Y{self.tower}"
            f"-D{self.domains}T{self.tasks}K{self.shared}"
        )
        flags = [f.name for f in dataclasses.fields(self) if f.type == "bool" and getattr(self, f.name) != f.default]
        gated = [] if self.gated is None else [f"G{self.gated}"]
        return "-".join([sizes, *gated, *flags])

    @property
    def experts(self) -> int:
        return self.shared + self.domains + self.tasks

    @property
    def gates(self) -> int:
        return self.shared if self.gated is None else self.gated

    @property
    def switches(self) -> dict[str, bool]:
        return {"star_linear": self.star_linear, "gate_detach": self.gate_detach}


def make_weights(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> NetworkWeights:
    """Weights of unit gain, offsets and biases off zero, requiring gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
        return values.to(dtype).requires_grad_()

    def linear(fan_in: int, *shape: int) -> Tensor:
        return normal(*shape, scale=fan_in**-0.5)

    c, d, t = case, case.domains, case.tasks
    x_width, y = c.widths[-1], c.tower
    if c.representation:
        hidden = c.hidden
        star = [linear(c.inputs, d, c.inputs, hidden), normal(d, hidden, scale=0.3)]
        star += [normal(hidden, scale=0.2, shift=1), normal(hidden, scale=0.3)]
        star += [linear(c.inputs, c.inputs, hidden), normal(hidden, scale=0.3)]
        star += [normal(hidden, scale=0.2, shift=1), normal(hidden, scale=0.3)]
    else:
        hidden = c.inputs
        star = [normal(0) for _ in range(8)]
    layers, fan_in = [], hidden
    for width in c.widths:
        bias, gain, offset = (normal(c.experts, width, scale=0.3, shift=s) for s in (0, 1, 0))
        layers.append(ExpertLayer(linear(fan_in, c.experts, fan_in, width), bias, gain, offset))
        fan_in = width
    return NetworkWeights(
        *star,
        linear(hidden, d, t, hidden, c.gates),
        normal(d, t, c.gates, scale=0.3),
        normal(d, t, c.experts, scale=0.5),
        linear(x_width, d, t, x_width, y),
        normal(d, t, y, scale=0.3),
        normal(d, t, y, scale=0.2, shift=1),
        normal(d, t, y, scale=0.3),
        linear(y, d, t, y),
        normal(d, t),
        tuple(layers),
    )


def make_inputs(
    case: Case, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [B, I] requiring a gradient, domain int64 [B], gradient of the logits [B, T], gate mask or None."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.rows, case.inputs, generator=generator, dtype=torch.float64)
    present = torch.arange(case.domains)[1:] if case.empty_domain else torch.arange(case.domains)
    domain = present[torch.randint(len(present), (case.rows,), generator=generator)]
    grad = torch.randn(case.rows, case.tasks, generator=generator, dtype=torch.float64)
    mask = None
    if case.masked:
        mask = torch.rand(case.domains, case.tasks, case.gates, generator=generator) < 0.6
        mask[0, 0] = False  # a pair that gates nothing
    return x.to(dtype).requires_grad_(), domain, grad.to(dtype), mask


def cast(weights: NetworkWeights, dtype: torch.dtype) -> NetworkWeights:
    """A copy in another dtype, requiring gradients."""
    return NetworkWeights.unflat([w.detach().to(dtype).requires_grad_() for w in weights.flat()])


def stacked_axes(name: str) -> int:
    """Leading axes over which a weight is stacked: domains and tasks, domains, or experts."""
    if name.startswith(("gate", "table", "tower", "head_weight")):
        return 2
    return 1 if name.startswith(("star_weight", "star_bias", "expert", "head_bias")) else 0


def names(weights: NetworkWeights) -> list[str]:
    """A name per tensor of `flat()`."""
    fixed = list(NetworkWeights._fields[:-1])
    return fixed + [f"expert_{part}.{i}" for i in range(len(weights.experts)) for part in ExpertLayer._fields]
