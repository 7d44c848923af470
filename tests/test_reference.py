"""The oracle against the paper's formulas written out row by row, and the folded form against the oracle."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig, folded, reference

SMALL = M3oEConfig([], 5, 3, 2, shared_experts=2, star_dim=6, hidden_dim=7, expert_dims=(4,), tower_dim=3)
VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, star_activation="linear"),
    dataclasses.replace(SMALL, gate_detach=False, fusion="per_index"),
    dataclasses.replace(SMALL, expert_dims=(5, 3, 4), num_tasks=4),
    dataclasses.replace(SMALL, num_domains=1, num_tasks=1),
    dataclasses.replace(SMALL, shared_experts=0, num_domains=6),
    dataclasses.replace(SMALL, fusion="per_index", num_domains=2),
    dataclasses.replace(SMALL, fusion="per_pair", num_tasks=4),
    dataclasses.replace(SMALL, fusion="per_pair", num_domains=2),
    dataclasses.replace(SMALL, fusion="per_pair", num_domains=1),
    dataclasses.replace(SMALL, fusion="per_pair", num_tasks=1),
    dataclasses.replace(SMALL, fusion="per_pair", num_domains=1, num_tasks=1),
]


def make(config: M3oEConfig, rows: int = 40):
    torch.manual_seed(0)
    model = M3oE(config, backend="reference").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(rows, config.input_dim, dtype=torch.float64)
    return dict(model.named_parameters()), x, torch.randint(config.num_domains, (rows,))


def norm(values, gain, offset):
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + 1e-5) * g + o for v, g, o in zip(values, gain, offset, strict=True)]


def dense(x, weight, bias):
    return [sum(a * w[j] for a, w in zip(x, weight, strict=True)) + b for j, b in enumerate(bias)]


def relu(values):
    return [max(v, 0.0) for v in values]


def one_row(p, c: M3oEConfig, x, d: int, t: int) -> float:
    """The logit of one row and task in plain Python floats, straight from the paper's formulas."""
    q = {k: v.tolist() for k, v in p.items()}
    own = [
        [a * b for a, b in zip(u, v, strict=True)]
        for u, v in zip(q["star_weight"][d], q["star_shared_weight"], strict=True)
    ]
    star = dense(x, own, [a + b for a, b in zip(q["star_bias"][d], q["star_shared_bias"], strict=True)])
    term = dense(star, q["star_out_weight"], q["star_out_bias"])
    if c.star_activation == "norm_relu":
        term = relu(norm(term, q["star_gain"], q["star_offset"]))
    skip = relu(norm(dense(x, q["skip_weight"], q["skip_bias"]), q["skip_gain"], q["skip_offset"]))
    r = [a + b for a, b in zip(term, skip, strict=True)]
    z = []
    for e in range(c.num_experts):
        out = r
        for i in range(len(c.expert_dims)):
            layer = [q[f"expert_{part}.{i}"][e] for part in ("weight", "bias", "gain", "offset")]
            out = relu(norm(dense(out, layer[0], layer[1]), layer[2], layer[3]))
        z.append(out)

    def weight(name, i):
        logit = {"scalar": lambda: q[name], "per_index": lambda: q[name][i], "per_pair": lambda: q[name][d][t]}
        return 1 / (1 + math.exp(-logit[c.fusion]()))

    coefficient = [0.0] * c.num_experts
    if c.shared_experts:
        score = dense(r, q["gate_weight"][d][t], q["gate_bias"][d][t])
        top = sum(math.exp(s) for s in score)
        coefficient[: c.shared_experts] = [math.exp(s) / top for s in score]
    for side, count, own_index, first in (
        ("domain", c.num_domains, d, c.shared_experts),
        ("task", c.num_tasks, t, c.shared_experts + c.num_domains),
    ):
        alpha, beta = weight(f"alpha_{side}", own_index), weight(f"beta_{side}", own_index)
        for i in range(count):
            coefficient[first + i] = alpha * (beta if i == own_index else (1 - beta) / (count - 1))
    u = [sum(k * v[j] for k, v in zip(coefficient, z, strict=True)) for j in range(c.expert_dim)]
    h = dense(u, q["tower_weight"][d][t], q["tower_bias"][d][t])
    h = relu(norm(h, q["tower_gain"][d][t], q["tower_offset"][d][t]))
    return sum(a * b for a, b in zip(h, q["head_weight"][d][t], strict=True)) + q["head_bias"][d][t]


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_oracle_is_the_paper_row_by_row(config):
    p, x, domain = make(config, rows=8)
    logits = reference.forward(p, config, x, domain)
    for b in range(8):
        for t in range(config.num_tasks):
            assert logits[b, t].item() == pytest.approx(
                one_row(p, config, x[b].tolist(), domain[b].item(), t), abs=1e-9
            )


