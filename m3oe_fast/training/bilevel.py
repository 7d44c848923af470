"""The gradient of the outer level: how the fusion weights a should move, given that the network w is trained meanwhile.

Each mode needs first-order gradients only, which is what the fused kernels give (`Problem`, `ModelProblem`). A second
derivative is a central difference of them: for a direction v in the space of w,

    H v = (grad_w L_train(w + e v) - grad_w L_train(w - e v)) / 2e        [as w]
    M v = (grad_a L_train(w + e v) - grad_a L_train(w - e v)) / 2e        [as a],  M = d2 L_train / da dw

with the weights moved in place and put back bit for bit, whatever happens meanwhile. docs/bilevel.md says what each
mode computes, what it costs and where it ends.

The distance e is relative: no tensor of the network moves by more than ``STEP`` of its own norm. What limits it is not
rounding but kinks. A ReLU's second derivative is zero on both sides and infinite at the kink, so that a batch's exact
second derivative lacks what the kinks contribute to the expected loss, and a short difference sees few of them, each
with a huge jump. Over a distance that many units cross, the sum of the jumps is what it should be, and the rounding of
bfloat16 products disappears in it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from m3oe_fast.config import M3oEConfig
from m3oe_fast.data.batch import Batch
from m3oe_fast.errors import ConfigError
from m3oe_fast.model import RankingModel

HIGHER_ORDER = ("unrolled", "implicit")
"""Modes that look through the network's next steps, at the price of several gradients."""

STEP = 1 / 32
"""How far a central difference moves the network: a share of the norm of the tensor that it moves most."""

SMALLEST_RMS = 0.01
"""Elements of a tensor count as at least this large where its norm bounds a difference: biases start at zero."""

LARGEST_SCALED = 32.0
"""Bound of each element of P g. It is Adam's own: when it scales a gradient, the square of that is in its history
already, so no more than 1 / sqrt(1 - 0.999) = 31.6 comes out. P is older than g here, and an id that Adam has not met
before would go 10^8 times too far."""

Found = TypeVar("Found")

_OF_TRAINING = ("joint", "published")
_OF_HELD_OUT = ("alternating", "first_order")


class Gradients(NamedTuple):
    """Gradients of one loss, each shaped as its variable; a list is empty if nobody asked for it."""

    weights: list[Tensor]
    fusion: list[Tensor]


class Problem(Protocol):
    """Two losses of the same variables, and their first-order gradients where the variables are now.

    Attributes:
        weights: the inner variables w, floating point, any shapes, one device. They are written in place.
        fusion: the outer variables a; never written.
    """

    weights: Sequence[Tensor]
    fusion: Sequence[Tensor]

    def training(self, *, weights: bool, fusion: bool) -> Gradients:
        """Of L_train, which the inner level descends: by the weights, by the fusion weights, or both."""

    def held_out(self, *, weights: bool, fusion: bool) -> Gradients:
        """Of L_val, which judges the outer level. Elements of the weights that L_train does not depend on may get 0:
        they cannot change the result, but would shorten the distance of a central difference for all others."""


class ModelProblem:
    """`Problem` of a model and two batches, by one pass of the kernels per call.

    Leaves every ``requires_grad`` as it was and every ``.grad`` alone. Same model, batches and threads, same bits.

    Args:
        model: lies where the batches do.
        training: B rows that the network trains on next.
        held_out: B rows that it does not train on.
        loss: (model, batch) to a differentiable scalar; by default ``model.loss(*batch)``.

    Raises:
        ConfigError: the model's embedding gradients are sparse.
    """

    def __init__(
        self,
        model: RankingModel,
        training: Batch,
        held_out: Batch,
        loss: Callable[[RankingModel, Batch], Tensor] | None = None,
    ) -> None:
        if model.sparse_grad:
            raise ConfigError(
                "bilevel unrolled and implicit need embedding_optimizer same: they move the whole embedding table, and "
                "its gradient is sparse here (sparse_grad)"
            )
        self.weights: Sequence[Tensor] = model.network_parameters()
        self.fusion: Sequence[Tensor] = model.fusion_parameters()
        self._model = model
        self._training = training
        self._held_out = held_out
        self._loss = loss or _plain_loss
        self._unreached = _unreached(model, training)

    def training(self, *, weights: bool, fusion: bool) -> Gradients:
        return self._gradients(self._training, weights, fusion)

    def held_out(self, *, weights: bool, fusion: bool) -> Gradients:
        found = self._gradients(self._held_out, weights, fusion)
        for table, rows in self._unreached if weights else ():
            found.weights[table].masked_fill_(rows, 0.0)
        return found

    def _gradients(self, batch: Batch, weights: bool, fusion: bool) -> Gradients:
        of_weights, of_fusion = (list(self.weights) if weights else []), (list(self.fusion) if fusion else [])
        wanted = [*of_weights, *of_fusion]
        every = [*self.weights, *self.fusion]
        before = [tensor.requires_grad for tensor in every]
        try:
            # The kernels compute no table gradient that nobody needs, so this saves time as well.
            _require(every, [False] * len(every))
            _require(wanted, [True] * len(wanted))
            with torch.enable_grad():
                loss = self._loss(self._model, batch)
            found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        finally:
            _require(every, before)
        return Gradients(list(found[: len(of_weights)]), list(found[len(of_weights) :]))


