"""The compiled network op against the float64 oracle: values, every gradient, ugly shapes, hostile inputs."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from m3oe_fast import folded, reference
from m3oe_fast.folded import NetworkWeights
from m3oe_fast.ops import infer, network, network_loss, pack
from tests.cases import Case, cast, make_inputs, make_weights, names, stacked_axes
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

PUBLISHED = Case(rows=1000, inputs=113, hidden=256, widths=(64,), tower=64)
UGLY = [
    PUBLISHED,
    dataclasses.replace(PUBLISHED, rows=7),
    Case(rows=1),
    Case(rows=0),
    Case(rows=7, domains=10, tasks=4, shared=8),
    Case(rows=1000, inputs=1, hidden=17, widths=(17,), tower=17, domains=1, tasks=1, shared=0),
    Case(rows=1000, inputs=17, hidden=113, widths=(113,), tower=113, domains=2, tasks=3, shared=1),
    Case(rows=200, inputs=200, hidden=200, widths=(200,), tower=200, domains=5, tasks=2, shared=8),
    Case(rows=1000, inputs=64, hidden=64, widths=(64, 17), tower=113, domains=10, tasks=1, shared=3),
    Case(rows=300, inputs=113, hidden=64, widths=(17, 113, 64), tower=17, domains=4, tasks=4, shared=5),
    Case(rows=100, inputs=7, hidden=1, widths=(1,), tower=1, domains=2, tasks=2, shared=2),
    Case(rows=100, inputs=5, hidden=16, widths=(1, 17, 1), tower=17, domains=3, tasks=2, shared=2),
    Case(rows=500, empty_domain=True),
    Case(rows=500, star_linear=True),
    Case(rows=500, gate_detach=False),
    Case(rows=500, gate_detach=False, star_linear=True, domains=1, tasks=1),
    Case(rows=500, masked=True, gate_detach=False),
    Case(rows=500, inputs=32, representation=False, gate_detach=False),
    Case(rows=500, inputs=17, representation=False, widths=(17, 33)),
    Case(rows=97, shared=0, tasks=3),
    Case(rows=200, gated=9, gate_detach=False),
    Case(rows=200, gated=9, masked=True, gate_detach=False, representation=False, inputs=24),
    Case(rows=300, domains=50, tasks=8, shared=2, widths=(33,), tower=65),
    Case(rows=50, gated=1, tasks=1, domains=16),
]


def run(function, case: Case, weights: NetworkWeights, x, domain, grad, mask):
    """Logits, then the gradients of x and of every weight."""
    logits = function(x, domain, weights, gate_mask=mask, **case.switches)
    wanted = [x, *weights.flat()]
    grads = torch.autograd.grad(logits, wanted, grad, allow_unused=True)
    return logits.detach(), [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]


def three_ways(case: Case, dtype=torch.float32, function=network):
    """(ours, eager in `dtype`, eager in float64), each (logits, gradients), from the same rounded numbers."""
    weights = make_weights(case, dtype)
    x, domain, grad, mask = make_inputs(case, dtype)
    ours = run(function, case, weights, x, domain, grad, mask)
    eager = run(folded.routed, case, weights, x, domain, grad, mask)
    exact = x.detach().double().requires_grad_()
    oracle = run(folded.routed, case, cast(weights, torch.float64), exact, domain, grad.double(), mask)
    return ours, eager, oracle, ["x", *names(weights)]


def assert_as_close_as_eager(ours, eager, oracle, labels) -> None:
    assert_close_to_oracle(ours[0], eager[0], oracle[0], FORWARD, "logits")
    for label, *grads in zip(labels, ours[1], eager[1], oracle[1], strict=True):
        assert_close_to_oracle(*grads, GRADIENT, f"gradient of {label}", stacked_axes(label))


@pytest.mark.parametrize("case", UGLY, ids=str)
def test_values_and_gradients_against_the_oracle(case):
    assert_as_close_as_eager(*three_ways(case))


@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_of_a_large_batch_keep_their_digits(threads):
    """Every row pulls the same way, so a chain of additions through all tiles would show."""
    case = Case(rows=100_000, inputs=3, hidden=16, widths=(16,), tower=16, domains=2, tasks=1, shared=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weights = make_weights(case, torch.float32)
        x, domain, _, _ = make_inputs(case, torch.float32)
        grad = torch.full((case.rows, 1), 0.1)
        ours, eager = (run(f, case, weights, x, domain, grad, None) for f in (network, folded.routed))
        exact = x.detach().double().requires_grad_()
        oracle = run(folded.routed, case, cast(weights, torch.float64), exact, domain, grad.double(), None)
    finally:
        torch.set_num_threads(before)
    for label, *grads in zip(["x", *names(weights)], ours[1], eager[1], oracle[1], strict=True):
        assert_close_to_oracle(*grads, GRADIENT, f"gradient of {label}", stacked_axes(label))


@pytest.mark.parametrize("case", UGLY, ids=str)
def test_scalar_double_path_against_the_oracle(case):
    ours, _, oracle, labels = three_ways(case, torch.float64)
    for label, mine, theirs in zip(["logits", *labels], [ours[0], *ours[1]], [oracle[0], *oracle[1]], strict=True):
        scale = theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9 * scale + 1e-12, msg=lambda m, n=label: f"{n}: {m}")


@pytest.mark.parametrize("star_linear", [False, True])
def test_gradcheck_in_double(star_linear):
    case = Case(
        rows=9, inputs=5, hidden=6, widths=(7, 5), tower=4, shared=2, star_linear=star_linear, gate_detach=False
    )
    weights = make_weights(case)
    x, domain, _, _ = make_inputs(case)

    def logits(x, *flat):
        return network(x, domain, NetworkWeights.unflat(flat), **case.switches)

    assert torch.autograd.gradcheck(logits, (x, *weights.flat()), eps=1e-6, atol=1e-5, nondet_tol=0.0)


def test_detached_gates_pass_nothing_to_the_representation():
    case = Case(rows=50)
    weights = make_weights(case)
    x, domain, grad, _ = make_inputs(case)
    attached = run(network, dataclasses.replace(case, gate_detach=False), weights, x, domain, grad, None)[1][0]
    detached = run(network, case, weights, x, domain, grad, None)[1][0]
    assert not torch.allclose(attached, detached)


def test_float64_ids_are_refused_and_int32_ids_give_the_same_bits():
    case = Case(rows=200)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    assert torch.equal(network(x, domain.int(), weights), network(x, domain, weights))
    with pytest.raises(TypeError, match="int32 or int64"):
        network(x, domain.double(), weights)


def test_non_contiguous_and_misaligned_inputs_give_the_same_bits():
    case = Case(rows=100)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    expected = network(x, domain, weights)
    x = x.detach()
    transposed = x.t().contiguous().t()
    wide = torch.empty(100, 29)
    wide[:, 3:16] = x
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    every_other = torch.zeros(200, dtype=torch.int64)
    every_other[::2] = domain
    for strange in (transposed, wide[:, 3:16], shifted):
        assert torch.equal(network(strange, every_other[::2], weights), expected)
    strided = NetworkWeights.unflat([w.detach().mT.contiguous().mT if w.ndim > 1 else w for w in weights.flat()])
    assert torch.equal(network(x, domain, strided), expected)


def test_an_expanded_gradient_is_read_within_its_bounds():
    case = Case(rows=100)
    weights = make_weights(case)
    x, domain, _, _ = make_inputs(case)
    network(x, domain, weights).sum().backward()
    expanded = x.grad.clone()
    x.grad = None
    network(x, domain, weights).backward(torch.ones(100, 2, dtype=torch.float64))
    assert torch.equal(x.grad, expanded)


def test_only_what_needs_a_gradient_gets_one():
    case = Case(rows=30)
    weights = cast(make_weights(case), torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    weights.table.requires_grad_(False)
    network(x.detach(), domain, weights).sum().backward()
    assert x.grad is None and weights.table.grad is None and weights.head_bias.grad is not None
    with torch.no_grad():
        assert not network(x, domain, weights).requires_grad


def test_second_derivatives_are_refused():
    case = Case(rows=5)
    weights = make_weights(case)
    x, domain, _, _ = make_inputs(case)
    (first,) = torch.autograd.grad(network(x, domain, weights).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_a_domain_out_of_range_names_its_row(bad):
    case = Case(rows=20)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    domain[13] = bad
    with pytest.raises(RuntimeError, match=rf"domain\[13\] is {bad}, the model has 3 domains"):
        network(x, domain, weights)


def test_a_row_with_nan_poisons_only_itself():
    case = Case(rows=100, gate_detach=False)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    expected = network(x, domain, weights).detach()
    spoiled = x.detach().clone()
    spoiled[41, 5] = float("nan")
    logits = network(spoiled, domain, weights)
    assert torch.isnan(logits[41]).all()
    others = torch.arange(100) != 41
    assert torch.equal(logits[others], expected[others])


def test_a_nan_in_one_expert_does_not_reach_gates_that_mask_it():
    case = Case(rows=40, masked=True)
    weights = make_weights(case, torch.float32)
    x, domain, grad, mask = make_inputs(case, torch.float32)
    with torch.no_grad():
        x[3, 0] = float("nan")
    ours, eager = (run(f, case, weights, x, domain, grad, mask)[1] for f in (network, folded.routed))
    for label, mine, theirs in zip(["x", *names(weights)], ours, eager, strict=True):
        assert torch.equal(torch.isnan(mine), torch.isnan(theirs)), label


def test_forward_mode_is_refused_not_silently_zero():
    case = Case(rows=5)
    weights = NetworkWeights.unflat([w.detach() for w in make_weights(case).flat()])
    x, domain, _, _ = make_inputs(case)
    with pytest.raises(RuntimeError):
        torch.func.jvp(lambda v: network(v, domain, weights), (x.detach(),), (torch.ones_like(x),))


def test_an_infinite_input_does_not_pass_for_a_finite_result():
    case = Case(rows=10)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    spoiled = x.detach().clone()
    spoiled[3, 0] = float("inf")
    assert torch.isnan(network(spoiled, domain, weights)[3]).all()


def test_extreme_gate_scores_neither_overflow_nor_vanish():
    case = Case(rows=60)
    weights = make_weights(case)
    weights = weights._replace(gate_weight=(weights.gate_weight.detach() * 1e3).requires_grad_())
    x, domain, grad, _ = make_inputs(case, torch.float32)
    oracle = run(folded.routed, case, weights, x.detach().double().requires_grad_(), domain, grad.double(), None)
    single = cast(weights, torch.float32)
    ours, eager = (run(f, case, single, x, domain, grad, None) for f in (network, folded.routed))
    assert_close_to_oracle(ours[0], eager[0], oracle[0], FORWARD, "logits")
    for mine, theirs, exact in zip(ours[1], eager[1], oracle[1], strict=True):
        assert_close_to_oracle(mine, theirs, exact, GRADIENT)


def test_same_bits_every_time_and_the_same_values_for_any_number_of_threads():
    ours = three_ways(PUBLISHED)[0]
    again = three_ways(PUBLISHED)[0]
    assert all(torch.equal(a, b) for a, b in zip([ours[0], *ours[1]], [again[0], *again[1]], strict=True))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            other = three_ways(PUBLISHED)[0]
            assert torch.equal(ours[0], other[0])
            for a, b in zip(ours[1], other[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads_do_not_share_scratch_memory():
    cases = [Case(rows=400), PUBLISHED, Case(rows=50, widths=(17, 9)), Case(rows=300, domains=7)]
    expected = [three_ways(case)[0] for case in cases]
    results: list = [None] * len(cases)

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = three_ways(cases[i])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("gate_bias", (3, 2, 5)),
        ("table", (3, 2)),
        ("tower_weight", (3, 2, 16, 15)),
        ("skip_bias", (31,)),
        ("head_weight", (3, 2, 16, 1)),
        ("gate_weight", (3, 2, 32, 10)),
    ],
)
def test_a_wrong_weight_shape_is_named(field, shape):
    case = Case(rows=5)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    with pytest.raises(ValueError, match=field):
        network(x, domain, weights._replace(**{field: torch.zeros(shape)}))


@pytest.mark.parametrize(("part", "shape"), [("weight", (9, 31, 16)), ("weight", (16,)), ("gain", (9, 15))])
def test_a_wrong_expert_shape_is_named(part, shape):
    case = Case(rows=5)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    layer = weights.experts[0]._replace(**{part: torch.zeros(shape)})
    with pytest.raises(ValueError, match=r"experts\[0\]"):
        network(x, domain, weights._replace(experts=(layer,)))


def forward_arguments(x, domain, weights, mask=None, lookup=None, packed=None, precision="fp32"):
    """Of the raw op; lookup is (ids, embedding, vocab)."""
    return (x, *(lookup or (None, None, ())), domain, weights, mask, packed, False, precision, False)


def backward_arguments(
    grad, x, domain, weights, mask=None, lookup=None, input_grad=True, embedding_grad="none", table_grad=True
):
    inputs = (grad, x, *(lookup or (None, None, ())), domain, weights, mask)
    return (*inputs, False, True, "fp32", input_grad, embedding_grad, table_grad)


def test_leftover_weights_without_a_representation_are_refused():
    """Nobody would write their gradients."""
    case = Case(rows=5, inputs=32, representation=False)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    with pytest.raises(ValueError, match="skip_weight must be empty"):
        network(x, domain, weights._replace(skip_weight=torch.zeros(32, 32)))
    flat = [w.detach() for w in weights._replace(skip_bias=torch.zeros(32)).flat()]
    with pytest.raises(RuntimeError, match="must be empty"):
        torch.ops.m3oe_fast.network_fwd(*forward_arguments(x.detach(), domain, flat))


def wrong_lookups(ids, table):
    """Lookups that do not fit ids [5, 2] and a table [5, 4] of fields with 3 and 2 rows, for 5 rows of 13 inputs."""
    return (
        (ids[1:], table, (3, 2)),
        (ids, table, (3, 3)),
        (ids, table, (6, -1)),
        (ids, table, (5,)),
        (ids, table.double(), (3, 2)),
        (ids, table[:, :3], (3, 2)),
        (ids.float(), table, (3, 2)),
        (ids, None, (3, 2)),
    )


def test_the_raw_op_refuses_what_would_read_out_of_bounds():
    case = Case(rows=5)
    flat = make_weights(case, torch.float32).flat()
    x, domain, grad, _ = make_inputs(case, torch.float32)
    x = x.detach()
    op = torch.ops.m3oe_fast.network_fwd
    table = torch.zeros(5, 4)
    ids = torch.zeros(5, 2, dtype=torch.int32)
    for bad in (flat[:-1], [*flat[:4], flat[4][1:], *flat[5:]], [flat[0].double(), *flat[1:]]):
        with pytest.raises(RuntimeError):
            op(*forward_arguments(x, domain, bad))
    with pytest.raises(RuntimeError):
        op(*forward_arguments(x, domain[:-1], flat))
    with pytest.raises(RuntimeError):
        torch.ops.m3oe_fast.network_bwd(*backward_arguments(grad[1:], x, domain, flat))
    columns = x[:, 8:].contiguous()
    op(*forward_arguments(columns, domain, flat, lookup=(ids, table, (3, 2))))
    for bad in wrong_lookups(ids, table):
        with pytest.raises(RuntimeError):
            op(*forward_arguments(columns, domain, flat, lookup=bad))
    for precision in ("fp64", "tf32", ""):
        with pytest.raises(RuntimeError, match="precision"):
            op(*forward_arguments(x, domain, flat, precision=precision))
    packed = torch.ops.m3oe_fast.network_pack(flat, None, case.inputs, False, "fp32")
    op(*forward_arguments(x, domain, flat, packed=packed))
    for bad in (packed[:-1], packed.double(), packed.repeat(2)[::2]):
        with pytest.raises(RuntimeError, match="packed"):
            op(*forward_arguments(x, domain, flat, packed=bad))


@pytest.mark.parametrize("case", [Case(rows=20), Case(rows=0), Case(rows=9, masked=True)], ids=str)
def test_opcheck(case):
    weights = [w.detach() for w in make_weights(case, torch.float32).flat()]
    x, domain, grad, mask = make_inputs(case, torch.float32)
    x = x.detach()
    lookup = (torch.zeros(case.rows, 2, dtype=torch.int32), torch.ones(5, 4), (3, 2))
    packed = torch.ops.m3oe_fast.network_pack(weights, mask, case.inputs, False, "fp32")
    for columns, fields, ready in ((x, None, None), (x[:, 8:], lookup, packed)):
        arguments = forward_arguments(columns, domain, weights, mask, lookup=fields, packed=ready)
        torch.library.opcheck(torch.ops.m3oe_fast.network_fwd.default, arguments)
        for wanted in ((True, "none", True), (False, "dense", False), (True, "sparse", True)):
            arguments = backward_arguments(grad, columns, domain, weights, mask, fields, *wanted)
            torch.library.opcheck(torch.ops.m3oe_fast.network_bwd.default, arguments)
    arguments = (weights, mask, case.inputs, False, "fp32")
    torch.library.opcheck(torch.ops.m3oe_fast.network_pack.default, arguments)


def test_compiles_without_a_graph_break_and_trains_the_same():
    case = Case(rows=64)
    weights = make_weights(case, torch.float32)
    x, domain, grad, _ = make_inputs(case, torch.float32)

    def logits(x, domain, weights):
        return network(x * 1.5, domain, weights)

    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    for function in (logits, compiled):
        for tensor in (x, *weights.flat()):
            tensor.grad = None
        function(x, domain, weights).backward(grad)
        if function is logits:
            expected = [x.grad, *(w.grad for w in weights.flat())]
    got = [x.grad, *(w.grad for w in weights.flat())]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@dataclasses.dataclass(frozen=True)
class Sparse(Case):
    """A network whose domains use some of the experts: `kind` says which.

    "specific": shared experts and one per (domain, task) pair, gated by mask, no coefficients (PLE).
    "own": one expert per domain, no gates, coefficient 1 (STAR).
    "random": gates and coefficients at random; the last expert nobody uses, nor domain 0 any, and in domain 1 all gates
    are open.
    """

    kind: str = "specific"

    @property
    def experts(self) -> int:
        own = {"specific": self.domains * self.tasks, "own": self.domains - self.shared, "random": 7}
        return self.shared + own[self.kind]

    @property
    def gates(self) -> int:
        return {"specific": self.experts, "own": 0, "random": self.experts - 3}[self.kind]

    def problem(self, dtype, table_grad=False):
        """weights, x, domain, gradient of the logits, mask; the table requires a gradient only if told so."""
        x, domain, grad, _ = make_inputs(self, dtype)
        pairs = (self.domains, self.tasks)
        table, mask = torch.zeros(*pairs, self.experts), torch.zeros(*pairs, self.gates, dtype=torch.bool)
        if self.kind == "specific":
            own = torch.eye(self.domains * self.tasks, dtype=torch.bool).view(*pairs, -1)
            mask[:] = torch.cat([torch.ones(*pairs, self.shared, dtype=torch.bool), own], -1)
        elif self.kind == "own":
            table[:] = torch.eye(self.domains)[:, None]
        else:
            generator = torch.Generator().manual_seed(5)
            chosen = torch.rand(table.shape, generator=generator) < 0.25
            table[chosen] = torch.randn(table.shape, generator=generator)[chosen]
            mask[:] = torch.rand(mask.shape, generator=generator) < 0.2
            table[..., -1], table[0], mask[0], mask[1] = 0, 0, False, True
        weights = make_weights(self, dtype)._replace(table=table.to(dtype).requires_grad_(table_grad))
        return weights, x, domain, grad, mask

    def used(self) -> torch.Tensor:
        """bool [D, E]."""
        weights, _, _, _, mask = self.problem(torch.float32)
        used = weights.table != 0
        used[..., : self.gates] |= mask
        return used.any(1)


SPARSE = [
    Sparse(rows=300, gate_detach=False),
    Sparse(rows=300, inputs=33, representation=False, widths=(48, 17), domains=5, shared=2, empty_domain=True),
    Sparse(rows=200, inputs=113, representation=False, widths=(80, 64), tower=64, kind="own", domains=5),
    Sparse(rows=200, widths=(17,), kind="own", domains=4, empty_domain=True),
    Sparse(rows=250, kind="random", domains=5, gate_detach=False),
    Sparse(rows=97, inputs=21, representation=False, widths=(9, 40, 33), kind="random", domains=3, gate_detach=False),
    Sparse(rows=1, kind="random", domains=5),
    Sparse(rows=0, kind="specific"),
]


def sparse_ways(case: Sparse, table_grad: bool):
    """As `three_ways`: logits and the gradients of x and of every weight, of the table only if wanted."""
    results = []
    for function, dtype in ((network, torch.float32), (folded.routed, torch.float32), (folded.routed, torch.float64)):
        weights, x, domain, grad, mask = case.problem(torch.float32, table_grad)
        flat = [w.detach().to(dtype).requires_grad_(w.requires_grad) for w in weights.flat()]
        x = x.detach().to(dtype).requires_grad_()
        logits = function(x, domain, NetworkWeights.unflat(flat), gate_mask=mask, **case.switches)
        wanted = [tensor for tensor in (x, *flat) if tensor.requires_grad]
        grads = torch.autograd.grad(logits, wanted, grad.to(dtype), allow_unused=True)
        results.append(
            (logits.detach(), [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)])
        )
    labels = [name for name in names(weights) if table_grad or name != "table"]
    return *results, ["x", *labels]


@pytest.mark.parametrize("table_grad", [False, True])
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_experts_that_a_domain_does_not_use_against_the_oracle(case, table_grad):
    """Without a gradient of the table they are skipped; with one they are not, since its zeros have gradients too. An
    expert's slice that the oracle gives no gradient must be exactly zero."""
    assert_as_close_as_eager(*sparse_ways(case, table_grad))


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "bf16"])
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_skipping_experts_changes_nothing(case, precision):
    """A coefficient of zero adds nothing: the same bits as from computing all. Only the gradient of the experts' input,
    and what follows from it, is a sum over other pieces: as close to the oracle as computing all is."""
    label, pair_weight, _ = make_targets(case, torch.float32)
    results = []
    for table_grad, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.float64)):
        weights, x, domain, grad, mask = case.problem(torch.float32, table_grad)
        flat = [w.detach().to(dtype).requires_grad_(w.requires_grad) for w in weights.flat()]
        weights = NetworkWeights.unflat(flat)
        x = x.detach().to(dtype).requires_grad_()
        options = {"gate_mask": mask, "precision": precision if dtype == torch.float32 else "fp32", **case.switches}
        through_input = [x, *(w for w in flat[:8] if w.numel())]
        others = [w for w in flat[8:] if w is not weights.table and w.numel()]
        logits = network(x, domain, weights, **options)
        targets = (label.to(dtype), weights)
        loss, pair_loss = network_loss(x, domain, *targets, pair_weight=pair_weight.to(dtype), **options)
        exact, close = [logits, pair_loss], []
        for of, output_grad in ((logits, grad.to(dtype)), (loss, None)):
            exact += torch.autograd.grad(of, others, output_grad, retain_graph=True)
            close += torch.autograd.grad(of, through_input, output_grad)
        results.append((exact, close))
    (ours, ours_close), (all_experts, all_close), (_, oracle) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, all_experts, strict=True))
    for i, values in enumerate(zip(ours_close, all_close, oracle, strict=True)):
        assert_close_to_oracle(*values, GRADIENT, f"gradient {i}")


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_one_pass_over_the_used_experts_against_the_oracle(case):
    label, pair_weight, row_weight = make_targets(case, torch.float32)
    results = []
    for function, dtype in ((network_loss, torch.float32), (eager_loss, torch.float32), (eager_loss, torch.float64)):
        weights, x, domain, _, mask = case.problem(torch.float32, table_grad=True)
        weights = cast(weights, dtype)
        # The kernels are told that nobody wants it, eager must leave it out of what is compared.
        weights.table.requires_grad_(False)
        x, pairs = (v.detach().to(dtype).requires_grad_() for v in (x, pair_weight))
        options = {"pair_weight": pairs, "row_weight": row_weight.to(dtype), "gate_mask": mask}
        loss, pair_loss = function(x, domain, label.to(dtype), weights, **options, **case.switches)
        wanted = [x, pairs, *(w for w in weights.flat() if w.requires_grad)]
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
        results.append([loss.detach(), pair_loss, *filled])
    labels = ["loss", "pair_loss", "x", "pair_weight", *(name for name in names(weights) if name != "table")]
    for label, *values in zip(labels, *results, strict=True):
        factor = FORWARD if label in ("loss", "pair_loss") else GRADIENT
        assert_close_to_oracle(*values, factor, label, stacked_axes(label))


