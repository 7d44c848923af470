"""M3oE on backend triton: what the compiled backend gives, from embeddings to a few steps of training."""

from __future__ import annotations

import copy

import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig
from m3oe_fast.errors import BackendError

CONFIG = M3oEConfig(
    vocab_sizes=[5, 90, 3],
    num_dense=2,
    num_domains=3,
    num_tasks=2,
    shared_experts=2,
    embed_dim=4,
    star_dim=24,
    hidden_dim=20,
    expert_dims=(12,),
    tower_dim=9,
)


def batch(rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(v, (rows,), generator=generator) for v in CONFIG.vocab_sizes], 1)
    dense = torch.randn(rows, 2, generator=generator)
    domain = torch.randint(3, (rows,), generator=generator)
    label = torch.randint(2, (rows, 2), generator=generator).float()
    label[::5, 0] = float("nan")
    return ids, dense, domain, label


def twins(**options) -> tuple[M3oE, M3oE]:
    torch.manual_seed(0)
    compiled = M3oE(CONFIG, backend="cpu")
    triton = M3oE(CONFIG, backend="triton", **options)
    triton.load_state_dict(compiled.state_dict())
    return compiled, triton


def test_forward_predict_and_loss_are_those_of_the_compiled_backend():
    compiled, triton = twins()
    ids, dense, domain, label = batch(60)
    assert triton.backend_name == "triton" and triton.isa_name is None and triton.compute_precision == "fp32"
    torch.testing.assert_close(triton(ids, dense, domain), compiled(ids, dense, domain))
    torch.testing.assert_close(triton.loss(ids, dense, domain, label), compiled.loss(ids, dense, domain, label))
    for model in (compiled.eval(), triton.eval()):
        model.predict(ids, dense, domain)
    torch.testing.assert_close(triton.predict(ids, dense, domain), compiled.predict(ids, dense, domain))


@pytest.mark.parametrize("fused", [False, True])
def test_predictions_follow_the_optimizer(fused):
    """Packed weights are kept between predictions; a step must drop them."""
    _, triton = twins()
    triton.eval()
    ids, dense, domain, label = batch(30)
    before = triton.predict(ids, dense, domain)
    optimizer = torch.optim.Adam(triton.parameters(), 1e-1, fused=fused)
    triton.loss(ids, dense, domain, label).backward()
    optimizer.step()
    after = triton.predict(ids, dense, domain)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, torch.sigmoid(triton(ids, dense, domain)).detach())


def test_training_goes_the_way_of_the_compiled_backend():
    models = twins()
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for step in range(3):
            optimizer.zero_grad()
            model.loss(*batch(40, step)).backward()
            optimizer.step()
    losses = [model.loss(*batch(40, 9)).item() for model in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "bf16x3", "tf32"])
def test_precisions(precision):
    compiled, triton = twins(precision=precision)
    ids, dense, domain, _ = batch(40)
    assert triton.compute_precision == precision
    torch.testing.assert_close(triton(ids, dense, domain), compiled(ids, dense, domain), rtol=0.05, atol=0.02)


def test_copies_and_files(tmp_path):
    _, triton = twins()
    ids, dense, domain, _ = batch(20)
    expected = triton.eval().predict(ids, dense, domain)
    assert torch.equal(copy.deepcopy(triton).predict(ids, dense, domain), expected)
    triton.save(tmp_path)
    assert torch.equal(M3oE.load(tmp_path, backend="triton").predict(ids, dense, domain), expected)


@pytest.mark.launches_nothing
def test_ids_on_a_cpu_are_checked_at_once_and_doubles_are_refused():
    _, triton = twins()
    ids, dense, domain, _ = batch(20)
    ids[3, 1] = 90
    with pytest.raises(ValueError, match=r"ids\[3, 1\] is 90"):
        triton.predict(ids, dense, domain)
    with pytest.raises(BackendError, match="float32 only"):
        triton.double().predict(*batch(5)[:3])