def fusion_gradient(
    mode: str,
    problem: Problem,
    *,
    rate: float,
    scale: Sequence[Tensor] | None = None,
    terms: int = 5,
    step: float = STEP,
) -> list[Tensor]:
    """The gradient that the outer level descends, one tensor per fusion weight.

    Args:
        mode: joint or published (on the training batch), alternating or first_order (on the held-out batch), unrolled
            or implicit; what they mean is for the caller to arrange.
        problem: its weights are where they were, bit for bit, when this returns or raises.
        rate: unrolled, implicit: xi, the rate of the virtual step or of the Neumann series.
        scale: unrolled, implicit: the diagonal P of the inner optimizer, shaped as the weights and at least 0, such as
            Adam's 1 / (sqrt(v) + eps); None is the identity. No element of P g exceeds ``LARGEST_SCALED``.
        terms: implicit: terms J of the Neumann series; 0 leaves the direct gradient.
        step: relative distance of a central difference, see ``STEP``.

    Raises:
        ConfigError: an unknown mode, or a number out of its range.
        ValueError: ``scale`` does not fit the weights.
    """
    if mode in _OF_TRAINING:
        return problem.training(weights=False, fusion=True).fusion
    if mode in _OF_HELD_OUT:
        return problem.held_out(weights=False, fusion=True).fusion
    if mode not in HIGHER_ORDER:
        known = (*_OF_TRAINING, *_OF_HELD_OUT, *HIGHER_ORDER)
        raise ConfigError(f"bilevel must be one of {', '.join(known)} to have an outer gradient, got {mode!r}")
    for name, value in (("rate", rate), ("step", step)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} of bilevel {mode} must be a finite number above 0, got {value!r}")
    if isinstance(terms, bool) or not isinstance(terms, int) or terms < 0:
        raise ConfigError(f"terms (neumann_terms) must be an integer of at least 0, got {terms!r}")
    shapes = [weight.shape for weight in problem.weights]
    if scale is not None and [factor.shape for factor in scale] != shapes:
        raise ValueError("scale must have one tensor per weight, of the same shape")
    here = _Place(problem, scale, step)
    return _unrolled(here, rate) if mode == "unrolled" else _implicit(here, rate, terms)


def warning(mode: str, config: M3oEConfig) -> str | None:
    """What a user of this mode should know about this model before the run, in one line; None if nothing."""
    if mode not in HIGHER_ORDER or not config.gate_detach or not config.shared_experts:
        return None
    return (
        f"warning: bilevel {mode} takes the gradients of the network for those of its loss, and with gate_detach true "
        "they lack what passes through the gates: its outer gradient is an approximation (docs/bilevel.md)"
    )


# The modes --------------------------------------------------------------------------------------------------------


def _unrolled(here: _Place, rate: float) -> list[Tensor]:
    """d_a L_val(w', a) - xi M P grad_w L_val(w', a) with w' = w - xi P grad_w L_train(w, a)."""
    problem = here.problem
    descent = here.scaled(problem.training(weights=True, fusion=False).weights)
    ahead = here.at(torch._foreach_mul(descent, -rate), lambda: problem.held_out(weights=True, fusion=True))
    return _less(ahead.fusion, rate, here.mixed(here.scaled(ahead.weights)))


def _implicit(here: _Place, rate: float, terms: int) -> list[Tensor]:
    """d_a L_val - xi M sum_{j<J} f_j p_j with p_0 = P grad_w L_val and p_{j+1} = p_j - f_j xi P H p_j, all at w.

    Every f_j is 1 where the series converges, and the first that is 0 ends it: see `_damping`.
    """
    found = here.problem.held_out(weights=terms > 0, fusion=True)
    if not terms:
        return found.fusion
    term = here.scaled(found.weights)
    total = torch._foreach_mul(term, 0.0)
    for _ in range(terms):
        product = torch._foreach_mul(here.hessian(term), rate)
        change = here.scaled(product)
        factor = _damping(_dot(term, product), _dot(product, change))
        if not factor:
            break
        total = [part + factor * of_term for part, of_term in zip(total, term, strict=True)]
        term = [of_term - factor * part for of_term, part in zip(term, change, strict=True)]
    return _less(found.fusion, rate, here.mixed(total))