@pytest.mark.parametrize("case", [case for case in SPARSE if case.rows > 1], ids=str)
def test_unused_experts_are_not_computed(case):
    """Their weights are NaN in turn: only rows of domains that use the expert may notice, packed weights or not."""
    used = case.used()
    for e in range(case.experts):
        weights, x, domain, grad, mask = case.problem(torch.float32)
        with torch.no_grad():
            for layer in weights.experts:
                for part in layer:
                    part[e] = float("nan")
        hit = used[:, e][domain]
        logits = network(x, domain, weights, gate_mask=mask, **case.switches)
        assert torch.equal(logits.isnan().any(1), hit)
        packed = pack(weights, case.inputs, gate_mask=mask)
        served = infer(x.detach(), domain, [w.detach() for w in weights.flat()], packed, gate_mask=mask)
        torch.testing.assert_close(served, logits.detach(), rtol=0, atol=0, equal_nan=True)
        wanted = [x, *(w for layer in weights.experts for w in layer)]
        clean = torch.where(hit[:, None], 0, 1)
        d_x, *d_experts = torch.autograd.grad(logits, wanted, grad * clean)
        assert d_x[~hit].isfinite().all()
        if not hit.any():
            assert all(d.isfinite().all() and not d[e].any() for d in d_experts)


