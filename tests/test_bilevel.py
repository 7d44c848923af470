"""Outer gradients: where each mode ends on a problem with a known answer, exact second derivatives of a small model,
and weights that are back bit for bit whatever happens."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor

from m3oe_fast import M3oE, M3oEConfig, reference
from m3oe_fast.config import FUSION_NAMES, Fusion
from m3oe_fast.data.batch import Bag, Batch
from m3oe_fast.errors import ConfigError
from m3oe_fast.training import bilevel
from m3oe_fast.training.bilevel import Gradients, ModelProblem, fusion_gradient

MODES = ("joint", "published", "alternating", "first_order", "unrolled", "implicit")
CONFIG = M3oEConfig(
    [40, 30],
    2,
    3,
    2,
    shared_experts=2,
    embed_dim=4,
    star_dim=12,
    hidden_dim=16,
    expert_dims=(8,),
    tower_dim=8,
    gate_detach=False,
)
RATE = 0.05


pytestmark = pytest.mark.usefixtures("one_thread")


# A problem with a known answer ------------------------------------------------------------------------------------


class Quadratic:
    """Two losses of w [6] and a [3], each held in two tensors:

        L_train = w H w / 2 - w (C a + c) + 3 |a|^2 / 2        L_val = |w - target|^2 / 2 + |a - wish|^2 / 2

    so w*(a) = H^-1 (C a + c), and the bi-level optimum is the minimum over a of L_val(w*(a), a).
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        turn = torch.linalg.qr(normal(6, 6).double())[0]
        self.H = (turn @ torch.diag(torch.linspace(0.4, 1.6, 6, dtype=torch.float64)) @ turn.T).to(dtype)
        self.C, self.c = 0.5 * normal(6, 3), normal(6)
        self.target, self.wish = normal(6), normal(3)
        self.weights = [torch.zeros(2, 2, dtype=dtype), torch.zeros(2, dtype=dtype)]
        self.fusion = [torch.zeros((), dtype=dtype), torch.zeros(2, dtype=dtype)]
        self.calls: list[str] = []

    @property
    def w(self) -> Tensor:
        return torch.cat([part.flatten() for part in self.weights])

    @property
    def a(self) -> Tensor:
        return torch.cat([part.flatten() for part in self.fusion])

    def training(self, *, weights: bool, fusion: bool) -> Gradients:
        self.calls.append("training")
        w, a = self.w, self.a
        return self._gradients(self.H @ w - self.C @ a - self.c, 3 * a - self.C.T @ w, weights, fusion)

    def held_out(self, *, weights: bool, fusion: bool) -> Gradients:
        self.calls.append("held_out")
        return self._gradients(self.w - self.target, self.a - self.wish, weights, fusion)

    def _gradients(self, of_w: Tensor, of_a: Tensor, weights: bool, fusion: bool) -> Gradients:
        return Gradients(parts(of_w) if weights else [], parts_of_fusion(of_a) if fusion else [])

    def place(self, w: Tensor, a: Tensor) -> None:
        for own, new in zip([*self.weights, *self.fusion], [*parts(w), *parts_of_fusion(a)], strict=True):
            own.copy_(new)

    def end(self, inverse: Tensor) -> Tensor:
        """The a where d_a L_val - M inverse grad_w L_val is zero at w*(a): the optimum for the inverse of H."""
        solution, effect = torch.linalg.inv(self.H), self.C.T @ inverse
        left = torch.eye(3, dtype=torch.float64) + effect @ solution @ self.C
        return torch.linalg.solve(left, self.wish - effect @ (solution @ self.c - self.target))

    def series(self, rate: float, terms: int, scale: Tensor | None = None) -> Tensor:
        """What a Neumann series puts in the place of the inverse of H."""
        unit = torch.eye(6, dtype=torch.float64)
        P = unit if scale is None else torch.diag(scale)
        power, total = unit, torch.zeros_like(unit)
        for _ in range(terms):
            total = total + rate * power @ P
            power = power @ (unit - rate * P @ self.H)
        return total


def parts(w: Tensor) -> list[Tensor]:
    return [w[:4].reshape(2, 2).clone(), w[4:].clone()]


def parts_of_fusion(a: Tensor) -> list[Tensor]:
    return [a[0].clone(), a[1:].clone()]