@pytest.mark.parametrize("config", VARIANTS, ids=range(len(VARIANTS)))
def test_folding_and_routing_change_nothing(config):
    p, x, domain = make(config)
    x.requires_grad_()
    grad = torch.randn(40, config.num_tasks, dtype=torch.float64)
    wanted = [x, *(v for k, v in p.items() if k != "embedding")]
    switches = {"star_linear": config.star_activation == "linear", "gate_detach": config.gate_detach}
    results = []
    for logits in (
        reference.forward(p, config, x, domain),
        folded.routed(x, domain, folded.fold(p, config), **switches),
    ):
        results.append([logits, *torch.autograd.grad(logits, wanted, grad, allow_unused=True)])
    for printed, fast in zip(*results, strict=True):
        if printed is None:
            assert fast is None or not fast.any()
        else:
            torch.testing.assert_close(fast, printed, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["alpha_domain", "alpha_task", "beta_domain", "beta_task"])
@pytest.mark.parametrize("fusion", ["per_index", "per_pair"])
def test_equal_fusion_weights_are_the_scalar_ones_to_the_bit(fusion, name):
    p, x, domain = make(SMALL)
    many = dict(p)
    for other in ("alpha_domain", "alpha_task", "beta_domain", "beta_task"):
        count = 3 if other.endswith("domain") else 2
        many[other] = p[other].detach().expand((3, 2) if fusion == "per_pair" else (count,)).clone().requires_grad_()
    config = dataclasses.replace(SMALL, fusion=fusion)
    assert torch.equal(folded.coefficient_table(many, config), folded.coefficient_table(p, SMALL))
    logits = reference.forward(many, config, x, domain)
    assert torch.equal(logits, reference.forward(p, SMALL, x, domain))
    scalar = reference.forward(p, SMALL, x, domain).sum()
    grads = torch.autograd.grad(logits.sum(), many[name])[0], torch.autograd.grad(scalar, p[name])[0]
    torch.testing.assert_close(grads[0].sum(), grads[1], rtol=1e-12, atol=1e-12)


def test_fusion_weights_of_a_pair_reach_no_other_pair():
    config = dataclasses.replace(SMALL, fusion="per_pair")
    p, x, domain = make(config)
    before = reference.forward(p, config, x, domain)
    for name in ("alpha_domain", "alpha_task", "beta_domain", "beta_task"):
        changed = p[name].detach().clone()
        changed[2, 1] += 1
        moved = reference.forward({**p, name: changed}, config, x, domain) != before
        assert moved[domain == 2, 1].all() and moved.sum() == (domain == 2).sum()


def test_a_detached_gate_sends_no_gradient_back():
    p, x, domain = make(SMALL)
    x.requires_grad_()
    grads = []
    for detach in (True, False):
        logits = reference.forward(p, dataclasses.replace(SMALL, gate_detach=detach), x, domain)
        grads.append(torch.autograd.grad(logits.sum(), x)[0])
    assert not torch.allclose(*grads)


def test_the_matmul_hook_sees_every_product():
    p, x, domain = make(SMALL)
    shapes = []

    def hook(a, b):
        shapes.append(tuple(b.shape))
        return a @ b

    reference.forward(p, SMALL, x, domain, hook)
    d, t, e = 3, 2, SMALL.num_experts
    assert len(shapes) == 1 + 2 * d + e + 3 * d * t