def test_a_coefficient_of_nan_counts_as_used_and_minus_zero_does_not():
    case = Sparse(rows=60, kind="own", domains=3)
    weights, x, domain, _, mask = case.problem(torch.float32)
    expected = network(x, domain, weights, gate_mask=mask)
    with torch.no_grad():
        weights.table[2, 1, 0] = float("nan")
        weights.table[1, 0, 2] = -0.0
    logits = network(x, domain, weights, gate_mask=mask)
    assert logits[domain == 2, 1].isnan().all()
    logits = logits.detach().clone()
    logits[domain == 2, 1] = expected.detach()[domain == 2, 1]
    assert torch.equal(logits, expected)


def test_a_domain_without_experts_gets_the_towers_of_zero():
    case = Sparse(rows=60, kind="random", domains=3)
    weights, x, domain, _, mask = case.problem(torch.float64)
    assert not case.used()[0].any()
    logits = network(x, domain, weights, gate_mask=mask)[domain == 0]
    of_zero = folded.routed(torch.zeros_like(x[:1]), domain.new_zeros(1), weights, gate_mask=mask)
    torch.testing.assert_close(logits, of_zero.expand_as(logits), rtol=1e-12, atol=1e-12)


def test_gradcheck_of_a_table_of_zeros_in_double():
    case = Sparse(rows=9, inputs=5, hidden=6, widths=(7, 5), tower=4, shared=1, domains=2, kind="specific")
    weights, x, domain, _, mask = case.problem(torch.float64, table_grad=True)
    assert not weights.table.any()

    def logits(table):
        return network(x.detach(), domain, weights._replace(table=table), gate_mask=mask)

    assert torch.autograd.gradcheck(logits, (weights.table,), eps=1e-6, atol=1e-5, nondet_tol=0.0)


