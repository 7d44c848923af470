"""`python -m bench.models`: a training step of every kind of model, the kernels against eager PyTorch.

Every model has the sizes of its defaults (experts 256, 64 over the input, tower 64; M3oE as published) with the fields,
D = 3 and T = 2 of MovieLens-1M, on the batch of `workload`. Opponents, all with fused Adam:

    eager, published style    the model's readable `reference`: every expert, gate and tower of every domain on every
                              row, a parameter for each of them (`separate.py`)
    eager, batched + routed   rows sorted by domain, one product for all experts, own gates and towers only
                              (`m3oe_fast.folded`); a domain computes the experts it uses, as the kernels do

Nothing is timed before loss and gradients of every contender have met the reference in float64.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench import command, document, gate, machine, timing, workload
from bench.contender import LEARNING_RATE, WEIGHT_DECAY, named_gradients
from bench.separate import Separate
from bench.sorting import by_domain
from bench.workload import PUBLISHED, Batch
from m3oe_fast import cli, folded
from m3oe_fast.config import ModelConfig
from m3oe_fast.model import RankingModel
from m3oe_fast.models import MODELS
from m3oe_fast.reference import pair_losses

FUSED = ("shared_bottom", "mmoe", "ple", "adatt", "adatt_sp", "star", "m3oe")
GATE_ROWS = 96
FACTOR, ULPS = 3.0, 16


@dataclass(frozen=True, eq=False)
class Way:
    """One way to compute a training step.

    Attributes:
        name: as printed.
        own: whether it is m3oe_fast.
        loss: the training loss of a batch, differentiable.
        leaves: what Adam updates.
        gradients: what a backward pass left, by the model's names.
    """

    name: str
    own: bool
    loss: Callable[[Batch], Tensor]
    leaves: list[nn.Parameter]
    gradients: Callable[[], dict[str, Tensor]]

    def stepper(self, batch: Batch) -> Callable[[], None]:
        """A whole training step: zero_grad, forward, loss, backward, Adam."""
        adam = torch.optim.Adam(self.leaves, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

        def step() -> None:
            adam.zero_grad(set_to_none=True)
            self.loss(batch).backward()
            adam.step()

        return step


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status, 1 if the gate refuses a contender."""
    return command.execute(_parse(argv), run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every model.

    Raises:
        GateError: a contender does not compute its model.
    """
    measured = []
    for name in options.models:
        model = workload.make_model(config_of(name), seed=options.seed)
        command.say(f"{name}: checking")
        check(model, workload.make_batch(PUBLISHED, GATE_ROWS, options.seed))
        batch = workload.make_batch(PUBLISHED, options.batch, options.seed)
        steps = {way.name: way.stepper(batch) for way in ways(model)}
        command.say(f"{name}: timing {options.rounds} rounds")
        samples, peak = machine.under_peak(
            options.threads, lambda steps=steps: timing.interleave(steps, options.rounds, options.warmup)
        )
        measured.append(_record(model, options.batch, samples, peak))
    return document.header("models", command.settings(options)) | {"measurements": measured}


def config_of(name: str, **changed: Any) -> ModelConfig:
    """The default sizes of a kind of model over the fields of MovieLens-1M, D = 3, T = 2."""
    data = {"vocab_sizes": PUBLISHED.vocab_sizes, "num_dense": 1, "num_domains": 3, "num_tasks": 2}
    return MODELS[name].config_type(**(data | changed))


def ways(model: RankingModel) -> list[Way]:
    """The contenders, each with weights of its own."""
    return [published(copy.deepcopy(model)), routed(copy.deepcopy(model)), own(copy.deepcopy(model))]


def published(model: RankingModel) -> Way:
    """The readable reference, as published codes compute."""
    apart = Separate(model)
    table = nn.ParameterDict({"table": apart["embedding"]})
    counts = model.config.num_domains

    def loss(batch: Batch) -> Tensor:
        rows = torch.nn.functional.embedding(batch.ids + model._first_row, table["table"])
        x = torch.cat([rows.flatten(1), batch.dense.to(rows.dtype)], 1)
        logits = type(model).reference(apart, model.config, x, batch.domain)
        return pair_losses(logits, batch.domain, batch.label.to(x.dtype), counts).sum()

    return Way("eager, published style", False, loss, apart.leaves(), apart.gradients)


def routed(model: RankingModel) -> Way:
    """Own domain only, in few large products."""
    used = used_experts(model)
    domains = model.config.num_domains

    def loss(batch: Batch) -> Tensor:
        order, counts = by_domain(batch.domain, domains)
        weights, mask = model.weights(folded.star_fold), model.gate_mask
        x = model.embed(batch.ids[order], batch.dense[order].to(model.embedding.dtype))
        if all(len(experts) == weights.table.shape[2] for experts in used):
            logits = folded.network(x, counts, weights, gate_mask=mask, **_switches(model))
        else:
            parts = [
                folded.network(part, [len(part)], _of_domain(weights, mask, d, used[d]), **_switches(model))
                for d, part in enumerate(x.split(counts))
            ]
            logits = torch.cat(parts)
        label = batch.label[order].to(logits.dtype)
        return pair_losses(logits, batch.domain[order], label, domains).sum()

    return Way("eager, batched + routed", False, loss, list(model.parameters()), lambda: named_gradients(model))


def own(model: RankingModel) -> Way:
    """m3oe_fast through its public surface."""
    name = f"m3oe_fast, {model.backend_name}"
    return Way(name, True, lambda batch: model.loss(*batch), list(model.parameters()), lambda: named_gradients(model))


def used_experts(model: RankingModel) -> list[list[int]]:
    """For each domain the experts that its pairs gate or take at a fixed coefficient."""
    weights = model.weights(folded.star_fold)
    taken = weights.table != 0
    gated = weights.gate_weight.shape[3]
    taken[..., :gated] |= True if model.gate_mask is None else model.gate_mask
    return [of_domain.any(0).nonzero()[:, 0].tolist() for of_domain in taken]


def check(model: RankingModel, batch: Batch, contenders: Sequence[Way] | None = None) -> None:
    """Compare loss and gradients of contenders with the reference in float64.

    Args:
        batch: rows that put a ReLU of any pair within `workload.KINK_MARGIN` of its kink are left out, as gradients
            there depend on rounding.
        contenders: with weights of their own; all of `ways` if not given.

    Raises:
        GateError: an error above 3 times that of the reference in float32, plus 16 ulp of the largest value; or no row
            is left.
    """
    exact = published(copy.deepcopy(model).double())
    base = published(copy.deepcopy(model))
    batch = _off_kinks(exact, batch)
    if not len(batch.domain):
        raise gate.GateError(f"{model.config.name}: every row has a ReLU on its kink; check with more rows")
    judged = ways(model)[1:] if contenders is None else contenders
    found = {way: _measured(way, batch) for way in (exact, base, *judged)}
    oracle, eager = found.pop(exact), found.pop(base)
    for way, values in found.items():
        for name, value in oracle.items():
            if not value.numel():
                continue
            scale = value.abs().max()
            allowed = FACTOR * (eager[name] - value).abs().max() + ULPS * torch.finfo(torch.float32).eps * scale
            error = (values[name] - value).abs().max()
            if not error <= allowed:
                raise gate.GateError(f"{model.config.name}, {way.name}: {name} is off by {error:.2e} > {allowed:.2e}")


def _measured(way: Way, batch: Batch) -> dict[str, Tensor]:
    loss = way.loss(batch)
    loss.backward()
    found = {"loss": loss.detach(), **way.gradients()}
    return gate.fusion_as_one({name: value.double() for name, value in found.items()})


def _off_kinks(exact: Way, batch: Batch) -> Batch:
    with torch.no_grad(), workload.WatchReLU(len(batch.domain), batch.domain.device) as watch:
        exact.loss(batch)
    return Batch(*(tensor[watch.distance >= workload.KINK_MARGIN] for tensor in batch))


def _switches(model: RankingModel) -> dict[str, bool]:
    return {"star_linear": model.star_linear, "gate_detach": model.gate_detach}


def _of_domain(
    weights: folded.NetworkWeights, mask: Tensor | None, d: int, experts: Sequence[int]
) -> folded.NetworkWeights:
    """The weights of one domain and of the experts it uses. Models whose domains use different ones gate all or none of
    them, by pair: the gate keeps its scores of the used ones."""
    at = torch.tensor(experts)
    gated = weights.gate_weight.shape[3]
    gates = (weights.gate_weight[d : d + 1], weights.gate_bias[d : d + 1])
    layers = tuple(folded.ExpertLayer(*(part.index_select(0, at) for part in layer)) for layer in weights.experts)
    if gated:
        gate_weight, gate_bias = (part.index_select(-1, at) for part in gates)
        if mask is not None:  # as scores of minus infinity
            gate_bias = gate_bias.masked_fill(~mask[d : d + 1].index_select(-1, at), float("-inf"))
    else:
        gate_weight, gate_bias = gates
    own = {
        name: getattr(weights, name)[d : d + 1]
        for name in ("tower_weight", "tower_bias", "tower_gain", "tower_offset", "head_weight", "head_bias")
    }
    table = weights.table[d : d + 1].index_select(-1, at)
    return weights._replace(gate_weight=gate_weight, gate_bias=gate_bias, table=table, experts=layers, **own)


def _record(
    model: RankingModel, rows: int, samples: dict[str, list[timing.Sample]], peak: float | None
) -> dict[str, Any]:
    summaries = {name: timing.summarise(taken) for name, taken in samples.items()}
    own = next(summary for name, summary in summaries.items() if name.startswith("m3oe_fast"))
    flops = 3 * 2 * model.multiply_adds() * rows  # backward: twice the forward's products
    return {
        "model": model.config.name,
        "batch": rows,
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds": model.multiply_adds(),
        "fma_peak_gflops": peak,
        "share_of_peak": None if peak is None else flops / own.median / 1e9 / peak,
        "contenders": [
            {
                "name": name,
                "own": name.startswith("m3oe_fast"),
                "seconds": summary.quartiles(),
                "cpu_seconds": summary.cpu,
                "speedup_of_own": summary.median / own.median,
                "cpu_speedup_of_own": summary.cpu / own.cpu,
            }
            for name, summary in summaries.items()
        ],
    }


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=FUSED, default=list(FUSED), metavar="MODEL", help=", ".join(FUSED))
    add("--batch", type=command.positive, default=4096, metavar="B", help="rows of a step")
    add("--warmup", type=int, default=3, help="untimed steps of each contender")
    command.add_shared(parser, rounds=15)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
