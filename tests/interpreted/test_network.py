"""The network through the Triton kernels against the float64 oracle: values, gradients, ugly shapes, precisions."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from m3oe_fast import folded, kernels
from m3oe_fast.folded import NetworkWeights
from m3oe_fast.ops import infer, pack
from m3oe_fast.ops import network as any_network
from m3oe_fast.ops import network_loss as any_network_loss
from tests.cases import Case, cast, make_inputs, make_weights
from tests.test_network import (
    PUBLISHED,
    UGLY,
    assert_as_close_as_eager,
    assert_one_pass_as_close_as_eager,
    backward_arguments,
    forward_arguments,
    make_targets,
    run,
    three_ways,
    wrong_lookups,
)
from tests.test_precision import assert_as_good_as_rounded_eager, away_from_kinks

network = functools.partial(any_network, backend="triton")
network_loss = functools.partial(any_network_loss, backend="triton")


def small(case: Case) -> Case:
    """Small enough for the interpreter, with partial tiles and empty domains still."""
    sizes = {"rows": min(case.rows, 60), "domains": min(case.domains, 5), "shared": min(case.shared, 4)}
    return dataclasses.replace(case, **sizes)


CASES = [
    *dict.fromkeys(small(case) for case in UGLY if case.hidden < 200),
    Case(rows=40, inputs=130, hidden=200, widths=(200,), tower=70, domains=2, tasks=1, shared=0),
    Case(rows=70, inputs=150, hidden=100, widths=(130,), tower=70, domains=2, tasks=1, shared=1),
    Case(rows=70, inputs=40, hidden=70, widths=(20,), tower=5, representation=True, gated=9, gate_detach=False),
]
PUBLISHED_SMALL = dataclasses.replace(PUBLISHED, rows=40, shared=1)
FEW = [PUBLISHED_SMALL, *(case for case in CASES if len(case.widths) == 2 or not case.gate_detach or case.star_linear)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_against_the_oracle(case):
    assert_as_close_as_eager(*three_ways(case, function=network))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_loss_and_gradients_in_one_pass_against_the_oracle(case):
    assert_one_pass_as_close_as_eager(case, True, network_loss)


# tf32 is not emulated: there it only must not break.
@pytest.mark.parametrize(
    ("case", "precision"),
    [(case, p) for p, cases in (("bf16", FEW), ("bf16x3", FEW[:5]), ("tf32", FEW[:2])) for case in cases],
    ids=str,
)
def test_precisions_against_the_oracle(case, precision):
    assert_as_good_as_rounded_eager(
        case, precision, away_from_kinks(make_weights(case, torch.float32)), backend="triton"
    )


@pytest.mark.parametrize("precision", ["bf16", "bf16x3"])
def test_logits_near_kinks_at_a_precision(precision):
    weights = make_weights(PUBLISHED_SMALL, torch.float32)
    assert_as_good_as_rounded_eager(PUBLISHED_SMALL, precision, weights, logits_only=True, backend="triton")


def test_three_bf16_products_are_fp32_class():
    weights = make_weights(PUBLISHED_SMALL, torch.float32)
    x, domain, _, _ = make_inputs(PUBLISHED_SMALL, torch.float32)
    oracle = folded.routed(x.double(), domain, cast(weights, torch.float64))
    error = network(x, domain, weights, precision="bf16x3").double() - oracle
    assert error.norm() < 1e-5 * oracle.norm()


def all_results(case: Case, function=network) -> list[torch.Tensor]:
    weights = make_weights(case, torch.float32)
    x, domain, grad, mask = make_inputs(case, torch.float32)
    logits, grads = run(function, case, weights, x, domain, grad, mask)
    return [logits, *grads]


@pytest.fixture
def one_processor(monkeypatch):
    """As on a GPU with one multiprocessor: chunks of two tiles, one part of the rows."""
    from m3oe_fast.kernels import tuning

    monkeypatch.setattr(tuning, "device", lambda device: tuning.Device(processors=1, shared=227 * 1024))


def test_many_chunks_give_what_one_does(one_processor):
    case = Case(rows=300, domains=4, gate_detach=False, inputs=20, hidden=24, widths=(12, 9))
    assert_as_close_as_eager(*three_ways(case, function=network))


def test_a_gradient_all_of_whose_rows_pull_the_same_way_keeps_its_digits(one_processor):
    """One chain of additions through all rows would be off by 1e-5. The interpreter adds the rows of a tile one by one,
    which a GPU does not, so the ratio to eager PyTorch is no measure here."""
    case = Case(rows=3000, inputs=3, hidden=16, widths=(16,), tower=16, domains=2, tasks=1, shared=1)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    grad = torch.full((case.rows, 1), 0.1)
    ours = run(network, case, weights, x, domain, grad, None)
    exact = x.detach().double().requires_grad_()
    oracle = run(folded.routed, case, cast(weights, torch.float64), exact, domain, grad.double(), None)
    for mine, theirs in zip(ours[1][1:], oracle[1][1:], strict=True):
        assert (mine - theirs).abs().max() <= 4e-6 * theirs.abs().max()


def test_same_bits_every_time():
    case = Case(rows=200, gate_detach=False)
    assert all(torch.equal(a, b) for a, b in zip(all_results(case), all_results(case), strict=True))


def test_64_bit_places_give_the_same_bits(monkeypatch):
    from m3oe_fast.kernels import backward
    from m3oe_fast.kernels import network as forward

    case = Case(rows=70)
    expected = all_results(case)
    for module in (forward, backward):
        monkeypatch.setattr(module, "is_wide", lambda *_: True)
    assert all(torch.equal(a, b) for a, b in zip(all_results(case), expected, strict=True))


def test_layouts_of_the_inputs_do_not_matter():
    case = Case(rows=70)
    weights = make_weights(case, torch.float32)
    x, domain, grad, _ = make_inputs(case, torch.float32)
    expected = run(network, case, weights, x, domain, grad, None)
    wide = torch.empty(70, 29)
    wide[:, 3:16] = x.detach()
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x.detach())
    every_other = torch.zeros(140, dtype=torch.int64)
    every_other[::2] = domain
    transposed = NetworkWeights.unflat(
        [w.detach().mT.contiguous().mT.requires_grad_() if w.ndim > 1 else w for w in weights.flat()]
    )
    for other_x, other_domain, other_weights in (
        (wide[:, 3:16].requires_grad_(), domain.int(), weights),
        (shifted.requires_grad_(), every_other[::2], transposed),
    ):
        logits, grads = run(network, case, other_weights, other_x, other_domain, grad, None)
        assert torch.equal(logits, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


def test_an_expanded_gradient_of_the_logits():
    case = Case(rows=70)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    flat = [x, *weights.flat()]
    expanded = torch.autograd.grad(network(x, domain, weights).sum(), flat)
    whole = torch.autograd.grad(network(x, domain, weights), flat, torch.ones(70, 2))
    assert all(torch.equal(a, b) for a, b in zip(expanded, whole, strict=True))


def test_a_bad_row_spoils_only_itself_and_does_not_pass_for_good():
    case = Case(rows=70)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    expected = network(x, domain, weights)
    for bad in (float("nan"), float("inf")):
        spoiled = x.detach().clone()
        spoiled[3, 0] = bad
        logits = network(spoiled, domain, weights)
        assert torch.isnan(logits[3]).all()
        logits[3] = expected[3]
        assert torch.equal(logits, expected)


def test_extreme_gate_scores_neither_overflow_nor_vanish():
    case = Case(rows=60)
    weights = make_weights(case)
    weights = weights._replace(gate_weight=(weights.gate_weight.detach() * 1e3).requires_grad_())
    x, domain, grad, _ = make_inputs(case, torch.float32)
    oracle = run(folded.routed, case, weights, x.detach().double().requires_grad_(), domain, grad.double(), None)
    single = cast(weights, torch.float32)
    ours, eager = (run(f, case, single, x, domain, grad, None) for f in (network, folded.routed))
    assert_as_close_as_eager(ours, eager, oracle, ["x"] + [""] * (len(eager[1]) - 1))


def test_the_loss_of_extreme_logits():
    """A confident model: log1p(exp(-|logit|)) without its last digits would be 0."""
    case = Case(rows=60)
    weights = make_weights(case, torch.float32)
    weights = weights._replace(head_weight=(weights.head_weight.detach() * 12).requires_grad_())
    x, domain, _, _ = make_inputs(case, torch.float32)
    logits = network(x, domain, weights).detach()
    assert logits.abs().max() > 20
    label = (logits > 0).float()
    loss, pair_loss = network_loss(x, domain, label, weights)
    exact = torch.nn.functional.softplus(-logits.double().abs())
    count = torch.bincount(domain, minlength=3)
    expected = torch.zeros(3, 2, dtype=torch.float64).index_add(0, domain, exact) / count[:, None]
    torch.testing.assert_close(pair_loss.double(), expected, rtol=1e-5, atol=0)
    assert torch.isfinite(torch.autograd.grad(loss, x)[0]).all()


def test_a_pair_without_labels_adds_nothing_and_rows_without_labels_change_nothing():
    case = Case(rows=60)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    label, _, _ = make_targets(case, torch.float32)
    label[domain == 1, 0] = float("nan")
    loss, pair_loss = network_loss(x, domain, label, weights)
    grads = torch.autograd.grad(loss, [x, *weights.flat()])
    assert pair_loss[1, 0] == 0 and torch.isfinite(loss)
    assert not grads[1 + 15][1, 0].any() and grads[1 + 15][1, 1].any()
    more = torch.cat([x.detach(), torch.zeros(13, 13)]).requires_grad_()
    padded_domain = torch.cat([domain, torch.zeros(13, dtype=torch.int64)])
    padded_label = torch.cat([label, torch.full((13, 2), float("nan"))])
    padded_loss, padded_pairs = network_loss(more, padded_domain, padded_label, weights)
    torch.testing.assert_close(padded_pairs, pair_loss, rtol=1e-6, atol=0)
    for mine, theirs in zip(torch.autograd.grad(padded_loss, [more, *weights.flat()]), grads, strict=True):
        torch.testing.assert_close(mine[: len(theirs)], theirs, rtol=1e-4, atol=1e-6)


def test_packed_weights_serve_the_same_bits_and_probabilities():
    case = Case(rows=60)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    for precision in ("fp32", "bf16", "bf16x3"):
        expected = network(x, domain, weights, precision=precision).detach()
        packed = pack(weights, case.inputs, precision=precision, backend="triton")
        options = {"precision": precision, "backend": "triton"}
        flat = [w.detach() for w in weights.flat()]
        assert torch.equal(infer(x.detach(), domain, flat, packed, **options), expected)
        probability = infer(x.detach(), domain, flat, packed, probability=True, **options)
        torch.testing.assert_close(probability, torch.sigmoid(expected))


def test_a_domain_out_of_range_counts_as_the_nearest_and_is_told():
    case = Case(rows=60)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    wrong, clamped = domain.clone(), domain.clone()
    wrong[7], clamped[7] = 2**40, 2
    wrong[31], clamped[31] = -1, 0
    kernels.check_inputs(x.device)
    assert torch.equal(network(x, wrong, weights), network(x, clamped, weights))
    with pytest.raises(ValueError, match=r"domain\[31\]"):
        kernels.check_inputs(x.device)
    kernels.check_inputs(x.device)


@pytest.mark.parametrize("case", [Case(rows=0), Case(rows=9, masked=True)], ids=str)
def test_opcheck(case):
    ops = torch.ops.m3oe_fast_triton
    weights = [w.detach() for w in make_weights(case, torch.float32).flat()]
    x, domain, grad, mask = make_inputs(case, torch.float32)
    x = x.detach()
    lookup = (torch.zeros(case.rows, 2, dtype=torch.int32), torch.ones(5, 4), (3, 2))
    packed = ops.network_pack(weights, mask, case.inputs, False, "fp32")
    for columns, fields, ready in ((x, None, None), (x[:, 8:], lookup, packed)):
        arguments = forward_arguments(columns, domain, weights, mask, lookup=fields, packed=ready)
        torch.library.opcheck(ops.network_fwd.default, arguments)
        for input_grad, embedding_grad in ((True, "none"),) if fields is None else ((False, "dense"), (True, "sparse")):
            arguments = backward_arguments(grad, columns, domain, weights, mask, fields, input_grad, embedding_grad)
            torch.library.opcheck(ops.network_bwd.default, arguments)
    torch.library.opcheck(ops.network_pack.default, (weights, mask, case.inputs, False, "fp32"))
    label, pair_weight, row_weight = make_targets(case, torch.float32)
    targets = (label, row_weight, pair_weight.detach())
    arguments = (x, None, None, (), domain, *targets, weights, mask, False, True, "fp32", True, "none", False)
    torch.library.opcheck(ops.network_loss.default, arguments)


def test_compiles_without_a_graph_break_and_trains_the_same():
    case = Case(rows=40)
    weights = make_weights(case, torch.float32)
    x, domain, grad, _ = make_inputs(case, torch.float32)

    def logits(x, domain, weights):
        return network(x * 1.5, domain, weights)

    wanted = [x, *weights.flat()]
    expected = torch.autograd.grad(logits(x, domain, weights), wanted, grad)
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, domain, weights), wanted, grad)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_exports():
    case = Case(rows=20)
    weights = NetworkWeights.unflat([w.detach() for w in make_weights(case, torch.float32).flat()])
    x, domain, _, _ = make_inputs(case, torch.float32)

    class Served(torch.nn.Module):
        def forward(self, x, domain):
            return network(x, domain, weights)

    arguments = (x.detach(), domain)
    exported = torch.export.export(Served(), arguments)
    torch.testing.assert_close(exported.module()(*arguments), network(*arguments, weights))


@pytest.mark.launches_nothing
def test_the_raw_op_refuses_what_would_read_out_of_bounds():
    case = Case(rows=5)
    flat = make_weights(case, torch.float32).flat()
    x, domain, grad, _ = make_inputs(case, torch.float32)
    x = x.detach()
    op = torch.ops.m3oe_fast_triton.network_fwd
    table, ids = torch.zeros(5, 4), torch.zeros(5, 2, dtype=torch.int32)
    for bad in (flat[:-1], [*flat[:4], flat[4][1:], *flat[5:]], [flat[0].double(), *flat[1:]]):
        with pytest.raises((ValueError, TypeError)):
            op(*forward_arguments(x, domain, bad))
    with pytest.raises(ValueError, match="domain"):
        op(*forward_arguments(x, domain[:-1], flat))
    with pytest.raises(ValueError, match="grad"):
        torch.ops.m3oe_fast_triton.network_bwd(*backward_arguments(grad[1:], x, domain, flat))
    columns = x[:, 8:].contiguous()
    for bad in wrong_lookups(ids, table):
        with pytest.raises((ValueError, TypeError)):
            op(*forward_arguments(columns, domain, flat, lookup=bad))
    for precision in ("fp64", ""):
        with pytest.raises(ValueError, match="precision"):
            op(*forward_arguments(x, domain, flat, precision=precision))
    for bad in (torch.zeros(7), torch.zeros(7).double()):
        with pytest.raises(ValueError, match="packed"):
            op(*forward_arguments(x, domain, flat, packed=bad))


def test_weights_packed_for_another_precision_are_refused():
    case = Case(rows=5)
    weights = [w.detach() for w in make_weights(case, torch.float32).flat()]
    x, domain, _, _ = make_inputs(case, torch.float32)
    ops = torch.ops.m3oe_fast_triton
    for made, asked in (("fp32", "bf16x3"), ("bf16x3", "fp32"), ("bf16", "fp32"), ("bf16x3", "bf16")):
        packed = ops.network_pack(weights, None, case.inputs, False, made)
        with pytest.raises(ValueError, match="packed"):
            ops.network_fwd(*forward_arguments(x.detach(), domain, weights, packed=packed, precision=asked))


@pytest.mark.launches_nothing
def test_tensors_elsewhere_are_refused():
    case = Case(rows=5)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    label, pair_weight, row_weight = make_targets(case, torch.float32)
    elsewhere = {"pair_weight": pair_weight.to("meta"), "row_weight": row_weight.to("meta")}
    for name, tensor in elsewhere.items():
        with pytest.raises(ValueError, match=f"{name} must be on cpu"):
            network_loss(x, domain, label, weights, **{name: tensor})
    with pytest.raises(ValueError, match="must be on cpu"):
        network_loss(x, domain, label.to("meta"), weights)


@pytest.mark.launches_nothing
def test_a_width_beyond_a_block_is_named():
    case = Case(rows=2, inputs=3, hidden=2049)
    x, domain, _, _ = make_inputs(case, torch.float32)
    with pytest.raises(ValueError, match="widths up to 2048"):
        network(x, domain, make_weights(case, torch.float32))