def descend(problem: Quadratic, mode: str, **options) -> Tensor:
    """Alternate network and outer steps until nothing moves; returns a."""
    rounds, inner_steps = {"joint": (4000, 1), "published": (2000, 5)}.get(mode, (400, 5))
    for _ in range(rounds):
        for _ in range(inner_steps):
            for own, gradient in zip(
                problem.weights, problem.training(weights=True, fusion=False).weights, strict=True
            ):
                own.sub_(gradient, alpha=0.6)
        for own, gradient in zip(problem.fusion, fusion_gradient(mode, problem, **options), strict=True):
            own.sub_(gradient, alpha=0.1)
    return problem.a


def exact_joint(problem: Quadratic) -> Tensor:
    reach = problem.C.T @ torch.linalg.inv(problem.H)
    return torch.linalg.solve(3 * torch.eye(3, dtype=torch.float64) - reach @ problem.C, reach @ problem.c)


ENDS: dict[str, tuple[str, dict, Callable[[Quadratic], Tensor], float]] = {
    # Mode, options, where it ends, and how far from the optimum that is, as docs/bilevel.md says: as a share of the
    # distance that is left by a look at the direct gradient alone.
    "joint": ("joint", {}, exact_joint, 5.25),
    "published": ("published", {}, exact_joint, 5.25),
    "alternating": ("alternating", {}, lambda q: q.wish, 1.0),
    "first_order": ("first_order", {}, lambda q: q.wish, 1.0),
    "unrolled": ("unrolled", {}, lambda q: q.end(q.series(1.0, 1)), 0.16),
    "implicit, 5 terms": ("implicit", {"terms": 5}, lambda q: q.end(q.series(1.0, 5)), 0.015),
    "implicit, 40 terms": ("implicit", {"terms": 40}, lambda q: q.end(torch.linalg.inv(q.H)), 0.0),
}


@pytest.mark.parametrize("case", ENDS)
def test_every_mode_ends_where_it_should(case: str):
    mode, options, where, share = ENDS[case]
    problem = Quadratic()
    a = descend(problem, mode, rate=1.0, **options)
    torch.testing.assert_close(a, where(problem), rtol=0, atol=1e-8)
    optimum = problem.end(torch.linalg.inv(problem.H))
    found = (a - optimum).norm() / (problem.wish - optimum).norm()
    assert found.item() == pytest.approx(share, abs=0.005)


def test_unrolled_with_the_inverse_as_scale_reaches_the_optimum():
    problem = Quadratic()
    problem.H = torch.diag(torch.linspace(0.4, 1.6, 6, dtype=torch.float64))
    scale = parts(1 / problem.H.diagonal())
    a = descend(problem, "unrolled", rate=1.0, scale=scale)
    torch.testing.assert_close(a, problem.end(torch.linalg.inv(problem.H)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_gradients_of_the_quadratic(scaled: bool, dtype: torch.dtype, tolerance: float):
    problem, exact = Quadratic(dtype), Quadratic()
    generator = torch.Generator().manual_seed(8)
    w, a = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (6, 3))
    for one in (problem, exact):
        one.place(w, a)
    factor = torch.linspace(0.5, 2, 6, dtype=torch.float64) if scaled else torch.ones(6, dtype=torch.float64)
    scale = [part.to(dtype) for part in parts(factor)] if scaled else None
    ahead = w - 0.3 * factor * (exact.H @ w - exact.C @ a - exact.c)
    unrolled = a - exact.wish + 0.3 * exact.C.T @ (factor * (ahead - exact.target))
    implicit = a - exact.wish + exact.C.T @ exact.series(0.3, 7, factor) @ (w - exact.target)
    for mode, expected in (("unrolled", unrolled), ("implicit", implicit)):
        found = fusion_gradient(mode, problem, rate=0.3, scale=scale, terms=7)
        assert [part.shape for part in found] == [(), (2,)]
        assert {part.dtype for part in found} == {dtype}
        found = torch.cat([part.flatten() for part in found]).double()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "terms", "evaluations"),
    [
        *((mode, 5, 1) for mode in ("joint", "published", "alternating", "first_order")),
        ("unrolled", 5, 4),
        ("implicit", 0, 1),
        ("implicit", 1, 5),
        ("implicit", 5, 13),
    ],
)
def test_cost_is_what_the_documentation_says(mode: str, terms: int, evaluations: int):
    problem = Quadratic()
    fusion_gradient(mode, problem, rate=0.1, terms=terms)
    assert len(problem.calls) == evaluations
    assert ("held_out" in problem.calls) == (mode not in ("joint", "published"))


