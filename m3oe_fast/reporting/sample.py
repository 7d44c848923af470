"""Rows of a part for the figures: their scores, and what the network computes on the way to them.

Memory is bounded whatever the size of the part: at most so many rows are drawn, with a fixed seed, and read in chunks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from m3oe_fast import folded, reference
from m3oe_fast.config import M3oEConfig
from m3oe_fast.data.batch import Batch
from m3oe_fast.data.dataset import Part
from m3oe_fast.model import RankingModel
from m3oe_fast.models import AnyModel, Family

SEED = 0
SCORED_ROWS = 1_000_000
"""At most so many rows are scored for the calibration curves."""
_CHUNK = 65_536


@dataclass(frozen=True)
class Scored:
    """Rows with the probabilities that the model gives them.

    Attributes:
        probability: float32 [n, T].
        domain: int64 [n].
        label: float32 [n, T], NaN = not observed.
        of: rows of the part that the n were drawn from.
    """

    probability: np.ndarray
    domain: np.ndarray
    label: np.ndarray
    of: int

    @property
    def whole(self) -> bool:
        """Whether no row of the part was left out."""
        return len(self.domain) == self.of


@dataclass(frozen=True)
class Inside:
    """What the network computes between its input and its towers for n rows, in the dtype of its weights.

    Attributes:
        domain: int64 [n].
        gates: [n, T, K], the softmax over the shared experts.
        shared, of_domain, of_task, fused: [n, T, X], S_t, alpha_d D_d, alpha_t T_t, and their sum u_t.
    """

    domain: np.ndarray
    gates: np.ndarray
    shared: np.ndarray
    of_domain: np.ndarray
    of_task: np.ndarray
    fused: np.ndarray


def score(model: AnyModel, part: Part, most: int = SCORED_ROWS) -> Scored:
    """Score the rows of ``part``, at most ``most`` of them."""
    rows = np.arange(len(part))
    if len(part) > most:
        rows = np.sort(np.random.default_rng(SEED).choice(len(part), most, replace=False))
    probability, domain, label = [], [], []
    device = model.device
    for start in range(0, len(rows), _CHUNK):
        batch = part.take(rows[start : start + _CHUNK])
        probability.append(model.predict(*batch.map(lambda tensor: tensor.to(device)).inputs).float().cpu().numpy())
        domain.append(batch.domain.numpy())
        label.append(batch.label.numpy())
    return Scored(np.concatenate(probability), np.concatenate(domain), np.concatenate(label), len(part))


def draw(part: Part, num_domains: int, most: int) -> Batch:
    """At most ``most`` rows of ``part``, domain by domain, with as equal shares of the domains as they have rows."""
    rng = np.random.default_rng(SEED)
    domain = np.asarray(part.domain)
    order = rng.permutation(len(domain))
    order = order[np.argsort(domain[order], kind="stable")]
    counts = np.bincount(domain, minlength=num_domains)
    starts = np.cumsum(counts) - counts
    taken = [order[start : start + size] for start, size in zip(starts, _shares(counts, most), strict=True)]
    return part.take(np.concatenate(taken))


def _shares(counts: np.ndarray, most: int) -> np.ndarray:
    """How many of each domain's ``counts`` [D] to take: the same of all, more where others have too few."""
    shares = np.zeros_like(counts)
    while (left := most - int(shares.sum())) > 0 and (open_ := shares < counts).any():
        step = max(left // int(open_.sum()), 1)
        for d in np.flatnonzero(open_):
            shares[d] += min(step, counts[d] - shares[d], most - int(shares.sum()))
    return shares


def reason_not_to_look(model: AnyModel) -> str | None:
    """Why `look_inside` cannot look into a model; None if it can."""
    if isinstance(model, Family):
        return "drawn for one model: see those of the members"
    config = model.config
    if not isinstance(config, M3oEConfig):
        return f"drawn for M3oE, not for {config.name}"
    if config.modules != "balanced" or not (config.domain_experts and config.task_experts):
        return "drawn for M3oE with all its modules, balanced"
    return None


@torch.no_grad()
def look_inside(model: RankingModel, batch: Batch) -> Inside:
    """Run the readable network of `reference` on rows, as far as its towers, in eager torch."""
    config, device = model.config, model.embedding.device
    p = dict(model.named_parameters())
    ids, dense, domain, bags = batch.map(lambda tensor: tensor.to(device)).inputs
    x = model.embed(ids, dense.to(model.embedding.dtype), bags)
    r = x.new_empty(len(domain), config.hidden_dim)
    gates = x.new_empty(len(domain), config.num_tasks, config.shared_experts)
    one = dataclasses.replace(config, num_domains=1)
    for d in domain.unique().tolist():
        # Of the D star matrices a row needs its own: each domain's rows run through a network of that domain only.
        rows = (domain == d).nonzero()[:, 0]
        own = {**p, "star_weight": p["star_weight"][d : d + 1], "star_bias": p["star_bias"][d : d + 1]}
        r[rows] = reference.representation(own, one, x[rows], torch.zeros_like(rows))
        for t in range(config.num_tasks):
            gates[rows, t] = torch.softmax(r[rows] @ p["gate_weight"][d, t] + p["gate_bias"][d, t], dim=-1)
    z = torch.stack([reference.expert(p, config, r, e) for e in range(config.num_experts)], dim=1)  # [n, E, X]
    table = folded.coefficient_table(p, config)[domain.long()]  # [n, T, E]
    first, last = config.shared_experts, config.shared_experts + config.num_domains
    shared = torch.bmm(gates, z[:, :first])
    of_domain = torch.bmm(table[:, :, first:last], z[:, first:last])
    of_task = torch.bmm(table[:, :, last:], z[:, last:])
    parts = (domain, gates, shared, of_domain, of_task, shared + of_domain + of_task)
    return Inside(*(part.cpu().numpy() for part in parts))
