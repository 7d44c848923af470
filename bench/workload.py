"""What is measured: the published sizes, a batch as MovieLens-1M would give it, and weights as
after some training.

Batches: ids int32 [B, F], dense float32 [B, C], domain int64 [B], label float32 [B, T].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from m3oe_fast import M3oE, M3oEConfig, folded
from m3oe_fast.config import ModelConfig
from m3oe_fast.model import RankingModel
from m3oe_fast.models import MODELS

# MovieLens-1M: rows per domain (by age), positive rates of rating > 3 and rating > 4.
DOMAIN_ROWS = (210_747, 395_556, 393_906)
LABEL_RATES = (0.575, 0.226)
# A ReLU input nearer to zero than this may change its sign in float32, and with it the gradient.
KINK_MARGIN = 2e-5
CHUNK_ROWS = 2048
PUBLISHED = M3oEConfig(
    vocab_sizes=(6041, 3707, 3, 22, 3440, 19, 4),
    num_dense=1,
    num_domains=3,
    num_tasks=2,
    shared_experts=4,
    embed_dim=16,
    star_dim=512,
    hidden_dim=256,
    expert_dims=(64,),
    tower_dim=64,
)


class Batch(NamedTuple):
    """One batch; shapes as in the module's docstring."""

    ids: Tensor
    dense: Tensor
    domain: Tensor
    label: Tensor


class Workload(NamedTuple):
    """A batch, the model whose weights every contender copies, and its x float32 [B, I] for the
    kernels alone.
    """

    config: M3oEConfig
    model: M3oE
    batch: Batch
    x: Tensor


def make_batch(
    config: M3oEConfig,
    rows: int,
    seed: int = 0,
    domain_rows: Sequence[int] = DOMAIN_ROWS,
    label_rates: Sequence[float] = LABEL_RATES,
) -> Batch:
    """A random batch. Domains come in the given proportions, ids uniformly, labels at the given
    rates.
    """
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, v, (rows,), generator=g, dtype=torch.int32) for v in config.vocab_sizes]
    domain = torch.multinomial(torch.tensor(domain_rows, dtype=torch.float), rows, True, generator=g)
    return Batch(
        torch.stack(ids, 1) if ids else torch.empty(rows, 0, dtype=torch.int32),
        torch.rand(rows, config.num_dense, generator=g),
        domain,
        (torch.rand(rows, config.num_tasks, generator=g) < torch.tensor(label_rates)).float(),
    )


def make_model(config: ModelConfig, backend: str = "auto", seed: int = 0) -> RankingModel:
    """A model of any kind moved away from its initialisation: embeddings of 1e-4 and gains of one would hide
    errors from the gate.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[config.name](config, backend=backend)
        with torch.no_grad():
            nn.init.normal_(model.embedding, 0.0, 0.3)
            for name, parameter in model.named_parameters():
                if "weight" not in name and name != "embedding":
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def make_workload(rows: int, config: M3oEConfig = PUBLISHED, backend: str = "auto", seed: int = 0) -> Workload:
    """The batch and model of one measurement."""
    model = make_model(config, backend, seed)
    return with_batch(model, avoid_kinks(model, make_batch(config, rows, seed)))


def with_batch(model: M3oE, batch: Batch) -> Workload:
    """A model and a batch as a workload."""
    with torch.no_grad():
        x = model.embed(batch.ids, batch.dense)
    return Workload(model.config, model, batch, x)


def avoid_kinks(model: M3oE, batch: Batch) -> Batch:
    """The batch, every row that puts a ReLU next to its kink replaced by another of its domain.

    Gradients of what is left are the same function in every precision, so they can be compared
    tightly. About 2 % of the rows change at the published sizes; domains and labels stay.
    """
    near = _kink_distance(model, batch) < KINK_MARGIN
    ids, dense = batch.ids.clone(), batch.dense.clone()
    for d in range(model.config.num_domains):
        own = batch.domain == d
        bad, good = (own & near).nonzero()[:, 0], (own & ~near).nonzero()[:, 0]
        if len(good):
            source = good[torch.arange(len(bad), device=good.device) % len(good)]
            ids[bad], dense[bad] = batch.ids[source], batch.dense[source]
    return batch._replace(ids=ids, dense=dense)


def _kink_distance(model: M3oE, batch: Batch) -> Tensor:
    """float64 [B]: the smallest absolute input of any ReLU that the row's own domain uses."""
    config = model.config
    device = batch.domain.device
    exact = M3oE(config, backend="reference").to(device, torch.float64)
    exact.load_state_dict(model.state_dict())
    distance = torch.empty(len(batch.domain), dtype=torch.float64, device=device)
    with torch.no_grad():
        weights = folded.fold(dict(exact.named_parameters()), config)
        for d in range(config.num_domains):
            for rows in (batch.domain == d).nonzero()[:, 0].split(CHUNK_ROWS):
                counts = [0] * config.num_domains
                counts[d] = len(rows)
                with WatchReLU(len(rows), device) as watch:
                    x = exact.embed(batch.ids[rows], batch.dense[rows].double())
                    folded.network(x, counts, weights, star_linear=config.star_activation == "linear")
                distance[rows] = watch.distance
    return distance


class WatchReLU(TorchFunctionMode):
    """While active, keeps the smallest absolute input of torch.relu for each of `rows` rows."""

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__()
        self.distance = torch.full((rows,), float("inf"), dtype=torch.float64, device=device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        # Towers of the other domains run on no rows.
        if func is torch.relu and len(args[0]):
            self.distance = torch.minimum(self.distance, args[0].abs().flatten(1).amin(1))
        return func(*args, **(kwargs or {}))