def test_the_raw_op_computes_the_gradient_of_the_table_only_if_told():
    weights, x, domain, grad, mask = SPARSE[0].problem(torch.float32)
    flat = [w.detach() for w in weights.flat()]
    with_table, without = (
        torch.ops.m3oe_fast.network_bwd(
            *backward_arguments(grad, x.detach(), domain, flat, mask, table_grad=table_grad)
        )
        for table_grad in (True, False)
    )
    table = 3 + NetworkWeights._fields.index("table")
    assert with_table[table].any() and not without[table].any()
    assert all(torch.equal(*both) for both in zip(with_table[table + 1 :], without[table + 1 :], strict=True))


def eager_loss(x, domain, label, weights, *, pair_weight, row_weight, gate_mask, **switches):
    """What `network_loss` computes, from the eager network and the oracle's loss."""
    logits = folded.routed(x, domain, weights, gate_mask=gate_mask, **switches)
    pair_loss = reference.pair_losses(logits, domain, label, len(weights.table), row_weight)
    return (pair_loss * pair_weight).sum(), pair_loss.detach()


def make_targets(case: Case, dtype):
    """label with missing values and one pair without any, pair weights requiring a gradient, row weights."""
    generator = torch.Generator().manual_seed(2)
    label = torch.randint(2, (case.rows, case.tasks), generator=generator).to(dtype)
    label[torch.rand(label.shape, generator=generator) < 0.3] = float("nan")
    pair_weight = torch.rand(case.domains, case.tasks, generator=generator).add(0.5).to(dtype).requires_grad_()
    return label, pair_weight, torch.rand(case.rows, generator=generator).to(dtype)


