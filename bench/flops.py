"""Multiply-adds per row that the mathematics needs after the exact algebra (folded star layer, own
domain only).

The share of peak of every contender is taken from these counts, so work that a contender does
beyond them does not help it.
"""

from __future__ import annotations

from itertools import pairwise

from m3oe_fast import M3oEConfig


def _representation(c: M3oEConfig) -> int:
    return 2 * c.input_dim * c.hidden_dim


def _experts(c: M3oEConfig) -> int:
    return c.num_experts * sum(i * o for i, o in pairwise((c.hidden_dim, *c.expert_dims)))


def _gates(c: M3oEConfig) -> int:
    return c.num_tasks * c.hidden_dim * c.shared_experts


def _fusion(c: M3oEConfig) -> int:
    return c.num_tasks * c.num_experts * c.expert_dim


def _towers(c: M3oEConfig) -> int:
    return c.num_tasks * (c.expert_dim + 1) * c.tower_dim


def forward_macs(config: M3oEConfig) -> int:
    """Multiply-adds of one row's forward pass, from x to logits."""
    parts = (_representation, _experts, _gates, _fusion, _towers)
    return sum(part(config) for part in parts)


def backward_macs(config: M3oEConfig) -> int:
    """Multiply-adds of one row's backward pass: every weight gradient and every input gradient,
    that of x too.

    The fusion has no weights, it costs its input gradients twice (coefficients and experts).
    Detached gates send nothing back.
    """
    weights = forward_macs(config) - _fusion(config)
    inputs = _representation(config) + _experts(config) + _towers(config) + 2 * _fusion(config)
    return weights + inputs + (0 if config.gate_detach else _gates(config))


def fold_macs(config: M3oEConfig) -> int:
    """Multiply-adds of folding the star layer once, for a whole batch; not part of the counts per
    row.
    """
    c = config
    return c.num_domains * c.input_dim * c.star_dim * (c.hidden_dim + 1)


def row_flops(config: M3oEConfig, what: str) -> int:
    """FLOPs (two per multiply-add) of one row in a measurement of this kind, see `compare.py`."""
    macs = forward_macs(config)
    if what in ("train", "step"):
        macs += backward_macs(config)
    return 2 * macs