def test_no_terms_leave_the_direct_gradient():
    problem = Quadratic()
    problem.place(torch.ones(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    found = fusion_gradient("implicit", problem, rate=0.1, terms=0)
    assert_same_bits(found, fusion_gradient("first_order", problem, rate=0.1))


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_a_direction_of_zeros_adds_nothing(mode: str):
    problem = Quadratic()
    a = torch.ones(3, dtype=torch.float64)
    w = torch.linalg.solve(problem.H, problem.C @ a + problem.c)
    problem.place(w, a)
    problem.target = problem.w  # at both optima of w
    problem.H = torch.zeros_like(problem.H)
    problem.C, problem.c = problem.C * 0, problem.c * 0
    found = fusion_gradient(mode, problem, rate=0.3)
    torch.testing.assert_close(torch.cat([part.flatten() for part in found]), a - problem.wish, rtol=0, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_series_that_would_diverge_is_damped_and_still_arrives(scaled: bool):
    problem = Quadratic()
    w, a = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    problem.place(w, a)
    scale = [torch.full_like(part, 0.5) for part in problem.weights] if scaled else None
    found = flat(fusion_gradient("implicit", problem, rate=5.0, scale=scale, terms=60))
    expected = a - problem.wish + problem.C.T @ torch.linalg.solve(problem.H, w - problem.target)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_series_ends_where_the_inner_loss_has_no_minimum():
    problem = Quadratic()
    problem.H = -problem.H
    problem.place(torch.ones(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    found = fusion_gradient("implicit", problem, rate=0.5, terms=9)
    assert len(problem.calls) == 5  # one product with H was enough
    assert_same_bits(found, fusion_gradient("first_order", problem, rate=0.5))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "off"}, "bilevel"),
        ({"mode": "darts"}, "bilevel"),
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"step": float("inf")}, "step"),
        ({"terms": -1}, "terms"),
        ({"terms": 2.0}, "terms"),
        ({"terms": True}, "terms"),
    ],
)
def test_impossible_options_are_refused(options: dict, field: str):
    given = {"mode": "implicit", "rate": 0.1} | options
    with pytest.raises(ConfigError, match=field):
        fusion_gradient(given.pop("mode"), Quadratic(), **given)


def test_scale_must_fit_the_weights():
    with pytest.raises(ValueError, match="scale"):
        fusion_gradient("unrolled", Quadratic(), rate=0.1, scale=[torch.ones(4), torch.ones(2)])