def _damping(curvature: Tensor, size: Tensor) -> Tensor:
    """1 where p - xi P H p is no larger than p in the norm of P^-1; else the f in [0, 1] that makes p - f xi P H p
    smallest. That is 0 where H turns the other way along p, as it may in training: there is no minimum to look for.

    Args:
        curvature: xi p H p.
        size: xi^2 H p P H p. The ratio of the two is the best f, and up to twice that p does not grow. For a positive
            definite H it is at least 1 / (xi times the largest eigenvalue of P H), so that a series that converges,
            and needs no damping, gets none.
    """
    best = curvature / torch.where(size == 0, 1.0, size)
    return torch.where((size == 0) | (2 * best >= 1), 1.0, best.clamp(min=0.0))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True)]).sum()


def _less(direct: list[Tensor], rate: float, indirect: list[Tensor]) -> list[Tensor]:
    return list(torch._foreach_add(direct, indirect, alpha=-rate))


class _Place:
    """The weights of a problem as they are, and derivatives there."""

    def __init__(self, problem: Problem, scale: Sequence[Tensor] | None, step: float) -> None:
        self.problem = problem
        self._scale = None if scale is None else list(scale)
        self._step = step
        # Written through these, weights may require gradients, and their version counts on for whoever caches them.
        self._weights = [weight.detach() for weight in problem.weights]
        self._saved = [weight.clone() for weight in self._weights]
        self._norms = torch.stack(
            [
                norm.double().clamp(min=SMALLEST_RMS * math.sqrt(max(weight.numel(), 1)))
                for weight, norm in zip(self._weights, torch._foreach_norm(self._weights), strict=True)
            ]
        )

    def scaled(self, gradient: list[Tensor]) -> list[Tensor]:
        """P times ``gradient``."""
        if self._scale is None:
            return gradient
        product = torch._foreach_mul(gradient, self._scale)
        torch._foreach_clamp_min_(product, -LARGEST_SCALED)
        torch._foreach_clamp_max_(product, LARGEST_SCALED)
        return list(product)

    def hessian(self, direction: list[Tensor]) -> list[Tensor]:
        """H times ``direction``."""
        return self._difference(direction, lambda: self.problem.training(weights=True, fusion=False).weights)

    def mixed(self, direction: list[Tensor]) -> list[Tensor]:
        """M times ``direction``."""
        return self._difference(direction, lambda: self.problem.training(weights=False, fusion=True).fusion)

    def _difference(self, direction: list[Tensor], gradient: Callable[[], list[Tensor]]) -> list[Tensor]:
        lengths = torch.stack([norm.double() for norm in torch._foreach_norm(direction)])
        longest = (lengths / self._norms).amax()
        is_zero = longest == 0  # then both gradients are the one here, and their difference is 0
        distance = torch.where(is_zero, 0.0, self._step / longest)
        # The casts: next to a weight of no dimensions, the float64 distance would count.
        offset = [(part * distance).to(part.dtype) for part in direction]
        ahead = self.at(offset, gradient)
        behind = self.at(torch._foreach_neg(offset), gradient)
        width = torch.where(is_zero, 1.0, 2 * distance)
        return [((a - b) / width).to(a.dtype) for a, b in zip(ahead, behind, strict=True)]

    def at(self, offset: Sequence[Tensor], compute: Callable[[], Found]) -> Found:
        """What ``compute()`` gives with the weights moved by ``offset``; then they are back, bit for bit."""
        try:
            try:
                torch._foreach_add_(self._weights, offset)
                return compute()
            finally:
                torch._foreach_copy_(self._weights, self._saved)
        except BaseException:  # Ctrl-C may have come just before that copy
            torch._foreach_copy_(self._weights, self._saved)
            raise


def _require(tensors: Iterable[Tensor], flags: Iterable[bool]) -> None:
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)


def _unreached(model: RankingModel, batch: Batch) -> list[tuple[int, Tensor]]:
    """Of each table its place among the network's parameters, and bool [rows, 1]: the rows ``batch`` does not use."""
    config = model.config
    places = {id(parameter): place for place, parameter in enumerate(model.network_parameters())}
    fields = [(batch.ids.unbind(1), config.vocab_sizes), ([bag.values for bag in batch.bags], config.bag_vocab_sizes)]
    found = []
    for table, (columns, sizes) in zip(model.table_parameters(), fields, strict=False):
        rows = torch.ones((len(table), 1), dtype=torch.bool, device=table.device)
        first = 0
        for ids, size in zip(columns, sizes, strict=True):
            rows[first + ids.long().clamp(0, size - 1)] = False  # on a GPU an id out of range is the nearest one
            first += size
        found.append((places[id(table)], rows))
    return found


def _plain_loss(model: RankingModel, batch: Batch) -> Tensor:
    return model.loss(*batch)