def loop_loss(logits, domain, label, num_domains):
    rows = []
    for d in range(num_domains):
        for t in range(logits.shape[1]):
            values = [
                -(y * math.log(q) + (1 - y) * math.log(1 - q))
                for q, y in zip(
                    torch.sigmoid(logits[domain == d, t]).tolist(), label[domain == d, t].tolist(), strict=True
                )
                if not math.isnan(y)
            ]
            rows.append(sum(values) / len(values) if values else 0.0)
    return rows


def test_pair_losses_average_over_labelled_rows_only():
    torch.manual_seed(0)
    logits = torch.randn(60, 2, dtype=torch.float64)
    domain = torch.randint(3, (60,))
    label = torch.randint(2, (60, 2)).double()
    label[torch.rand(60, 2) < 0.4] = float("nan")
    got = reference.pair_losses(logits, domain, label, 3)
    torch.testing.assert_close(got.flatten().tolist(), loop_loss(logits, domain, label, 3))


def test_the_loss_of_a_large_batch_keeps_its_digits():
    """Equal losses, as at the start of training: a float32 chain of additions is off by 5e-4 here."""
    rows = 100_000
    logits, label = torch.full((rows, 1), 0.3), torch.ones(rows, 1)
    loss = reference.pair_losses(logits, torch.zeros(rows, dtype=torch.int64), label, 1).item()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.3)), rel=2e-7)


def test_an_infinite_weight_of_an_unlabelled_row_does_not_matter():
    label = torch.tensor([[1.0], [float("nan")]])
    weight = torch.tensor([1.0, float("inf")])
    loss = reference.pair_losses(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), label, 1, weight)
    assert loss.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_of_an_unlabelled_row_leaves_the_gradients_finite(bad):
    logits = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([[1.0, 0.0], [float("nan"), float("nan")], [0.0, float("nan")]], dtype=torch.float64)
    domain = torch.zeros(3, dtype=torch.int64)
    weight = torch.tensor([1.0, bad, 0.5], dtype=torch.float64, requires_grad=True)
    pairs = reference.pair_losses(logits, domain, label, 1, weight)
    grads = torch.autograd.grad(pairs.sum(), (logits, weight))
    without = reference.pair_losses(logits[[0, 2]], domain[[0, 2]], label[[0, 2]], 1, weight[[0, 2]])
    torch.testing.assert_close(pairs, without)
    assert torch.equal(grads[0][1], torch.zeros(2, dtype=torch.float64)) and grads[1][1] == 0
    torch.testing.assert_close(grads, torch.autograd.grad(without.sum(), (logits, weight)))


def test_a_weight_that_is_not_finite_of_a_labelled_row_shows():
    label = torch.tensor([[1.0, float("nan")]])
    pairs = reference.pair_losses(
        torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), label, 1, torch.tensor([float("nan")])
    )
    assert pairs[0, 0].isnan() and pairs[0, 1] == 0


@pytest.mark.parametrize("rows", [0, 12])
def test_absent_pairs_add_nothing_and_never_nan(rows):
    logits = torch.randn(rows, 2, dtype=torch.float64, requires_grad=True)
    label = torch.full((rows, 2), float("nan"), dtype=torch.float64)
    label[:, 1] = 1.0
    pairs = reference.pair_losses(logits, torch.ones(rows, dtype=torch.int64), label, 3)
    assert torch.isfinite(pairs).all() and not pairs[:, 0].any() and not pairs[0].any()
    pairs.sum().backward()
    assert torch.isfinite(logits.grad).all() and not logits.grad[:, 0].any()


def test_extreme_logits_keep_the_loss_finite():
    logits = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    loss = reference.pair_losses(logits, torch.zeros(2, dtype=torch.int64), torch.tensor([[0.0], [1.0]]), 1).sum()
    assert loss.item() == pytest.approx(1e4)


def test_row_weights_weigh_rows_but_not_the_count():
    logits = torch.tensor([[0.3], [-1.0]])
    domain, label = torch.zeros(2, dtype=torch.int64), torch.tensor([[1.0], [0.0]])
    single = [reference.pair_losses(logits[i : i + 1], domain[:1], label[i : i + 1], 1).item() for i in range(2)]
    weighted = reference.pair_losses(logits, domain, label, 1, torch.tensor([2.0, 0.5])).item()
    assert weighted == pytest.approx((2 * single[0] + 0.5 * single[1]) / 2)