def run_loss(function, case: Case, weights, x, domain, label, pair_weight, row_weight, mask):
    """loss, pair_loss, and the gradients of x, pair_weight and every weight, scaled by 1.7."""
    targets = {"pair_weight": pair_weight, "row_weight": row_weight, "gate_mask": mask}
    loss, pair_loss = function(x, domain, label, weights, **targets, **case.switches)
    wanted = [x, pair_weight, *weights.flat()]
    grads = torch.autograd.grad(loss * 1.7, wanted, allow_unused=True)
    return [
        loss.detach(),
        pair_loss,
        *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)),
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", UGLY, ids=str)
def test_loss_and_gradients_in_one_pass_against_the_oracle(case, weighted):
    assert_one_pass_as_close_as_eager(case, weighted, network_loss)


def assert_one_pass_as_close_as_eager(case: Case, weighted: bool, ours) -> None:
    results = []
    for function, dtype in ((ours, torch.float32), (eager_loss, torch.float32), (eager_loss, torch.float64)):
        weights = cast(make_weights(case, torch.float32), dtype)
        x, domain, _, mask = make_inputs(case, torch.float32)
        label, pair_weight, row_weight = make_targets(case, torch.float32)
        x, pair_weight = (v.detach().to(dtype).requires_grad_() for v in (x, pair_weight))
        rows = row_weight.to(dtype) if weighted else None
        results.append(run_loss(function, case, weights, x, domain, label.to(dtype), pair_weight, rows, mask))
    labels = ["loss", "pair_loss", "x", "pair_weight", *names(weights)]
    for label, *values in zip(labels, *results, strict=True):
        factor = FORWARD if label in ("loss", "pair_loss") else GRADIENT
        assert_close_to_oracle(*values, factor, label, stacked_axes(label))


