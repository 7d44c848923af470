"""Precisions bf16 and bf16x3 of the compiled op against the float64 oracle, and the eager mode they are measured by.

Runs on the instruction set in use, and once more in a process that emulates tile registers (AMX), where both precisions
have kernels. Where the set in use has none for a precision, it computes in fp32 and every bound holds all the more.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from m3oe_fast import M3oE, _extension, backends, checkpoint, folded, reference
from m3oe_fast.errors import BackendError, ConfigError
from m3oe_fast.folded import NetworkWeights
from m3oe_fast.ops import Lookup, infer, network, network_loss, pack
from m3oe_fast.rounding import RoundedProducts
from tests.cases import Case, cast, make_inputs, make_weights, names, stacked_axes
from tests.test_model import CONFIG, batch, make
from tests.test_network import PUBLISHED, UGLY, make_targets, run, run_loss
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

PRECISIONS = ["bf16", "bf16x3"]
ROUNDING_UNIT = {"bf16": 2**-8, "bf16x3": 2**-15}  # a generous bound of what an operand loses, relative to itself
EDGES = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 128, 129]
SCALINGS = (1.0, 1.1, 1.3, 1.45, 1.7, 1.9)

both = pytest.mark.parametrize("precision", PRECISIONS)


def is_native(precision: str) -> bool:
    return backends.compute_precision("cpu", precision) == precision


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The eager emulation ------------------------------------------------------------------------------------------------


def by_hand(a: Tensor, b: Tensor, precision: str) -> Tensor:
    a_high, b_high = (v.bfloat16().to(v.dtype) for v in (a, b))
    if precision == "bf16":
        return a_high @ b_high
    a_low, b_low = ((v - h).bfloat16().to(v.dtype) for v, h in ((a, a_high), (b, b_high)))
    return a_high @ b_high + (a_high @ b_low + a_low @ b_high)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_spelling_of_a_product_is_rounded_alike(precision, dtype):
    a, b, base = (torch.randn(3, *shape, dtype=dtype) for shape in ((5, 7), (7, 4), (5, 4)))
    expected = by_hand(a, b, precision)
    with RoundedProducts(precision):
        same = [a @ b, torch.matmul(a, b), a.matmul(b), torch.bmm(a, b), a.bmm(b), b.__rmatmul__(a)]
        single = [torch.mm(a[1], b[1]), a[1].mm(b[1])]
        sums = [torch.baddbmm(base, a, b), base.baddbmm(a, b), torch.baddbmm(base, a, b, beta=0.5, alpha=3)]
    assert all(torch.equal(product, expected) for product in same)
    assert not torch.equal(expected, a @ b)
    for product in single:
        torch.testing.assert_close(product, expected[1], rtol=1e-6, atol=1e-6)  # another kernel, another order of sums
    for total, exact in zip(sums, (base + expected, base + expected, 0.5 * base + 3 * expected), strict=True):
        torch.testing.assert_close(total, exact)


@both
def test_gradients_of_rounded_products_are_rounded_products(precision):
    """Also of broadcast operands, and after the mode has ended."""
    a = torch.randn(6, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 7, 4, dtype=torch.float64, requires_grad=True)
    with RoundedProducts(precision):
        product = a @ b
    grad = torch.randn_like(product)
    d_a, d_b = torch.autograd.grad(product, (a, b), grad)
    torch.testing.assert_close(d_a, by_hand(grad, b.detach().mT, precision).sum(1, keepdim=True))
    torch.testing.assert_close(d_b, by_hand(a.detach().mT, grad, precision).sum(0))
    assert not torch.equal(d_a, (grad @ b.mT).sum(1, keepdim=True))


@both
def test_the_emulation_loses_what_its_operands_lose(precision):
    a, b = torch.rand(50, 200, dtype=torch.float64), torch.rand(200, 50, dtype=torch.float64)
    with RoundedProducts(precision):
        rounded = a @ b
    error = (rounded / (a @ b) - 1).abs().max().item()
    assert ROUNDING_UNIT[precision] / 200 < error < ROUNDING_UNIT[precision]


def test_the_emulation_leaves_alone_what_it_should():
    a, b = torch.randn(5, 7), torch.randn(7, 4)
    whole = torch.arange(6).view(2, 3)
    with RoundedProducts("fp32"):
        assert torch.equal(a @ b, torch.mm(a, b))
        torch.einsum("ij,jk->ik", a, b)
    with RoundedProducts("bf16"):
        assert torch.equal(whole @ whole.T, torch.tensor([[5, 14], [14, 50]]))
        assert torch.equal((a * b.mT[0]).sum(-1), (a * b.mT[0]).sum(-1))
        for product in (lambda: torch.einsum("ij,jk->ik", a, b), lambda: torch.nn.functional.linear(a, b.mT)):
            with pytest.raises(NotImplementedError, match="does not know"):
                product()
        with pytest.raises(NotImplementedError, match="matrices only"):
            _ = a @ b[:, 0]
    with pytest.raises(ConfigError, match="precision must be one of"):
        RoundedProducts("fp16")


# Against the oracle -------------------------------------------------------------------------------------------------


def away_from_kinks(weights: NetworkWeights) -> NetworkWeights:
    """The same weights with gains and offsets under which no ReLU is near its kink.

    A unit within rounding of zero is on in one computation and off in another, and then its gradient is all there or
    not at all: a gradient's largest error tells who was lucky. With every unit clearly on or off (half of them each)
    what remains is rounding, smooth, and every product counts.
    """

    def gain(values: Tensor) -> Tensor:
        return (0.2 * values.detach()).requires_grad_()

    def offset(values: Tensor) -> Tensor:
        sign = torch.where(values.detach() < 0, -1.0, 1.0)
        return (sign * (2 + values.detach().abs())).to(values.dtype).requires_grad_()

    fixed = {f"{layer}_gain": gain(getattr(weights, f"{layer}_gain")) for layer in ("star", "skip", "tower")}
    fixed |= {f"{layer}_offset": offset(getattr(weights, f"{layer}_offset")) for layer in ("star", "skip", "tower")}
    experts = tuple(e._replace(gain=gain(e.gain), offset=offset(e.offset)) for e in weights.experts)
    return weights._replace(**fixed, experts=experts)


def rescaled(scale: float, star_linear: bool):
    """`folded.routed` with every activation `scale` times as large and every weight behind it as much smaller.

    The same function, so autograd gives the same gradients; but operands are rounded at other places. That is another
    draw of the errors which this precision makes, by which to judge sums of few elements, where one draw may be lucky.
    """

    def routed(x, domain, weights: NetworkWeights, **switches):
        w = weights
        small = {name: getattr(w, name) / scale for name in ("skip_weight", "gate_weight", "tower_weight")}
        large = {name: getattr(w, name) * scale for name in ("star_gain", "star_offset", "skip_gain", "skip_offset")}
        if star_linear:
            large["star_bias"] = w.star_bias * scale
        else:
            small["star_weight"] = w.star_weight / scale
        experts = tuple(
            e._replace(weight=e.weight / scale, gain=e.gain * scale, offset=e.offset * scale) for e in w.experts
        )
        return folded.routed(x * scale, domain, w._replace(**small, **large, experts=experts), **switches)

    return routed


def assert_as_good_as_eager(labels, ours, draws, oracle) -> None:
    """Every tensor passes against one of eager's draws; later ones are computed only if an earlier one was too good."""
    left = list(range(len(labels)))
    for draw in draws:
        complaints = {}
        for i in left:
            label = labels[i]
            factor = FORWARD if label in ("logits", "loss", "pair_loss") else GRADIENT
            try:
                assert_close_to_oracle(ours[i], draw[i], oracle[i], factor, label, stacked_axes(label))
            except AssertionError as error:
                complaints[i] = error
        if not complaints:
            return
        left = list(complaints)
    raise next(iter(complaints.values()))


