"""How the mean losses of the (domain, task) pairs are summed, and what accumulation does to their means.

A step's loss is sum_{d,t} w_dt mean_dt, where mean_dt is the mean binary cross-entropy over the n_dt labelled rows of
the pair in all batches of the step. The kernels take the mean over each batch, so a batch with m_dt of these rows gets
the pair weight w_dt m_dt / n_dt: the sum over the batches is the loss of one large batch. w_dt is

    sum          1 (paper, eq. 12)
    rows         n_dt / sum n: every labelled row counts the same
    given        as the user says
    uncertainty  exp(-s_dt) with s_dt trained along and s_dt / 2 added for each pair in the step (Kendall, Gal and
                 Cipolla, CVPR 2018, for classification)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from m3oe_fast.data.batch import Batch
from m3oe_fast.errors import ConfigError
from m3oe_fast.model import RankingModel
from m3oe_fast.training.options import TrainOptions


class LossWeighting(nn.Module):
    """The loss of a step, batch by batch.

    Args:
        options: ``loss_weighting`` and ``pair_weights``.
        domains, tasks: the names that ``pair_weights`` refers to.

    Raises:
        ConfigError: ``pair_weights`` cannot be read or names an unknown domain or task.
    """

    def __init__(self, options: TrainOptions, domains: Sequence[str], tasks: Sequence[str]) -> None:
        super().__init__()
        self.kind = options.loss_weighting
        shape = len(domains), len(tasks)
        given = torch.ones(shape)
        if options.pair_weights is not None:
            given = parse_pair_weights(options.pair_weights, domains, tasks)
        self.register_buffer("given", given, persistent=False)
        self.log_variance = nn.Parameter(torch.zeros(shape)) if self.kind == "uncertainty" else None

    def loss(self, model: RankingModel, batch: Batch, counts: Sequence[Tensor] | None = None, place: int = 0) -> Tensor:
        """The part of one batch in a step's loss; a differentiable scalar.

        Args:
            model: what to train.
            batch: on the model's device.
            counts: the labelled rows of each pair, float [D,T], of every batch of the step (`count`); None for a step
                of this batch alone.
            place: which of them ``batch`` is.
        """
        if self.kind == "sum" and counts is None:
            return model.loss(*batch)
        counts = [self.count(batch)] if counts is None else counts
        mine, total = counts[place], torch.stack(list(counts)).sum(0)
        weight = self._of_pairs(total) * (mine / total.clamp(min=1))
        loss = model.loss(*batch, pair_weight=weight.to(model.embedding.dtype))
        if self.log_variance is None or place:
            return loss
        return loss + 0.5 * (self.log_variance * (total > 0)).sum()

    def count(self, batch: Batch) -> Tensor:
        """The labelled rows of each pair, floating [D,T]; waits for no device."""
        observed = (~torch.isnan(batch.label)).to(self.given.dtype)
        return torch.zeros_like(self.given).index_add_(0, batch.domain, observed)

    def _of_pairs(self, total: Tensor) -> Tensor:
        if self.kind == "rows":
            return total / total.sum().clamp(min=1)
        return self.given if self.log_variance is None else torch.exp(-self.log_variance)


def parse_pair_weights(text: str, domains: Sequence[str], tasks: Sequence[str]) -> Tensor:
    """Weights float32 [D,T] from ``TASK=W``, ``DOMAIN/TASK=W`` and ``DOMAIN/*=W``, separated by commas.

    Raises:
        ConfigError: an entry cannot be read, or names an unknown domain or task.
    """
    weights = torch.ones(len(domains), len(tasks))
    for entry in text.split(","):
        number = entry.strip().rpartition("=")[2]
        rows, columns = _pairs_of(entry, domains, tasks)
        if not rows or not columns:
            raise ConfigError(
                f"pair_weights: {entry.strip()!r} names no pair; write TASK=W, DOMAIN/TASK=W or DOMAIN/*=W with "
                f"domains {', '.join(domains[:8])} and tasks {', '.join(tasks)}"
            )
        weights[torch.tensor(rows)[:, None], torch.tensor(columns)] = _weight(entry, number)
    return weights


def options_of_member(options: TrainOptions, domains: Sequence[str], tasks: Sequence[str]) -> TrainOptions:
    """The options of a model of some of the pairs: those weights that are of its domains and tasks.

    A model of a single pair has nothing to weigh, whatever ``loss_weighting`` is.
    """
    if len(domains) == len(tasks) == 1:
        return dataclasses.replace(options, loss_weighting="sum", pair_weights=None)
    if options.pair_weights is None:
        return options
    own = [entry for entry in options.pair_weights.split(",") if all(_pairs_of(entry, domains, tasks))]
    if not own:
        return dataclasses.replace(options, loss_weighting="sum", pair_weights=None)
    return dataclasses.replace(options, pair_weights=",".join(own))


def _pairs_of(entry: str, domains: Sequence[str], tasks: Sequence[str]) -> tuple[list[int], list[int]]:
    """The domains and tasks that an entry names; a part that names none, or no entry at all, has an empty list."""
    name, equals, _ = entry.strip().rpartition("=")
    domain, slash, task = name.rpartition("/")
    rows = [d for d, known in enumerate(domains) if equals and (not slash or known == domain)]
    return rows, [t for t, known in enumerate(tasks) if task in ("*", known)]


def _weight(entry: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise ConfigError(f"pair_weights: {entry.strip()!r} must end in a number of at least 0, for example like=0.5")
    return weight
