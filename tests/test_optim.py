"""Optimizers of embedding tables: dense formulas in float64, torch's own optimizers, and hostile gradients."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

import m3oe_fast.optim
from m3oe_fast.errors import ConfigError
from m3oe_fast.optim import LazyAdam, RowAdagrad, clip_grad_norm
from tests.tolerance import FORWARD, assert_close_to_oracle

KINDS = [RowAdagrad, LazyAdam]
V = 11
# The ids of one batch per step.
BATCHES = {
    "distinct": [[1, 4, 7], [0, 4, 10], [2, 1, 9]],
    "repeated": [[3, 3, 3, 0], [5, 0, 5], [3, 0, 3]],
    "one row": [[6], [6], [2]],
    "all rows": [list(range(V)), list(reversed(range(V))), list(range(V))],
    "none": [[], [4, 2], []],
}


def table(width=5, dtype=torch.float64, rows=V, seed=0):
    values = torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


def backward(parameter, ids, seed=0, sparse=True):
    """Add to the gradient of a loss that is linear in the table: the gradient is the same at any weight."""
    ids = torch.tensor(ids, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(len(ids), parameter.shape[1], dtype=torch.float64, generator=generator)
    (F.embedding(ids, parameter, sparse=sparse) * coefficients.to(parameter.dtype)).sum().backward()


def train(optimizer, parameter, batches, sparse=True):
    for number, ids in enumerate(batches):
        optimizer.zero_grad()
        backward(parameter, ids, number, sparse)
        assert parameter.grad.is_sparse is sparse
        optimizer.step()


def set_sparse(parameter, rows, values, is_coalesced=None):
    """Give the table a gradient with exactly these rows and this flag, whatever autograd would make of them."""
    parameter.grad = torch.sparse_coo_tensor(
        torch.tensor([rows]), values, parameter.shape, is_coalesced=is_coalesced, check_invariants=False
    )


def row_adagrad_formula(weight, grads, touched, lr, eps=1e-8, initial_accumulator=0.0, weight_decay=0.0):
    """On the whole table; rows that are not touched keep everything."""
    accumulator = torch.full_like(weight[:, :1], initial_accumulator)
    for grad, rows in zip(grads, touched, strict=True):
        grad = grad + weight_decay * weight
        after = accumulator + (grad**2).sum(1, keepdim=True) / weight.shape[1]
        moved = weight - lr * grad / (torch.sqrt(after) + eps)
        accumulator, weight = torch.where(rows, after, accumulator), torch.where(rows, moved, weight)
    return weight, accumulator.squeeze(1)


def lazy_adam_formula(weight, grads, touched, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """On the whole table; rows that are not touched keep everything."""
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, (grad, rows) in enumerate(zip(grads, touched, strict=True), start=1):
        grad = grad + weight_decay * weight
        next_m = betas[0] * m + (1 - betas[0]) * grad
        next_v = betas[1] * v + (1 - betas[1]) * grad**2
        corrected = next_m / (1 - betas[0] ** step), next_v / (1 - betas[1] ** step)
        moved = weight - lr * corrected[0] / (torch.sqrt(corrected[1]) + eps)
        m, v, weight = torch.where(rows, next_m, m), torch.where(rows, next_v, v), torch.where(rows, moved, weight)
    return weight, m, v


def formula(kind, start, batches, dtype, touch_all=False, **options):
    """What the formula leaves of ``start`` [V, N] computed in ``dtype``: weight, then the state per row."""
    grads, touched = [], []
    for number, ids in enumerate(batches):
        leaf = start.detach().clone().requires_grad_()
        backward(leaf, ids, number, sparse=False)
        grads.append(leaf.grad.to(dtype))
        rows = torch.zeros(len(start), 1, dtype=torch.bool)
        rows[slice(None) if touch_all else ids] = True
        touched.append(rows)
    computed = row_adagrad_formula if kind is RowAdagrad else lazy_adam_formula
    return computed(start.detach().to(dtype), grads, touched, **options)


def state_of(optimizer, parameter):
    names = ["accumulator"] if isinstance(optimizer, RowAdagrad) else ["exp_avg", "exp_avg_sq"]
    return [optimizer.state[parameter][name] for name in names]


# Arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 17])
@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_follow_the_formula(kind, batches, width, dtype, weight_decay, sparse):
    options = {"lr": 0.1, "weight_decay": weight_decay}
    parameter = table(width, dtype)
    start = parameter.detach().clone()
    optimizer = kind([parameter], **options)
    train(optimizer, parameter, batches, sparse)
    eager, oracle = (
        formula(kind, start, batches, computed, touch_all=not sparse, **options) for computed in (dtype, torch.float64)
    )
    actual = [parameter.detach(), *state_of(optimizer, parameter)]
    for name, *values in zip(("weight", "first state", "second state"), actual, eager, oracle, strict=False):
        assert_close_to_oracle(*values, FORWARD, name)


def test_other_options_follow_the_formula():
    for kind, options in (
        (RowAdagrad, {"lr": 0.2, "eps": 0.5, "initial_accumulator": 3.0}),
        (LazyAdam, {"lr": 0.2, "eps": 0.5, "betas": (0.0, 0.4)}),
    ):
        parameter = table()
        oracle = formula(kind, parameter, BATCHES["repeated"], torch.float64, **options)
        train(kind([parameter], **options), parameter, BATCHES["repeated"])
        assert_close_to_oracle(parameter.detach(), oracle[0], oracle[0], FORWARD)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_gradient_of_all_rows_trains_as_the_dense_one(kind, weight_decay):
    sparse, dense = table(), table()
    train(kind([sparse], weight_decay=weight_decay), sparse, BATCHES["all rows"])
    train(kind([dense], weight_decay=weight_decay), dense, BATCHES["all rows"], sparse=False)
    assert torch.equal(sparse, dense)


def test_row_adagrad_without_decay_trains_alike_on_dense_and_sparse_gradients():
    sparse, dense = table(), table()
    train(RowAdagrad([sparse]), sparse, BATCHES["repeated"])
    train(RowAdagrad([dense]), dense, BATCHES["repeated"], sparse=False)
    assert torch.equal(sparse, dense)


def test_one_table_may_have_sparse_and_dense_gradients_in_turn():
    for kind in KINDS:
        turns, dense = table(), table()
        optimizer, other = kind([turns]), kind([dense])
        for number, sparse in enumerate([True, False, True]):
            for each, its_optimizer, is_sparse in ((turns, optimizer, sparse), (dense, other, False)):
                its_optimizer.zero_grad()
                backward(each, range(V), number, is_sparse)
                its_optimizer.step()
        assert torch.equal(turns, dense)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_touched_keep_their_bits(kind):
    parameter = table()
    optimizer = kind([parameter], weight_decay=0.5)
    train(optimizer, parameter, [range(V)])
    before = [tensor.detach().clone() for tensor in (parameter, *state_of(optimizer, parameter))]
    optimizer.zero_grad()
    backward(parameter, [4, 4, 9])
    optimizer.step()
    untouched = [row for row in range(V) if row not in (4, 9)]
    for old, new in zip(before, (parameter, *state_of(optimizer, parameter)), strict=True):
        assert torch.equal(old[untouched], new[untouched])
        assert not torch.equal(old[[4, 9]], new[[4, 9]])


# Against torch's optimizers -----------------------------------------------------------------------


def test_lazy_adam_is_sparse_adam_with_eps_behind_the_bias_correction():
    eps, betas = 1e-3, (0.9, 0.99)
    ours, theirs = table(), table()
    optimizer, peer = LazyAdam([ours], betas=betas, eps=eps), torch.optim.SparseAdam([theirs], betas=betas)
    for number, ids in enumerate(BATCHES["repeated"] * 3):
        peer.param_groups[0]["eps"] = eps * math.sqrt(1 - betas[1] ** (number + 1))
        for each, its_optimizer in ((ours, optimizer), (theirs, peer)):
            its_optimizer.zero_grad()
            backward(each, ids, number)
            its_optimizer.step()
    assert_close_to_oracle(ours.detach(), theirs.detach(), theirs.detach(), FORWARD)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lazy_adam_is_adam_on_the_touched_rows(weight_decay):
    rows = [1, 5, 6]
    parameter = table()
    part = parameter.detach()[rows].clone().requires_grad_()
    train(LazyAdam([parameter], weight_decay=weight_decay), parameter, [rows] * 6)
    train(torch.optim.Adam([part], weight_decay=weight_decay), part, [range(3)] * 6, sparse=False)
    assert_close_to_oracle(parameter.detach()[rows], part.detach(), part.detach(), FORWARD)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_lazy_adam_is_adam_on_dense_gradients_of_any_shape(shape):
    ours = torch.linspace(1, 2, math.prod(shape), dtype=torch.float64).reshape(shape).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    optimizer, peer = LazyAdam([ours], weight_decay=0.1), torch.optim.Adam([theirs], weight_decay=0.1)
    for _ in range(4):
        for each, its_optimizer in ((ours, optimizer), (theirs, peer)):
            each.grad = (each.detach() - 1.3).cos()
            its_optimizer.step()
    assert_close_to_oracle(ours.detach(), theirs.detach(), theirs.detach(), FORWARD)


@pytest.mark.parametrize("grad", [torch.ones(1, 1).expand(4, 6), torch.arange(24.0).reshape(6, 4).t()])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_gradients_and_tables_of_any_strides(kind, grad):
    """The fused kernel would read past the single number of a stride-0 gradient."""
    plain, transposed = torch.ones(4, 6).requires_grad_(), torch.ones(6, 4).t().requires_grad_()
    strided_grad = torch.ones(4, 6).requires_grad_()
    for each, its_grad in ((plain, grad.contiguous()), (transposed, grad), (strided_grad, grad)):
        each.grad = its_grad
        optimizer = kind([each])
        optimizer.step()
        optimizer.step()
    torch.testing.assert_close(transposed, plain)
    torch.testing.assert_close(strided_grad, plain)


# What gradients look like -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_over_two_backward_passes(kind):
    """Autograd merges the rows of both passes as if they were sorted: they stay as many, in no order."""
    first, second = [7, 2, 7], [2, 9, 0]
    parameter, dense = table(), table()
    for each, sparse in ((parameter, True), (dense, False)):
        backward(each, first, 0, sparse)
        backward(each, second, 1, sparse)
    assert not parameter.grad.is_coalesced()
    assert sorted(parameter.grad._indices()[0].tolist()) == sorted(first + second)
    grad = dense.grad
    touched = sorted({*first, *second})
    set_sparse(dense, touched, grad[touched])
    for each in (parameter, dense):
        kind([each]).step()
    assert_close_to_oracle(parameter.detach(), dense.detach(), dense.detach(), FORWARD)


@pytest.mark.parametrize("rows", [[2, 5, 8], [8, 2, 5], [5, 2, 5], [2, 2, 2]])
@pytest.mark.parametrize("is_coalesced", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_coalesced_flag_of_a_gradient_is_not_believed(kind, is_coalesced, rows):
    """Flagged but not sorted, or even with a row twice, and sorted but not flagged: all have one meaning."""
    values = torch.arange(1.0, 16.0, dtype=torch.float64).reshape(3, 5)
    parameter, expected = table(), table()
    set_sparse(parameter, rows, values, is_coalesced)
    sums = torch.zeros(V, 5, dtype=torch.float64).index_add(0, torch.tensor(rows), values)
    set_sparse(expected, sorted(set(rows)), sums[sorted(set(rows))])
    for each in (parameter, expected):
        kind([each]).step()
    assert torch.equal(parameter, expected)


def test_two_flagged_gradients_in_no_order_add_up_to_a_flagged_one_with_rows_twice():
    """The torch behaviour that the test above guards against."""
    indices = (torch.tensor([[4, 1]]), torch.tensor([[1, 7, 4]]))
    one, other = (
        torch.sparse_coo_tensor(rows, torch.ones(rows.shape[1], 2), (V, 2), is_coalesced=True, check_invariants=False)
        for rows in indices
    )
    total = one + other
    assert total.is_coalesced()
    assert len(total.indices()[0]) > len(total.indices()[0].unique())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sparse_gradient_with_stride_0_values(kind):
    parameter, expected = table(), table()
    set_sparse(parameter, [1, 3], torch.ones(1, 1, dtype=torch.float64).expand(2, 5))
    set_sparse(expected, [1, 3], torch.ones(2, 5, dtype=torch.float64))
    for each in (parameter, expected):
        kind([each], weight_decay=0.1).step()
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_left_as_it_was(kind):
    for sparse in (True, False):
        parameter = table()
        backward(parameter, [3, 1, 3], sparse=sparse)
        grad = parameter.grad
        before = grad.clone()
        kind([parameter], weight_decay=0.5).step()
        assert parameter.grad is grad
        assert torch.equal(grad.to_dense(), before.to_dense())


@pytest.mark.parametrize("kind", KINDS)
def test_none_is_skipped_and_no_rows_move_nothing(kind):
    skipped, empty = table(), table()
    start = table()
    optimizer = kind([skipped, empty], weight_decay=0.5)
    backward(empty, [])
    assert empty.grad._nnz() == 0
    optimizer.step()
    assert torch.equal(skipped, start)
    assert torch.equal(empty, start)
    assert skipped not in optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_gradient_of_a_new_row_is_no_nan(kind):
    parameter = table()
    set_sparse(parameter, [2], torch.zeros(1, 5, dtype=torch.float64))
    kind([parameter]).step()
    assert torch.equal(parameter, table())


@pytest.mark.parametrize("kind", KINDS)
def test_nan_stays_in_its_row(kind):
    parameter = table()
    set_sparse(parameter, [2, 6], torch.tensor([[math.nan] * 5, [1.0] * 5], dtype=torch.float64))
    kind([parameter]).step()
    assert parameter.isnan().any(dim=1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.eye(4).to_sparse(), r"2 sparse and 0 dense"),
        (torch.ones(4).to_sparse(), r"1 sparse and 0 dense"),
        (torch.ones(4, 2, 2).to_sparse(1), r"1 sparse and 2 dense"),
    ],
)
def test_other_sparse_gradients_are_refused_before_anything_moves(grad, message):
    kinds = KINDS if grad.ndim == 2 else [LazyAdam]
    for kind in kinds:
        good, bad = table(), torch.ones(grad.shape).requires_grad_()
        optimizer = kind([{"params": [good]}, {"params": [table(), bad]}])
        backward(good, [1])
        bad.grad = grad
        with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[1\].*" + message + r".*\.to_dense\(\)"):
            optimizer.step()
        assert torch.equal(good, table())
        assert not optimizer.state


# Gradient clipping --------------------------------------------------------------------------------


def mixed(sparse, ids=(3, 1, 3, 10)):
    """A table with a sparse or dense gradient, one with a dense one, one without."""
    parameters = [table(seed=1), table(width=3, rows=4, seed=2), table()]
    backward(parameters[0], ids, sparse=sparse)
    backward(parameters[1], [0, 2], sparse=False)
    return parameters


def test_torch_cannot_clip_sparse_gradients():
    """The day this fails, `clip_grad_norm` can go."""
    with pytest.raises(NotImplementedError, match="linalg_vector_norm"):
        torch.nn.utils.clip_grad_norm_(mixed(sparse=True), 1.0)


@pytest.mark.parametrize("max_norm", [0.0, 0.7, 1e6])
@pytest.mark.parametrize("ids", [(3, 1, 3, 10), (1, 3, 10), (10, 1), ()])
def test_clipping_equals_that_of_the_dense_gradients(ids, max_norm):
    sparse, dense = mixed(True, ids), mixed(False, ids)
    norm, expected = clip_grad_norm(sparse, max_norm), torch.nn.utils.clip_grad_norm_(dense, max_norm)
    torch.testing.assert_close(norm, expected)
    for ours, theirs in zip(sparse[:2], dense[:2], strict=True):
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad)
    assert sparse[0].grad.is_sparse
    assert sparse[2].grad is None


def test_clipping_takes_a_generator_one_tensor_nothing_and_stride_0():
    parameter = table()
    set_sparse(parameter, [1, 3], torch.ones(1, 1, dtype=torch.float64).expand(2, 5))
    assert clip_grad_norm(parameter, 1.0).item() == pytest.approx(math.sqrt(10))
    assert clip_grad_norm((each for each in [parameter]), 1.0).item() == pytest.approx(1)
    assert clip_grad_norm([], 1.0).item() == 0
    assert clip_grad_norm([table()], 1.0).item() == 0


def test_a_clipped_gradient_can_be_stepped_with():
    for kind in KINDS:
        sparse, dense = mixed(True), mixed(False)
        for parameters in (sparse, dense):
            clip_grad_norm(parameters, 0.5)
            kind(parameters).step()
        torch.testing.assert_close(sparse[0], dense[0])


# As an optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_with_the_same_bits(kind, sparse, dtype):
    batches = BATCHES["repeated"] + BATCHES["distinct"]
    whole, first = table(dtype=dtype), table(dtype=dtype)
    whole_optimizer, first_optimizer = (kind([each], lr=0.05, weight_decay=0.1) for each in (whole, first))
    train(whole_optimizer, whole, batches, sparse)
    train(first_optimizer, first, batches[:2], sparse)
    file = io.BytesIO()
    torch.save({"weight": first.detach(), "optimizer": first_optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = saved["weight"].requires_grad_()
    optimizer = kind([resumed], lr=99.0)
    optimizer.load_state_dict(saved["optimizer"])
    for number, ids in enumerate(batches[2:], start=2):
        optimizer.zero_grad()
        backward(resumed, ids, number, sparse)
        optimizer.step()
    assert torch.equal(resumed, whole)
    for ours, expected in zip(state_of(optimizer, resumed), state_of(whole_optimizer, whole), strict=True):
        assert torch.equal(ours, expected)
        assert ours.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_copied_and_pickled_optimizers_go_on(kind):
    parameter = table()
    optimizer = kind([parameter])
    train(optimizer, parameter, BATCHES["repeated"])
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    train(optimizer, parameter, BATCHES["distinct"])
    for other in others:
        (its_parameter,) = other.param_groups[0]["params"]
        train(other, its_parameter, BATCHES["distinct"])
        assert torch.equal(its_parameter, parameter)


@pytest.mark.parametrize("kind", KINDS)
def test_state_has_the_documented_shape(kind):
    parameter = table(width=3, dtype=torch.float32)
    optimizer = kind([parameter])
    train(optimizer, parameter, BATCHES["none"])
    shapes = [tuple(tensor.shape) for tensor in state_of(optimizer, parameter)]
    assert shapes == ([(V,)] if kind is RowAdagrad else [(V, 3), (V, 3)])
    assert all(tensor.dtype == torch.float32 for tensor in state_of(optimizer, parameter))
    if kind is LazyAdam:
        assert optimizer.state[parameter]["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_groups_have_their_own_options(kind):
    fast, slow, alone = table(), table(), table()
    optimizer = kind([{"params": [fast]}, {"params": [slow], "lr": 1e-4}], lr=0.5)
    optimizer.add_param_group({"params": alone, "lr": 0.0})
    for each in (fast, slow, alone):
        backward(each, [1, 2])
    optimizer.step()
    for each, lr in ((fast, 0.5), (slow, 1e-4), (alone, 0.0)):
        oracle = formula(kind, table(), [[1, 2]], torch.float64, lr=lr)[0]
        assert_close_to_oracle(each.detach(), oracle, oracle, FORWARD)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scheduler_moves_lr(kind):
    parameter = table()
    optimizer = kind([parameter], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    train(optimizer, parameter, [[1]])
    scheduler.step()
    before = parameter.detach().clone()
    train(optimizer, parameter, [[1]])
    assert torch.equal(parameter, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_closure_is_called_once_with_gradients_and_its_loss_returned(kind):
    parameter, expected = table(), table()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        backward(parameter, [2, 2])
        return "loss"

    assert kind([parameter]).step(closure) == "loss"
    assert calls == [True]
    train(kind([expected]), expected, [[2, 2]])
    assert torch.equal(parameter, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_around_the_step(kind):
    parameter = table()
    optimizer = kind([parameter])
    fired = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    handle = register_optimizer_step_post_hook(lambda which, *_: fired.append(type(which)))
    try:
        train(optimizer, parameter, [[1]])
    finally:
        handle.remove()
    assert fired == ["before", "after", kind]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", None, torch.tensor(0.1)])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in ("lr", "eps", "weight_decay")] + [(RowAdagrad, "initial_accumulator")],
)
def test_impossible_options_are_refused_by_name(kind, name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be a finite number "):
        kind([table()], **{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_eps_of_0_is_refused(kind):
    with pytest.raises(ConfigError, match="eps must be a finite number above 0, got 0"):
        kind([table()], eps=0)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9,), 0.9, (0.9, math.nan), ("a", 0.9)])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ConfigError, match="betas must be two numbers of at least 0 and below 1"):
        LazyAdam([table()], betas=betas)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_group_is_not_added(kind):
    optimizer = kind([table()])
    with pytest.raises(ConfigError, match="lr must be"):
        optimizer.add_param_group({"params": [table()], "lr": -1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float16, torch.bfloat16])
def test_other_dtypes_are_refused(kind, dtype):
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['params'\]\[1\] is {dtype}; .*float32 and float64"):
        kind([table(), torch.ones(2, 2, dtype=dtype).requires_grad_()])


@pytest.mark.parametrize("kind", KINDS)
def test_sparse_parameters_are_refused(kind):
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] is a sparse tensor"):
        kind([torch.eye(3).to_sparse().requires_grad_()])


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4)])
def test_row_adagrad_refuses_what_has_no_rows(shape):
    with pytest.raises(ValueError, match=rf"is {len(shape)}-D; .*torch.optim.Adagrad"):
        RowAdagrad([torch.ones(shape).requires_grad_()])


def test_nothing_is_exported_by_the_package():
    assert "optim" not in m3oe_fast.__all__
    assert m3oe_fast.optim.LazyAdam is LazyAdam


# Large tables -------------------------------------------------------------------------------------


def allocated_bytes(call):
    """Bytes that ``call`` took from torch's allocator, what it gave back in between not subtracted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_ten_million_rows_allocates_for_the_touched_ones_only(kind):
    rows, width = 10_000_000, 16
    touched = [0, 1, rows // 2, rows - 1]

    def zeros(*shape):  # NumPy's take memory only where they are written, unlike torch's
        return torch.from_numpy(np.zeros(shape, np.float32))

    parameter = zeros(rows, width).requires_grad_()
    optimizer = kind([parameter])
    if kind is RowAdagrad:
        state = {"accumulator": zeros(rows)}
    else:
        state = {"step": 5, "exp_avg": zeros(rows, width), "exp_avg_sq": zeros(rows, width)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": optimizer.state_dict()["param_groups"]})
    for ids in (touched, [*touched, *touched]):
        optimizer.zero_grad()
        backward(parameter, ids)
        assert allocated_bytes(optimizer.step) < 100_000
        backward(parameter, ids)
        assert allocated_bytes(lambda: clip_grad_norm([parameter], 1.0)) < 100_000
    assert (parameter.detach()[touched] != 0).all()
    assert allocated_bytes(lambda: torch.zeros(rows, dtype=torch.bool)) >= rows  # or the measure would prove nothing
