"""`python -m bench.complexity`: what every model costs as domains, tasks and shared experts grow.

Around D = 3, T = 2, K = 4, with the fields of MovieLens-1M and every model's default sizes, one of D, T, K is changed
at a time. For each model and point:

    parameters        without and with the embedding tables
    multiply-adds     per row forward, as computed; and what the readable reference multiplies, which runs every expert,
                      gate and tower of every domain on every row as published codes do, counted by torch
    bytes             of all parameters without tables, and of the weights that a row of one domain reads, fp32
    latency           `predict` of 1 row and of B rows in `eval()` mode, and a training step of B rows

mlp is a model per (domain, task), so a row needs T of them. A point whose training step would need more than
`--most_gflop` is not timed. All models of a point are timed in the same interleaved rounds, after the probabilities of
each, and for the kernels loss and gradients too, have met the reference in float64.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import command, document, gate, models, timing, workload
from bench.contender import LEARNING_RATE, WEIGHT_DECAY
from bench.workload import Batch
from m3oe_fast import cli, folded
from m3oe_fast.config import ModelConfig
from m3oe_fast.model import RankingModel
from m3oe_fast.models import MODELS, AnyModel
from m3oe_fast.models.family import Family, Member
from m3oe_fast.models.m2m import M2M, meta_weights

BASE = {"D": 3, "T": 2, "K": 4}
SWEEPS = {"D": (1, 3, 10, 30, 100), "T": (1, 2, 4, 8), "K": (1, 2, 4, 8, 16)}
COUNTED_ROWS = (2, 4)
"""Batches whose difference is counted: products of parameters only, as M2M's generated weights, are in both."""
TOLERANCE = 1e-5
"""Largest difference of a probability from float64. Eager models are the reference themselves, in fp32, so that a ratio
to it would say nothing."""
FP32 = 4
"""Bytes of a weight."""
QUICK_ROWS = 64