def assert_as_good_as_rounded_eager(
    case: Case, precision: str, weights: NetworkWeights, logits_only: bool = False, backend: str = "cpu"
) -> None:
    x, domain, grad, mask = make_inputs(case, torch.float32)

    def flat(result):
        return [result[0], *([] if logits_only else result[1])]

    def at_precision(*args, **switches):
        return network(*args, precision=precision, backend=backend, **switches)

    def draws():
        for scale in SCALINGS:
            with RoundedProducts(precision):
                yield flat(run(rescaled(scale, case.star_linear), case, weights, x, domain, grad, mask))

    exact = x.detach().double().requires_grad_()
    oracle = run(folded.routed, case, cast(weights, torch.float64), exact, domain, grad.double(), mask)
    ours = run(at_precision, case, weights, x, domain, grad, mask)
    labels = ["logits"] if logits_only else ["logits", "x", *names(weights)]
    assert_as_good_as_eager(labels, flat(ours), draws(), flat(oracle))


@both
@pytest.mark.parametrize("case", UGLY, ids=str)
def test_logits_against_the_oracle(case, precision):
    assert_as_good_as_rounded_eager(case, precision, make_weights(case, torch.float32), logits_only=True)


@both
@pytest.mark.parametrize("case", UGLY, ids=str)
def test_logits_and_gradients_away_from_kinks_against_the_oracle(case, precision):
    assert_as_good_as_rounded_eager(case, precision, away_from_kinks(make_weights(case, torch.float32)))