def test_a_huge_scale_is_held_where_adam_holds_it():
    problem = Quadratic()
    problem.place(torch.ones(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    seen: list[Tensor] = []

    def held_out(**wanted: bool) -> Gradients:
        seen.append(problem.w)
        return Quadratic.held_out(problem, **wanted)

    problem.held_out = held_out
    fusion_gradient("unrolled", problem, rate=0.01, scale=[torch.full_like(w, 1e8) for w in problem.weights])
    torch.testing.assert_close((seen[0] - 1).abs(), torch.full_like(seen[0], 0.01 * bilevel.LARGEST_SCALED))


# Whatever happens, the weights are back ---------------------------------------------------------------------------


class Interrupted(Quadratic):
    """Raises ``error`` in its ``at``-th gradient."""

    def __init__(self, error: type[BaseException], at: int) -> None:
        super().__init__()
        self.error, self.at = error, at

    def _gradients(self, *args) -> Gradients:
        if len(self.calls) == self.at:
            raise self.error("here")
        return super()._gradients(*args)


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_back_after_an_error_in_any_gradient(mode: str, error: type[BaseException]):
    interrupted = 0
    for at in range(1, 20):
        problem = Interrupted(error, at)
        problem.place(torch.rand(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
        before = [part.clone() for part in problem.weights]
        try:
            fusion_gradient(mode, problem, rate=0.3, terms=3)
        except error:
            interrupted += 1
        assert_same_bits(problem.weights, before)
    assert interrupted == {"unrolled": 4, "implicit": 9}[mode]


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_weights_are_back_after_ctrl_c_at_any_line(mode: str):
    source, count, number = bilevel.__file__, 0, 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != source:
            return None
        if event == "line":
            count += 1
            if count == number:
                raise KeyboardInterrupt
        return trace

    before_tracing = sys.gettrace()
    problem = Quadratic()
    problem.place(torch.rand(6, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    before = [part.clone() for part in problem.weights]
    finished = False
    while not finished:
        count, number = 0, number + 1
        sys.settrace(trace)
        try:
            fusion_gradient(mode, problem, rate=0.3, terms=2)
            finished = True
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before_tracing)
        assert_same_bits(problem.weights, before)
    assert number > 60


# Exact second derivatives of the network --------------------------------------------------------------------------


def make_model(config: M3oEConfig, backend: str = "reference", dtype=torch.float64, precision: str = "fp32") -> M3oE:
    torch.manual_seed(5)
    model = M3oE(config, backend=backend, precision=precision)
    with torch.no_grad():
        for parameter in model.network_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)  # embeddings and biases start at zero
        for number, parameter in enumerate(model.fusion_parameters()):
            parameter.copy_(torch.linspace(-0.5, 1, max(parameter.numel(), 1)).reshape(parameter.shape) + 0.3 * number)
    return model.to(dtype)


def make_batch(
    config: M3oEConfig, rows: int, seed: int, dtype=torch.float64, domains: Sequence[int] = (0, 1, 2)
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(size, (rows,), generator=generator) for size in config.vocab_sizes]
    label = torch.randint(2, (rows, config.num_tasks), generator=generator).float()
    label[::5, 1] = torch.nan
    return Batch(
        torch.stack(ids, 1).int(),
        torch.rand(rows, config.num_dense, generator=generator).to(dtype),
        torch.tensor(domains)[torch.randint(len(domains), (rows,), generator=generator)],
        label.to(dtype),
        bags=tuple(
            Bag(torch.randint(size, (2 * rows,), generator=generator), 2 * torch.arange(rows + 1))
            for size in config.bag_vocab_sizes
        ),
    )


class Oracle:
    """The losses of a model as functions that autograd differentiates twice, in float64."""

    def __init__(self, model: M3oE, training: Batch, held_out: Batch, config: M3oEConfig | None = None) -> None:
        self.config = config or model.config
        names = [name for name, _ in model.named_parameters() if name not in FUSION_NAMES]
        values = model.state_dict()
        self.w = {name: values[name].double().requires_grad_() for name in names}
        self.a = {name: values[name].double().requires_grad_() for name in FUSION_NAMES}
        self._first = torch.tensor([0, *self.config.vocab_sizes[:-1]]).cumsum(0)
        self._batches = {"training": training, "held_out": held_out}

    def loss(self, which: str, w: dict[str, Tensor]) -> Tensor:
        batch = self._batches[which]
        rows = torch.nn.functional.embedding(batch.ids + self._first, w["embedding"]).flatten(1)
        x = torch.cat([rows, batch.dense.double()], dim=1)
        logits = reference.forward({**w, **self.a}, self.config, x, batch.domain)
        return reference.pair_losses(logits, batch.domain, batch.label.double(), self.config.num_domains).sum()

    def gradient(self, which: str, create_graph: bool = False) -> list[Tensor]:
        return self._grad(self.loss(which, self.w), self.w.values(), create_graph)

    def unrolled(self, rate: float, scale: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The outer gradient, and its direct part."""
        inner = self.gradient("training", create_graph=True)
        ahead = {n: w - rate * p * g for (n, w), p, g in zip(self.w.items(), scale, inner, strict=True)}
        whole = flat(self._grad(self.loss("held_out", ahead), self.a.values()))
        ahead = {name: weight.detach() for name, weight in ahead.items()}
        return whole, flat(self._grad(self.loss("held_out", ahead), self.a.values()))

    def implicit(self, rate: float, terms: int, scale: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        inner = self.gradient("training", create_graph=True)
        term = [p * g for p, g in zip(scale, self.gradient("held_out"), strict=True)]
        total = term
        for _ in range(terms - 1):
            product = self._grad(_dot(inner, term), self.w.values())
            term = [v - rate * p * h for v, p, h in zip(term, scale, product, strict=True)]
            total = [s + v for s, v in zip(total, term, strict=True)]
        direct = flat(self._grad(self.loss("held_out", self.w), self.a.values()))
        return direct - rate * self.mixed(total), direct

    def mixed(self, direction: Sequence[Tensor]) -> Tensor:
        inner = self.gradient("training", create_graph=True)
        return flat(self._grad(_dot(inner, direction), self.a.values()))

    @staticmethod
    def _grad(loss: Tensor, wanted, create_graph: bool = False) -> list[Tensor]:
        wanted = list(wanted)
        return list(
            torch.autograd.grad(
                loss, wanted, create_graph=create_graph, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def adam_like(weights: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(w.shape, generator=generator).to(w.dtype) + 0.5 for w in weights]


def error_of_the_indirect_part(found: Sequence[Tensor], exact: tuple[Tensor, Tensor]) -> float:
    whole, direct = exact
    return ((flat(found).double() - whole).norm() / (whole - direct).norm()).item()


@pytest.mark.parametrize("fusion", get_args(Fusion))
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_hypergradients_against_double_backward(mode: str, scaled: bool, fusion: str):
    config = dataclasses.replace(CONFIG, fusion=fusion)
    model = make_model(config)
    batches = make_batch(config, 64, 1), make_batch(config, 48, 2)
    problem, oracle = ModelProblem(model, *batches), Oracle(model, *batches)
    scale = adam_like(problem.weights)
    expected = oracle.unrolled(RATE, scale if scaled else [1.0] * len(scale))
    if mode == "implicit":
        expected = oracle.implicit(RATE, 3, scale if scaled else [1.0] * len(scale))
    # So short a step crosses no kink, and float64 can afford it.
    found = fusion_gradient(mode, problem, rate=RATE, scale=scale if scaled else None, terms=3, step=1e-7)
    assert error_of_the_indirect_part(found, expected) < 1e-6
    # The indirect part must be worth looking at.
    assert (expected[0] - expected[1]).norm() > 1e-3 * expected[0].norm()


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_what_they_compute_with_detached_gates(mode: str):
    """The differences see the gates, the gradients they are taken of do not (docs/bilevel.md)."""
    detached = dataclasses.replace(CONFIG, gate_detach=True)
    model = make_model(detached)
    batches = make_batch(CONFIG, 64, 1), make_batch(CONFIG, 48, 2)
    problem, seen = ModelProblem(model, *batches), Oracle(model, *batches)
    whole = Oracle(model, *batches, config=CONFIG)
    found = flat(fusion_gradient(mode, problem, rate=RATE, terms=1, step=1e-7))
    assert bilevel.warning(mode, detached) is not None
    if mode == "unrolled":
        ahead = [w - RATE * g for w, g in zip(seen.w.values(), seen.gradient("training"), strict=True)]
        seen.w = dict(zip(seen.w, (w.detach().requires_grad_() for w in ahead), strict=True))
    direct = flat(Oracle._grad(seen.loss("held_out", seen.w), seen.a.values()))
    direction = seen.gradient("held_out")  # without the gates, at w' for unrolled
    expected = direct - RATE * whole.mixed(direction)  # with the gates
    assert error_of_the_indirect_part([found], (expected, direct)) < 1e-6
    other = Oracle(model, *batches).mixed(direction)  # what the detached gradient itself would give
    assert ((other - whole.mixed(direction)).norm() / other.norm()).item() > 1e-2


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-4), ("bf16", 0.15)])
@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_rounding_of_the_kernels_disappears_in_a_difference(mode: str, precision: str, rounding: float):
    batches = [make_batch(CONFIG, 1024, seed) for seed in (1, 2)]
    model, double = make_model(CONFIG, "cpu", torch.float32, precision), make_model(CONFIG)
    scale = adam_like(double.network_parameters())
    expected = fusion_gradient(mode, ModelProblem(double, *batches), rate=RATE, scale=scale, terms=3)
    direct = fusion_gradient("first_order", ModelProblem(double, *batches), rate=RATE)
    scale = [factor.float() for factor in scale]
    found = fusion_gradient(mode, ModelProblem(model, *batches), rate=RATE, scale=scale, terms=3)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert error_of_the_indirect_part(found, (flat(expected), flat(direct))) < rounding


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_kernels_against_double_backward(mode: str):
    """Without kinks on the way, that is over a short step and with few rows."""
    batches = make_batch(CONFIG, 64, 1), make_batch(CONFIG, 48, 2)
    model = make_model(CONFIG, "cpu", torch.float32)
    oracle = Oracle(model, *batches)
    scale = [1.0] * len(oracle.w)
    exact = oracle.unrolled(RATE, scale) if mode == "unrolled" else oracle.implicit(RATE, 3, scale)
    found = fusion_gradient(mode, ModelProblem(model, *batches), rate=RATE, terms=3, step=1e-4)
    assert error_of_the_indirect_part(found, exact) < 0.02


def test_a_wide_difference_sees_the_kinks_that_exact_derivatives_miss():
    """Against what L_val(w'(a)) really does when a moves; see the module."""
    batches = [make_batch(CONFIG, 8192, seed) for seed in (1, 2)]
    model = make_model(CONFIG, "cpu")
    problem = ModelProblem(model, *batches)
    scale = adam_like(problem.weights)
    exact, _ = Oracle(model, *batches).unrolled(RATE, scale)
    wide = flat(fusion_gradient("unrolled", problem, rate=RATE, scale=scale))

    @torch.no_grad()
    def judged(number: int, move: float) -> float:
        problem.fusion[number].add_(move)
        inner = problem.training(weights=True, fusion=False).weights
        before = [weight.clone() for weight in problem.weights]
        for weight, factor, gradient in zip(problem.weights, scale, inner, strict=True):
            weight.sub_(RATE * factor * gradient)
        loss = model.loss(*batches[1]).item()
        for weight, value in zip(problem.weights, before, strict=True):
            weight.copy_(value)
        problem.fusion[number].sub_(move)
        return loss

    moved = torch.tensor([judged(n, 0.1) - judged(n, -0.1) for n in range(4)], dtype=torch.float64) / 0.2
    assert (wide - moved).norm() < 0.4 * (exact - moved).norm()
    assert (wide - moved).norm() < 0.05 * moved.norm()


# The model as a problem -------------------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "cpu"])
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_the_model_is_left_as_it_was(mode: str, backend: str):
    model = make_model(CONFIG, backend, torch.float32).eval()
    batches = [make_batch(CONFIG, 40, seed, torch.float32) for seed in (1, 2)]
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    marked = model.skip_weight
    marked.grad = torch.ones_like(marked)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    predicted = model.predict(*batches[0].inputs)
    with torch.no_grad():  # must not matter
        first = fusion_gradient(mode, ModelProblem(model, *batches), rate=0.1, terms=3)
    second = fusion_gradient(mode, ModelProblem(model, *batches), rate=0.1, terms=3)
    assert_same_bits(first, second)
    assert_same_bits([parameter.detach() for parameter in model.parameters()], before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(marked.grad, torch.ones_like(marked))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not marked)
    assert torch.equal(model.predict(*batches[0].inputs), predicted)


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
@pytest.mark.parametrize("at", range(1, 5))
def test_the_model_is_left_as_it_was_when_its_loss_fails(mode: str, at: int):
    model = make_model(CONFIG, "cpu", torch.float32)
    batches = [make_batch(CONFIG, 40, seed, torch.float32) for seed in (1, 2)]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    calls = 0

    def loss(model: M3oE, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return model.loss(*batch)

    with pytest.raises(KeyboardInterrupt):
        fusion_gradient(mode, ModelProblem(model, *batches, loss), rate=0.1, terms=2)
    assert_same_bits([parameter.detach() for parameter in model.parameters()], before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_predictions_notice_nothing_of_moved_weights_but_a_real_change():
    """Weights move through views of them; whoever caches packed weights must see that."""
    model = make_model(CONFIG, "cpu", torch.float32).eval()
    batch = make_batch(CONFIG, 40, 1, torch.float32)
    before = model.predict(*batch.inputs)
    inside: list[Tensor] = []

    def loss(model: M3oE, batch: Batch) -> Tensor:
        inside.append(model.predict(*batch.inputs))
        return model.loss(*batch)

    fusion_gradient("unrolled", ModelProblem(model, batch, batch, loss), rate=0.1)
    assert torch.equal(inside[0], before)
    assert all(not torch.equal(moved, before) for moved in inside[1:])
    assert torch.equal(model.predict(*batch.inputs), before)


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("fusion", get_args(Fusion))
@pytest.mark.parametrize("mode", MODES)
def test_absent_domains_and_every_kind_of_fusion(mode: str, fusion: str, shared: int, backend: str):
    config = dataclasses.replace(CONFIG, fusion=fusion, shared_experts=shared)
    model, double = make_model(config, backend, torch.float32), make_model(config)
    batches = (
        make_batch(config, 40, 1, torch.float32, domains=[0]),
        make_batch(config, 30, 2, torch.float32, domains=[2]),
    )
    expected = fusion_gradient(mode, ModelProblem(double, *batches), rate=0.1, terms=2)
    found = fusion_gradient(mode, ModelProblem(model, *batches), rate=0.1, terms=2)
    assert [tensor.shape for tensor in found] == [parameter.shape for parameter in model.fusion_parameters()]
    assert (flat(found) - flat(expected)).norm() < 1e-3 * flat(expected).norm()
    if fusion == "per_index" and mode in ("joint", "published"):
        assert found[0][1] == found[0][2] == 0  # nothing can move the weights of a domain without rows


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_held_out_rows_without_labels_move_nothing(mode: str, backend: str):
    model = make_model(CONFIG, backend, torch.float32)
    training, held_out = (make_batch(CONFIG, 40, seed, torch.float32) for seed in (1, 2))
    held_out.label.fill_(torch.nan)
    found = fusion_gradient(mode, ModelProblem(model, training, held_out), rate=0.1, terms=2)
    assert torch.equal(flat(found), torch.zeros(4))


@pytest.mark.parametrize("mode", bilevel.HIGHER_ORDER)
def test_ids_that_adam_has_not_met(mode: str):
    """Adam's scale is 1 / eps for them. L_train does not depend on those that only the held-out batch has."""
    config = dataclasses.replace(CONFIG, vocab_sizes=(4000, 30), bag_vocab_sizes=(3000,), bag_pooling=("mean",))
    model = make_model(config, "cpu", torch.float32)
    batches = [make_batch(config, 512, seed, torch.float32) for seed in (1, 2)]
    problem = ModelProblem(model, *batches)
    scale = adam_like(problem.weights)
    expected = fusion_gradient(mode, problem, rate=0.1, scale=scale)
    tables = [number for number, weight in enumerate(problem.weights) if len(weight) >= 3000]
    ids = batches[0].ids + torch.tensor([0, 4000])
    for number, met in zip(tables, (ids, batches[0].bags[0].values), strict=True):
        used = torch.isin(torch.arange(len(scale[number])), met)
        assert 0 < used.sum() < len(used)
        scale[number] = torch.where(used[:, None], scale[number], 1e8)
    assert_same_bits(fusion_gradient(mode, problem, rate=0.1, scale=scale), expected)
    for number in tables:  # and now those of the training batch as well
        scale[number].fill_(1e8)
    found = fusion_gradient(mode, problem, rate=1e-3, scale=scale)
    assert flat(found).isfinite().all() and flat(found).norm() < 10 * flat(expected).norm()


def test_sparse_tables_are_refused():
    model = M3oE(CONFIG, backend="cpu", sparse_grad=True)
    batch = make_batch(CONFIG, 10, 1, torch.float32)
    with pytest.raises(ConfigError, match="embedding_optimizer same"):
        ModelProblem(model, batch, batch)


@pytest.mark.parametrize("mode", ["off", *MODES])
def test_warning_is_for_detached_gates_only(mode: str):
    detached = dataclasses.replace(CONFIG, gate_detach=True)
    assert bilevel.warning(mode, CONFIG) is None
    assert bilevel.warning(mode, dataclasses.replace(detached, shared_experts=0)) is None
    text = bilevel.warning(mode, detached)
    assert (text is None) == (mode not in bilevel.HIGHER_ORDER)
    assert text is None or ("gate_detach" in text and "\n" not in text)


def assert_same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