class Point(NamedTuple):
    """Numbers of domains, tasks and shared experts."""

    D: int
    T: int
    K: int

    @property
    def name(self) -> str:
        """As printed."""
        return f"D={self.D} T={self.T} K={self.K}"


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a model."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Count and time every model at every point.

    Raises:
        GateError: a model does not compute what its reference does.
    """
    points = [(axis, point) for axis in options.sweep for point in points_of(axis, options.quick)]
    measured = {point: _at(point, options) for point in dict.fromkeys(point for _, point in points)}
    return document.header("complexity", command.settings(options)) | {
        "base": BASE,
        "points": [
            {"axis": axis, "value": getattr(point, axis), **point._asdict(), "models": measured[point]}
            for axis, point in points
        ],
    }


def points_of(axis: str, quick: bool) -> list[Point]:
    """The points at which D, T or K is changed; quick: the base and the one below it."""
    values = [v for v in SWEEPS[axis] if v <= BASE[axis]][-2:] if quick else SWEEPS[axis]
    return [Point(**(BASE | {axis: value})) for value in values]


def config_of(name: str, point: Point) -> ModelConfig:
    """The default sizes of a kind of model at a point; of mlp one member."""
    domains, tasks = (1, 1) if name == "mlp" else (point.D, point.T)
    shared = {"shared_experts": point.K} if has_shared_experts(name) else {}
    return models.config_of(name, num_domains=domains, num_tasks=tasks, **shared)


def has_shared_experts(name: str) -> bool:
    """Whether K means something to a model."""
    return hasattr(MODELS[name].config_type, "shared_experts")


def make(name: str, point: Point, seed: int) -> AnyModel:
    """The model of a point; mlp as the family of its members."""
    config = config_of(name, point)
    if name != "mlp":
        return workload.make_model(config, seed=seed)
    members = [
        Member((d,), (t,), workload.make_model(config, seed=seed + d * point.T + t))
        for d in range(point.D)
        for t in range(point.T)
    ]
    return Family("single", members, point.D, point.T)


def counts(model: AnyModel, point: Point) -> dict[str, Any]:
    """What needs no clock."""
    family = isinstance(model, Family)
    one = model.members[0].model if family else model
    number = len(model.members) if family else 1
    tables = sum(table.numel() for table in one.table_parameters())
    total = sum(p.numel() for p in one.parameters())
    return {
        "parameters": number * (total - tables),
        "parameters_with_tables": number * total,
        "multiply_adds": model.multiply_adds(),
        # As published codes would: each of T models on every row of its own domain, or everything on every row.
        "reference_multiply_adds": reference_multiply_adds(one) * (point.T if family else 1),
        "bytes": FP32 * number * (total - tables),
        "bytes_read": FP32 * weights_read(one) * (point.T if family else 1),
    }


def reference_multiply_adds(model: RankingModel) -> int:
    """Multiply-adds of a row's products in the readable reference, counted by torch."""
    eager = type(model)(model.config, backend="reference")
    eager.load_state_dict(model.state_dict())
    parameters = {name: p.detach() for name, p in eager.named_parameters()}
    flops = []
    for rows in COUNTED_ROWS:
        x = torch.zeros(rows, model.config.input_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            type(model).reference(parameters, model.config, x, torch.zeros(rows, dtype=torch.int64))
        flops.append(counter.get_total_flops())
    few, many = COUNTED_ROWS
    return (flops[1] - flops[0]) // 2 // (many - few)


@torch.no_grad()
def weights_read(model: RankingModel) -> int:
    """Weights that a row meets in the domain that has most: common ones, its own, the experts it uses. What is made of
    parameters once for all rows counts as made: a folded star layer, generated weights, a domain's part of a gate. The
    coefficients that join experts, a number for each task and expert, are left out."""
    return _op_weights_read(model) if model.config.fused else _eager_weights_read(model)


def _op_weights_read(model: RankingModel) -> int:
    weights = model.weights(folded.star_fold)
    experts = max(map(len, models.used_experts(model)))
    tasks, width, gated = weights.gate_weight.shape[1:]
    gates = tasks * gated if model.gate_mask is None else int(model.gate_mask[0].sum())
    of_domain = ("star_weight", "star_bias")
    of_domain += ("tower_weight", "tower_bias", "tower_gain", "tower_offset", "head_weight", "head_bias")
    own = gates * (width + 1) + sum(getattr(weights, name)[:1].numel() for name in of_domain)
    common = ("star_gain", "star_offset", "skip_weight", "skip_bias", "skip_gain", "skip_offset")
    shared = sum(getattr(weights, name).numel() for name in common)
    return own + shared + sum(part[:experts].numel() for layer in weights.experts for part in layer)


def _eager_weights_read(model: RankingModel) -> int:
    c = model.config
    named = dict(model.named_parameters())
    if isinstance(model, M2M):
        kept = sum(p.numel() for name, p in named.items() if name.startswith(("expert_", "attention_score", "head_")))
        return kept + sum(of_domains[0].numel() for of_domains in vars(meta_weights(named, c)).values())
    # PEPNet: the rows of its gates that meet the domain's embedding have become part of their biases.
    tables = sum(table.numel() for table in model.table_parameters())
    of_domain = c.knowledge_dim * (c.num_domains + c.gate_dim * (1 + len(c.expert_dims)))
    return sum(p.numel() for p in named.values()) - tables - of_domain


def _at(point: Point, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    batch = make_batch(point, options.batch, options.seed)
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    scores: dict[str, Callable[[], object]] = {}
    single: dict[str, Callable[[], object]] = {}
    for name in options.models:
        if BASE["K"] != point.K and not has_shared_experts(name):
            continue
        model = make(name, point, options.seed)
        found[name] = {"backend": model.backend_name, **counts(model, point)}
        _check(name, model, point, options.seed)
        gflop = 6 * found[name]["multiply_adds"] * options.batch / 1e9
        if gflop <= options.most_gflop:
            steps[name] = _stepper(model, batch)
            served = make(name, point, options.seed).eval()
            first = Batch(*(tensor[:1] for tensor in batch))
            scores[name] = lambda served=served: served.predict(*batch[:3])
            single[name] = lambda served=served, first=first: served.predict(*first[:3])
    command.say(f"{point.name}: timing {len(steps)} models")
    for what, calls, rounds, burst in (
        ("predict_1", single, options.rounds, 10),
        ("predict", scores, options.rounds, 1),
        ("step", steps, options.rounds, 1),
    ):
        samples = timing.interleave(calls, rounds, warmup=2, burst=burst) if calls else {}
        for name, taken in samples.items():
            summary = timing.summarise(taken)
            found[name][what] = {"seconds": summary.quartiles(), "cpu_seconds": summary.cpu}
    return found


def make_batch(point: Point, rows: int, seed: int) -> Batch:
    """A random batch with equal shares of all domains."""
    config = models.config_of("shared_bottom", num_domains=point.D, num_tasks=point.T)
    rates = list(islice(cycle(workload.LABEL_RATES), point.T))
    return workload.make_batch(config, rows, seed, [1] * point.D, rates)


def _stepper(model: AnyModel, batch: Batch) -> Callable[[], None]:
    """A training step of all that a model, or the members of a family, learn from a batch."""
    adam = torch.optim.Adam(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    parts: list[tuple[RankingModel, Sequence[Tensor]]] = [(model, batch)]
    if isinstance(model, Family):
        parts = []
        for member in model.members:
            rows = (batch.domain == member.domains[0]).nonzero()[:, 0]
            label = batch.label[rows][:, list(member.tasks)].contiguous()
            parts.append((member.model, (batch.ids[rows], batch.dense[rows], torch.zeros_like(rows), label)))

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        for part, inputs in parts:
            part.loss(*inputs).backward()
        adam.step()

    return step


def _check(name: str, model: AnyModel, point: Point, seed: int) -> None:
    """Raise GateError where probabilities, or the loss and gradients of a model of the kernels, are not those of the
    reference in float64. Of a family one member stands for all: they have the same sizes."""
    rows_of = point
    if isinstance(model, Family):
        model, rows_of = model.members[0].model, Point(1, 1, point.K)
    batch = make_batch(rows_of, models.GATE_ROWS, seed + 1)
    exact = type(model)(model.config, backend="reference").double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        error = (model.predict(*batch[:3]).double() - exact.predict(*batch[:3])).abs().max().item()
    if not error <= TOLERANCE:
        raise gate.GateError(f"{name}, {point.name}: probabilities are off by {error:.1e}")
    if model.config.fused:
        models.check(model, batch, [models.own(copy.deepcopy(model))])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.complexity", description=__doc__)
    add = parser.add_argument
    names = list(MODELS)
    add("--models", nargs="+", choices=names, default=names, metavar="MODEL", help=", ".join(names))
    add("--sweep", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="what to change")
    add("--batch", type=command.positive, default=4096, metavar="B", help="rows of a step")
    add("--most_gflop", type=float, default=100.0, help="do not time what needs more in a training step")
    add("--quick", action="store_true", help=f"two points of each, {QUICK_ROWS} rows, one round: no measurement")
    command.add_shared(parser, rounds=5)
    options = parser.parse_args(argv)
    if options.quick:
        options.batch, options.rounds = QUICK_ROWS, 1
    return options


if __name__ == "__main__":
    cli.run(main)