@both
@pytest.mark.parametrize("rows", EDGES)
@pytest.mark.parametrize("tiles", [1, 4])
def test_heights_and_widths_around_the_edges_of_blocks(rows, tiles, precision, one_thread):
    """A batch of one domain is cut into four tiles once they are tall enough: with tiles=4 each has `rows` rows."""
    at = EDGES.index(rows)
    sizes = EDGES[1:10]  # all gradients through a layer of one unit hang on how its few weights are rounded
    hidden, first, last, tower = (sizes[(step * at + 2 * step) % 9] for step in (1, 2, 4, 5))
    widths = {"inputs": EDGES[(3 * at) % 10], "hidden": hidden, "widths": (first, last), "tower": tower}
    case = Case(rows=rows * tiles, domains=1, tasks=3, shared=3, gate_detach=False, **widths)
    assert_as_good_as_rounded_eager(case, precision, away_from_kinks(make_weights(case, torch.float32)))


@both
@pytest.mark.parametrize("case", [UGLY[1], UGLY[8], UGLY[13], UGLY[20]], ids=str)
def test_the_one_pass_loss_against_the_oracle(case, precision):
    def at_precision(*args, **switches):
        return network_loss(*args, precision=precision, **switches)

    def results(function, dtype):
        weights = cast(away_from_kinks(make_weights(case, torch.float32)), dtype)
        x, domain, _, mask = make_inputs(case, torch.float32)
        label, pair_weight, row_weight = make_targets(case, torch.float32)
        x, pair_weight = (v.detach().to(dtype).requires_grad_() for v in (x, pair_weight))
        return run_loss(function, case, weights, x, domain, label.to(dtype), pair_weight, row_weight.to(dtype), mask)

    def eager(scale):
        def loss(x, domain, label, weights, *, pair_weight, row_weight, **switches):
            logits = rescaled(scale, case.star_linear)(x, domain, weights, **switches)
            pair_loss = reference.pair_losses(logits, domain, label, case.domains, row_weight)
            return (pair_loss * pair_weight).sum(), pair_loss.detach()

        return loss

    def draws():
        for scale in SCALINGS:
            with RoundedProducts(precision):
                yield results(eager(scale), torch.float32)

    labels = ["loss", "pair_loss", "x", "pair_weight", *names(make_weights(case))]
    assert_as_good_as_eager(labels, results(at_precision, torch.float32), draws(), results(eager(1), torch.float64))


def test_three_bf16_products_are_fp32_class():
    weights = make_weights(PUBLISHED, torch.float32)
    x, domain, _, _ = make_inputs(PUBLISHED, torch.float32)
    oracle = folded.routed(x.double(), domain, cast(weights, torch.float64))
    error = network(x, domain, weights, precision="bf16x3").double() - oracle
    assert error.norm() < 1e-5 * oracle.norm()