def test_gradcheck_of_the_one_pass_loss_in_double():
    case = Case(rows=9, inputs=5, hidden=6, widths=(7,), tower=4, shared=2, gate_detach=False)
    weights = make_weights(case)
    x, domain, _, _ = make_inputs(case)
    label, pair_weight, row_weight = make_targets(case, torch.float64)

    def loss(x, pair_weight, *flat):
        targets = {"pair_weight": pair_weight, "row_weight": row_weight}
        return network_loss(x, domain, label, NetworkWeights.unflat(flat), **targets, **case.switches)[0]

    assert torch.autograd.gradcheck(loss, (x, pair_weight, *weights.flat()), eps=1e-6, atol=1e-5, nondet_tol=0.0)


def test_going_backward_again_adds_the_same_gradients():
    """The gradients are kept, not recomputed: accumulating into .grad must not change what is kept."""
    case = Case(rows=50)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    label, _, _ = make_targets(case, torch.float32)
    loss, _ = network_loss(x, domain, label, weights)
    loss.backward(retain_graph=True)
    once = [x.grad.clone(), *(w.grad.clone() for w in weights.flat())]
    for _ in range(3):
        loss.backward(retain_graph=True)
    for first, tensor in zip(once, [x, *weights.flat()], strict=True):
        torch.testing.assert_close(tensor.grad, 4 * first)


