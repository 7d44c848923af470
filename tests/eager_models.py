"""What every model that runs in eager PyTorch alone must keep, whichever it is: the tests of each call these."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from m3oe_fast.config import ModelConfig
from m3oe_fast.errors import BackendError
from m3oe_fast.model import RankingModel
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

Naive = Callable[[dict[str, Tensor], ModelConfig, Tensor, Tensor], Tensor]


def make(kind: type[RankingModel], config: ModelConfig) -> RankingModel:
    """A model whose parameters are all off their first values, gains and offsets too."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def batch(config: ModelConfig, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, dense, domain and label, a fifth of the labels missing."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(rows, len(config.vocab_sizes), dtype=torch.int64)
    for field, vocab in enumerate(config.vocab_sizes):
        ids[:, field] = torch.randint(vocab, (rows,), generator=g)
    dense = torch.randn(rows, config.num_dense, generator=g)
    domain = torch.randint(config.num_domains, (rows,), generator=g)
    label = torch.randint(2, (rows, config.num_tasks), generator=g).float()
    label[torch.rand(label.shape, generator=g) < 0.2] = float("nan")
    return ids, dense, domain, label


def check_against_the_paper(model: RankingModel, naive: Naive, rows: int = 23) -> None:
    """Logits and every gradient, of x too, agree with the row by row computation: exactly in float64, and in float32 by
    the ratio rule."""
    config = model.config
    domain = batch(config, rows)[2]
    x = torch.randn(rows, config.input_dim, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(rows, config.num_tasks, generator=torch.Generator().manual_seed(2))

    def results(forward: Naive, dtype: torch.dtype) -> dict[str, Tensor]:
        p = {name: v.detach().to(dtype).requires_grad_() for name, v in model.named_parameters()}
        inputs = x.to(dtype).requires_grad_()
        logits = forward(p, config, inputs, domain)
        (logits * weight.to(dtype)).sum().backward()
        gradients = {name: v.grad for name, v in {**p, "x": inputs}.items() if v.grad is not None}
        return {"logits": logits.detach(), **gradients}

    oracle, exact = results(naive, torch.float64), results(model.reference, torch.float64)
    single, eager = results(model.reference, torch.float32), results(naive, torch.float32)
    # The tables are no part of this; an attention over one expert has nothing to learn.
    assert exact.keys() == oracle.keys() and len(oracle) > 10
    for name, expected in oracle.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(exact[name], expected, rtol=0, atol=1e-13 * rows * max(scale, 1.0), msg=name)
        assert_close_to_oracle(single[name], eager[name], expected, FORWARD if name == "logits" else GRADIENT, name)


def check_gradients_numerically(model: RankingModel, rows: int = 4, frozen: Sequence[str] = ()) -> None:
    """gradcheck of x and of every parameter but the frozen ones."""
    config = model.config
    values = {name: v.detach().double() for name, v in model.named_parameters() if name != "embedding"}
    values["x"] = torch.randn(rows, config.input_dim, dtype=torch.float64)
    domain = torch.arange(rows) % config.num_domains
    names = [name for name in values if name not in frozen]

    def logits(*checked: Tensor) -> Tensor:
        p = {**values, **dict(zip(names, checked, strict=True))}
        return model.reference(p, config, p["x"], domain)

    assert torch.autograd.gradcheck(logits, [values[name].clone().requires_grad_() for name in names])


def check_no_parameter_is_dead(model: RankingModel, rows: int = 200) -> None:
    """One step moves every slice of every parameter along its first axis: domains, tasks, experts, layers, inputs."""
    ids, dense, domain, label = batch(model.config, rows)
    model.loss(ids, dense, domain, label).backward()
    for name, parameter in model.named_parameters():
        if name != "embedding":
            dead = (parameter.grad.reshape(parameter.shape[0], -1) == 0).all(1)
            # Of the last layer's units, a few never pass their relu.
            assert dead.sum() <= (0 if parameter.ndim > 1 else parameter.shape[0] // 4), f"{name}: {dead.nonzero()}"


def check_empty_and_absent(model: RankingModel) -> None:
    """An empty batch has no logits, no loss and zero gradients; rows do not depend on who else is in the batch."""
    config = model.config
    ids, dense, domain, label = batch(config, 40)
    assert model(ids[:0], dense[:0], domain[:0]).shape == (0, config.num_tasks)
    loss = model.loss(ids[:0], dense[:0], domain[:0], label[:0])
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())
    model.zero_grad()

    everyone = copy.deepcopy(model).double()
    logits = everyone(ids, dense, domain)
    for d in range(config.num_domains):
        own = domain == d
        torch.testing.assert_close(everyone(ids[own], dense[own], domain[own]), logits[own], rtol=1e-12, atol=1e-12)
    present = domain != 0
    model.loss(ids[present], dense[present], domain[present], label[present]).backward()
    assert not model.domain_embedding.grad[0].any() and all(
        torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None
    )


def check_sizes(kind: type[RankingModel], config: ModelConfig) -> None:
    """No NaN and no infinity, forward or backward, for batches of any size."""
    model = make(kind, config)
    for rows in (1, 2, 37):
        ids, dense, domain, label = batch(config, rows)
        logits = model(ids, dense * 0 if rows == 2 else dense, domain)
        assert logits.shape == (rows, config.num_tasks) and torch.isfinite(logits).all()
        model.zero_grad()
        model.loss(ids, dense, domain, label).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def check_multiply_adds(model: RankingModel, weighted_sum: int) -> None:
    """`multiply_adds` is what torch counts per row, but for the weighted sum of experts, which it cannot see; and all
    of it goes through `matmul`."""
    config = model.config
    p = dict(model.named_parameters())
    seen = 0

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        nonlocal seen
        seen += a.numel() * b.shape[-1]
        return torch.matmul(a, b)

    def counted(rows: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.reference(
                p, config, torch.randn(rows, config.input_dim), torch.zeros(rows, dtype=torch.int64), matmul
            )
        return counter.get_total_flops()

    # The difference is free of what depends on parameters only. 512 and 1,024 rows of one domain leave no padding.
    per_row = (counted(1024) - counted(512)) / 512 / 2
    assert per_row == model.multiply_adds() - weighted_sum
    assert seen == (1024 + 512) * per_row


def check_determinism(model: RankingModel) -> None:
    """The same bits every time."""
    inputs = batch(model.config, 300)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        loss = model.loss(*inputs)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def check_it_tells_domains_apart(kind: type[RankingModel], config: ModelConfig) -> None:
    """It learns a rule that turns over from one domain to the other, which a model blind to the domain cannot."""
    torch.manual_seed(0)
    model = kind(config)
    dense, domain = torch.randn(512, config.num_dense), torch.arange(512) % 2
    ids = torch.zeros(512, 0, dtype=torch.int64)
    label = ((dense[:, :1] > 0) == (domain == 0)[:, None]).float().expand(-1, config.num_tasks).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(ids, dense, domain, label).backward()
        optimizer.step()
    right = (model.predict(ids, dense, domain) > 0.5) == label.bool()
    assert right.float().mean() > 0.95


def check_files_and_graphs(model: RankingModel, folder: object) -> None:
    """A saved model predicts the same bits, a traced one as well as eager; kernels are refused by name."""
    ids, dense, domain, _ = batch(model.config, 40)
    expected = model.predict(ids, dense, domain)
    model.save(folder)
    assert torch.equal(type(model).load(folder).predict(ids, dense, domain), expected)
    with torch.no_grad():
        eager = model(ids, dense, domain)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, dense, domain)
    torch.testing.assert_close(compiled, eager)
    assert torch.equal(torch.sigmoid(eager), expected)
    with pytest.raises(BackendError, match=f"cannot run {model.config.name}"):
        type(model)(model.config, backend="cpu")