# What a precision does and does not touch ---------------------------------------------------------------------------


@both
def test_a_precision_without_instructions_is_fp32_to_the_bit_and_another_is_not(precision):
    case = Case(rows=200, gate_detach=False)
    weights = make_weights(case, torch.float32)
    x, domain, grad, _ = make_inputs(case, torch.float32)
    results = []
    for name in ("fp32", precision):
        logits = network(x, domain, weights, precision=name)
        results.append([logits, *torch.autograd.grad(logits, [x, *weights.flat()], grad)])
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    assert not same[0] if is_native(precision) else all(same)


@both
def test_a_precision_without_instructions_is_announced_once(precision):
    backends.warn_if_fp32.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        models = [M3oE(CONFIG, precision=precision, backend="cpu") for _ in range(3)]
        M3oE(CONFIG, backend="cpu")
    assert models[0].compute_precision == (precision if is_native(precision) else "fp32")
    assert [str(w.message).split(" here")[0] for w in caught] == (
        [] if is_native(precision) else [f"precision {precision!r} computes in fp32"]
    )


@both
def test_precision_wins_over_autocast(precision):
    torch.manual_seed(0)
    model = make()
    model.precision = precision
    ids, dense, domain, label = batch(CONFIG)
    expected = [model(ids, dense, domain), model.predict(ids, dense, domain), model.loss(ids, dense, domain, label)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [model(ids, dense, domain), model.predict(ids, dense, domain), model.loss(ids, dense, domain, label)]
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(expected, got, strict=True))


def test_other_names_and_dtypes_are_refused():
    case = Case(rows=5)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    for name in ("fp16", "BF16", "tf32", "", "bf16x2"):
        with pytest.raises(RuntimeError, match="precision must be"):
            network(x, domain, weights, precision=name)
        with pytest.raises(RuntimeError, match="precision must be"):
            pack(weights, case.inputs, precision=name)
    with pytest.raises(RuntimeError, match="precision must be"):
        network_loss(x, domain, torch.zeros(5, 2), weights, precision="half")
    for name in ("bf16", "bf16x3"):
        with pytest.raises(RuntimeError, match="float32"):
            network(x.double(), domain, cast(weights, torch.float64), precision=name)
    with pytest.raises(ConfigError, match="precision must be one of"):
        M3oE(CONFIG, precision="bf16x2")
    with pytest.raises(BackendError, match="tf32"):
        M3oE(CONFIG, precision="tf32", backend="cpu")


@pytest.mark.filterwarnings("ignore:precision")
def test_checkpoints_hold_no_precision(tmp_path):
    torch.manual_seed(0)
    model = M3oE(CONFIG, precision="bf16", backend="cpu")
    model.save(tmp_path)
    content = checkpoint.read(tmp_path)
    assert "precision" not in content["config"] and all(w.dtype == torch.float32 for w in content["weights"].values())
    assert M3oE.load(tmp_path).precision == "fp32"
    again = M3oE.load(tmp_path, precision="bf16", backend="cpu")
    inputs = batch(CONFIG)[:3]
    assert again.precision == "bf16" and torch.equal(again.predict(*inputs), model.predict(*inputs))