def test_the_one_pass_loss_is_that_of_the_logits_and_the_same_every_time():
    case = Case(rows=300, gate_detach=False)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    label, _, _ = make_targets(case, torch.float32)
    loss, pair_loss = network_loss(x, domain, label, weights, gate_detach=False)
    expected = reference.pair_losses(network(x, domain, weights, gate_detach=False), domain, label, 3)
    torch.testing.assert_close(pair_loss, expected.detach())
    again = [network_loss(x, domain, label, weights, gate_detach=False)[0] for _ in range(2)]
    grads = [torch.autograd.grad(value, [x, *weights.flat()]) for value in (loss, *again)]
    assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("name", ["label", "pair_weight", "row_weight"])
def test_wrong_targets_are_named(name):
    case = Case(rows=5)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    targets = {"label": torch.zeros(5, 2), "pair_weight": torch.ones(3, 2), "row_weight": torch.ones(5)}
    for bad in (targets[name][:-1], targets[name].double()):
        with pytest.raises(ValueError, match=name):
            network_loss(x, domain, weights=weights, **{**targets, name: bad})


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_of_the_one_pass_loss(weighted):
    case = Case(rows=20)
    weights = [w.detach() for w in make_weights(case, torch.float32).flat()]
    x, domain, _, _ = make_inputs(case, torch.float32)
    label, pair_weight, row_weight = make_targets(case, torch.float32)
    lookup = (torch.zeros(case.rows, 2, dtype=torch.int32), torch.ones(5, 4), (3, 2))
    targets = (label, row_weight if weighted else None, pair_weight.detach())
    for columns, fields, grads in ((x, None, (True, "none")), (x[:, 8:], lookup, (False, "dense"))):
        inputs = (columns.detach(), *(fields or (None, None, ())), domain)
        arguments = (*inputs, *targets, weights, None, False, True, "fp32", *grads, weighted)
        torch.library.opcheck(torch.ops.m3oe_fast.network_loss.default, arguments)