@both
def test_same_bits_every_time_and_the_same_logits_for_any_number_of_threads(precision):
    case = dataclasses.replace(PUBLISHED, rows=300, gate_detach=False)
    weights = make_weights(case, torch.float32)
    x, domain, grad, _ = make_inputs(case, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (before, before, 1, 3):
            torch.set_num_threads(threads)
            logits = network(x, domain, weights, precision=precision)
            results.append([logits, *torch.autograd.grad(logits, [x, *weights.flat()], grad)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    for other in results[2:]:  # a row's own results depend on nothing but the row
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


@both
def test_a_row_alone_has_the_bits_it_has_in_a_batch(precision):
    case = Case(rows=130, inputs=33, hidden=65, widths=(17, 33), tower=15)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    together = network(x, domain, weights, precision=precision)
    for row in (0, 1, 64, 129):
        alone = network(x[row : row + 1], domain[row : row + 1], weights, precision=precision)
        assert torch.equal(alone[0], together[row])


@both
def test_packed_weights_give_the_bits_of_unpacked_ones(precision):
    for case in (PUBLISHED, Case(rows=50, widths=(17, 33), shared=0), Case(rows=1), Case(rows=0)):
        weights = make_weights(case, torch.float32)
        x, domain, _, _ = make_inputs(case, torch.float32)
        packed = pack(weights, case.inputs, precision=precision)
        ready = infer(x.detach(), domain, weights.flat(), packed, precision=precision)
        assert torch.equal(ready, network(x, domain, weights, precision=precision).detach())
        assert torch.equal(packed.view(torch.int32), pack(weights, case.inputs, precision=precision).view(torch.int32))


@both
@pytest.mark.parametrize(
    "bad", [float("nan"), float("inf"), -float("inf"), torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)]
)
def test_what_is_not_finite_does_not_pass_for_finite(bad, precision):
    """The last is a NaN whose upper 16 bits are those of infinity."""
    case = Case(rows=70, inputs=17, gate_detach=False)
    weights = make_weights(case, torch.float32)
    x, domain, grad, _ = make_inputs(case, torch.float32)
    expected = network(x, domain, weights, precision=precision).detach()
    spoiled = x.detach().clone()
    spoiled[41, 16] = bad
    spoiled.requires_grad_()
    logits = network(spoiled, domain, weights, precision=precision)
    assert torch.isnan(logits[41]).all()
    others = torch.arange(case.rows) != 41
    assert torch.equal(logits[others], expected[others])
    logits.backward(grad)
    assert torch.isnan(spoiled.grad[41]).all() and torch.isfinite(spoiled.grad[others]).all()
    assert torch.isnan(weights.skip_weight.grad).any() and torch.isnan(weights.experts[0].weight.grad).all()

    broken = weights.skip_weight.detach().clone()
    broken[16, 31] = bad  # the last row of an odd number, alone in its word
    assert torch.isnan(network(x, domain, weights._replace(skip_weight=broken), precision=precision)).all()

    x.grad = None
    upstream = grad.clone()
    upstream[13, 1] = bad
    network(x, domain, weights, precision=precision).backward(upstream)
    assert torch.isnan(x.grad[13]).all() and torch.isfinite(x.grad[torch.arange(case.rows) != 13]).all()


@both
def test_lookup_inside_the_op_gives_the_bits_of_the_gathered_input(precision):
    case = Case(rows=90, inputs=3 * 7 + 2)
    weights = make_weights(case, torch.float32)
    _, domain, _, _ = make_inputs(case, torch.float32)
    table, dense, ids = torch.randn(12, 7), torch.randn(90, 2), torch.randint(4, (90, 3))
    gathered = torch.cat([table[ids + torch.tensor([0, 4, 8])].flatten(1), dense], dim=1)
    looked_up = network(dense, domain, weights, lookup=Lookup(ids, table, (4, 4, 4)), precision=precision)
    assert torch.equal(looked_up, network(gathered, domain, weights, precision=precision))


# Elsewhere ----------------------------------------------------------------------------------------------------------


def test_all_of_this_on_emulated_tile_registers():
    """In a process of its own: the instruction set is chosen once per process."""
    if _extension.load().cpu_isa() == "amx_emulated":
        pytest.skip("this is that process")
    environment = {**os.environ, "M3OE_FAST_CPU_ISA": "amx_emulated"}
    root = Path(__file__).parents[1]
    check = "from m3oe_fast import _extension; print(_extension.reasons_missing())"
    probe = subprocess.run([sys.executable, "-c", check], cwd=root, env=environment, capture_output=True, text=True)
    if "cannot run here" in probe.stdout:
        pytest.skip(probe.stdout.strip())
    own = Path(__file__).relative_to(root)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:logging",
        "-p",
        "no:cacheprovider",
        str(own),
    ]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
