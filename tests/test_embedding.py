"""Embeddings looked up inside the op: values and every gradient against the gathered input and the float64 oracle."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m3oe_fast import M3oE, M3oEConfig, folded, optim, reference
from m3oe_fast.folded import NetworkWeights
from m3oe_fast.ops import Lookup, network, network_loss
from tests.cases import Case, cast, make_inputs, make_weights, names, stacked_axes
from tests.test_model import batch
from tests.test_network import make_targets
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle


@dataclasses.dataclass(frozen=True)
class Fields:
    """A case of looked-up input. A field is small, and summed another way, if vocab <= rows // workers."""

    rows: int
    vocab: tuple[int, ...]
    width: int
    columns: int = 2
    ids: str = "random"
    int32: bool = False

    def __str__(self) -> str:
        return "-".join(str(v) for v in dataclasses.asdict(self).values()).replace(", ", ".")

    @property
    def case(self) -> Case:
        inputs = len(self.vocab) * self.width + self.columns
        return Case(rows=self.rows, inputs=inputs, hidden=17, widths=(9,), tower=11, gate_detach=False)

    @property
    def first_rows(self) -> Tensor:
        return torch.tensor([0, *self.vocab[:-1]], dtype=torch.int64).cumsum(0)


SMALL, MIXED, LARGE = (3, 10, 1), (4, 1000, 1, 90, 2, 5000, 60), (700, 900)
CASES = [
    *(Fields(200, MIXED[:4], width) for width in (1, 3, 8, 16, 17, 33, 64)),
    *(Fields(130, MIXED[:fields], 8, columns) for fields, columns in ((1, 0), (2, 1), (3, 0), (5, 7), (6, 3), (7, 0))),
    *(Fields(500, vocab, 16, columns) for vocab in (SMALL, LARGE) for columns in (0, 5)),
    *(Fields(rows, MIXED, 5) for rows in (0, 1, 2, 31, 33)),
    Fields(300, (1,), 8, 0),
    Fields(300, (1, 1, 1), 3, 1),
    Fields(300, MIXED[:4], 16, ids="same"),
    Fields(300, MIXED[:4], 16, ids="last"),
    Fields(300, (300, 300, 7), 16, ids="distinct"),
    Fields(64, (32, 33, 64, 65), 8, 1),  # around rows // workers of 1 and 2 threads
    Fields(64, (64, 63, 1), 8, 0, int32=True),  # tables end at a word of the bitmap
    Fields(400, MIXED, 16, int32=True),
]


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_ids(fields: Fields, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for v in fields.vocab:
        column = torch.randint(v, (fields.rows,), generator=generator)
        if fields.ids == "same":
            column[:] = v // 2
        elif fields.ids == "last":
            column[:] = v - 1
        elif fields.ids == "distinct":
            column = torch.randperm(max(v, fields.rows), generator=generator)[: fields.rows] % v
        columns.append(column)
    ids = torch.stack(columns, dim=1)
    return ids.int() if fields.int32 else ids


@dataclasses.dataclass
class Problem:
    """Everything of one call, in one dtype; the leaves require gradients."""

    fields: Fields
    ids: Tensor
    table: Tensor
    dense: Tensor
    domain: Tensor
    grad: Tensor
    weights: NetworkWeights
    backend: str = "cpu"

    @property
    def leaves(self) -> list[Tensor]:
        return [self.table, self.dense, *self.weights.flat()]

    @property
    def labels(self) -> list[str]:
        return ["table", "dense", *names(self.weights)]

    def lookup(self, sparse_grad: bool = False) -> Lookup:
        return Lookup(self.ids, self.table, self.fields.vocab, sparse_grad)

    def looked_up(self, sparse_grad: bool = False) -> Tensor:
        lookup = self.lookup(sparse_grad)
        return network(self.dense, self.domain, self.weights, lookup=lookup, gate_detach=False, backend=self.backend)

    def gathered(self) -> Tensor:
        rows = F.embedding(self.ids.long() + self.fields.first_rows, self.table)
        return torch.cat([rows.flatten(1), self.dense], dim=1)

    def results(self, logits: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(logits, self.leaves, self.grad)
        return [logits.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]

    def to(self, dtype: torch.dtype) -> Problem:
        table, dense = (v.detach().to(dtype).requires_grad_() for v in (self.table, self.dense))
        weights = cast(self.weights, dtype)
        return dataclasses.replace(self, table=table, dense=dense, grad=self.grad.to(dtype), weights=weights)


def make_problem(fields: Fields, dtype: torch.dtype = torch.float32, backend: str = "cpu") -> Problem:
    case = fields.case
    _, domain, grad, _ = make_inputs(case, dtype)
    generator = torch.Generator().manual_seed(4)
    table = torch.randn(sum(fields.vocab), fields.width, generator=generator).to(dtype).requires_grad_()
    dense = torch.randn(fields.rows, fields.columns, generator=generator).to(dtype).requires_grad_()
    return Problem(fields, make_ids(fields), table, dense, domain, grad, make_weights(case, dtype), backend)


def assert_all_close(labels, ours, eager, oracle) -> None:
    for label, *values in zip(labels, ours, eager, oracle, strict=True):
        factor = FORWARD if label in ("logits", "loss") else GRADIENT
        # Here "table" is the embedding's: rows are summed over different batch rows, but fail together.
        assert_close_to_oracle(*values, factor, label, 0 if label == "embedding" else stacked_axes(label))


# Values and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_logits_and_gradients_against_the_gathered_input_and_the_oracle(fields, threads):
    problem = make_problem(fields)
    exact = problem.to(torch.float64)
    ours = problem.results(problem.looked_up())
    eager = problem.results(folded.routed(problem.gathered(), problem.domain, problem.weights, gate_detach=False))
    oracle = exact.results(folded.routed(exact.gathered(), exact.domain, exact.weights, gate_detach=False))
    labels = ["logits", "embedding", *problem.labels[1:]]
    assert_all_close(labels, ours, eager, oracle)
    by_gather = problem.results(network(problem.gathered(), problem.domain, problem.weights, gate_detach=False))
    assert torch.equal(ours[0], by_gather[0])
    for label, mine, theirs in zip(labels[2:], ours[2:], by_gather[2:], strict=True):
        assert torch.equal(mine, theirs), label


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_one_pass_loss_against_the_oracle(fields, threads):
    problem = make_problem(fields)
    exact = problem.to(torch.float64)
    label, _, row_weight = make_targets(fields.case, torch.float32)

    def eager(p: Problem) -> list[Tensor]:
        logits = folded.routed(p.gathered(), p.domain, p.weights, gate_detach=False)
        dtype = logits.dtype
        loss = reference.pair_losses(logits, p.domain, label.to(dtype), 3, row_weight.to(dtype)).sum()
        return [loss.detach(), *torch.autograd.grad(loss * 1.7, p.leaves)]

    def ours(sparse: bool) -> list[Tensor]:
        targets = {"row_weight": row_weight, "lookup": problem.lookup(sparse), "gate_detach": False}
        loss, _ = network_loss(problem.dense, problem.domain, label, problem.weights, **targets)
        return [loss.detach(), *torch.autograd.grad(loss * 1.7, problem.leaves)]

    dense, sparse = ours(False), ours(True)
    # The weights' gradients are those of the gathered input to the bit, which test_network.py compares with the oracle.
    labels = ["loss", "embedding", "dense"]
    assert_all_close(labels, dense[:3], eager(problem)[:3], eager(exact)[:3])
    loss, _ = network_loss(
        problem.gathered(), problem.domain, label, problem.weights, row_weight=row_weight, gate_detach=False
    )
    by_gather = [loss.detach(), *torch.autograd.grad(loss * 1.7, problem.leaves[1:])]
    assert all(torch.equal(a, b) for a, b in zip([dense[0], *dense[2:]], by_gather, strict=True))
    assert_sparse_equals_dense(sparse[1], dense[1], problem)
    assert all(torch.equal(a, b) for a, b in zip(dense[2:], sparse[2:], strict=True))


def named_rows(problem: Problem) -> Tensor:
    return (problem.ids.long() + problem.fields.first_rows).unique()


def assert_sparse_equals_dense(sparse: Tensor, dense: Tensor, problem: Problem) -> None:
    assert sparse.is_sparse and sparse.is_coalesced()
    assert sparse.shape == dense.shape and sparse.dtype == dense.dtype
    assert sparse.indices().dtype == torch.int64 and torch.equal(sparse.indices()[0], named_rows(problem))
    assert sparse.values().shape == (sparse.indices().shape[1], dense.shape[1])
    assert torch.equal(sparse.to_dense(), dense)
    torch.sparse_coo_tensor(sparse.indices(), sparse.values(), sparse.shape, check_invariants=True)


@pytest.mark.parametrize("fields", CASES[::2], ids=str)
def test_the_sparse_gradient_is_the_dense_one_at_exactly_the_rows_named(fields, threads):
    problem = make_problem(fields)
    dense, sparse = (
        torch.autograd.grad(problem.looked_up(sparse_grad), problem.table, problem.grad)[0]
        for sparse_grad in (False, True)
    )
    assert_sparse_equals_dense(sparse, dense, problem)


@pytest.mark.parametrize("fields", [CASES[3], CASES[4], CASES[11], *CASES[17:19], CASES[-2]], ids=str)
def test_the_double_path_against_the_oracle(fields, threads):
    problem = make_problem(fields, torch.float64)
    oracle = problem.results(folded.routed(problem.gathered(), problem.domain, problem.weights, gate_detach=False))
    for sparse in (False, True):
        ours = problem.results(problem.looked_up(sparse))
        for label, mine, theirs in zip(["logits", *problem.labels], ours, oracle, strict=True):
            scale = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9 * scale + 1e-12, msg=lambda m, n=label: n + m)


def test_gradcheck_in_double():
    """Small and large fields, ids that repeat, one that nobody names."""
    problem = make_problem(Fields(9, (3, 20, 1), 2, 1), torch.float64)
    label, _, _ = make_targets(problem.fields.case, torch.float64)
    lookup = problem.lookup()

    def logits(table, dense, *flat):
        now = lookup._replace(embedding=table)
        return network(dense, problem.domain, NetworkWeights.unflat(flat), lookup=now, gate_detach=False)

    def loss(table, dense, *flat):
        now = lookup._replace(embedding=table)
        weights = NetworkWeights.unflat(flat)
        return network_loss(dense, problem.domain, label, weights, lookup=now, gate_detach=False)[0]

    for function in (logits, loss):
        assert torch.autograd.gradcheck(function, tuple(problem.leaves), eps=1e-6, atol=1e-5, nondet_tol=0.0)


def test_without_a_representation_layer():
    case = Case(rows=150, inputs=3 * 8 + 2, representation=False, gate_detach=False)
    fields = Fields(150, (5, 500, 2), 8)
    base = make_problem(fields)
    problem = dataclasses.replace(base, weights=make_weights(case, torch.float32), grad=make_inputs(case)[2].float())
    exact = problem.to(torch.float64)
    leaves = ["table", "dense"]

    def grads(p: Problem, logits: Tensor) -> list[Tensor]:
        return [logits.detach(), *torch.autograd.grad(logits, [p.table, p.dense], p.grad)]

    eager, oracle = (
        grads(p, folded.routed(p.gathered(), p.domain, p.weights, gate_detach=False)) for p in (problem, exact)
    )
    assert_all_close(["logits", "embedding", *leaves[1:]], grads(problem, problem.looked_up()), eager, oracle)


# Layouts and requests -----------------------------------------------------------------------------------------------


def test_other_layouts_give_the_same_bits():
    problem = make_problem(Fields(130, MIXED[:4], 8))
    expected = problem.results(problem.looked_up())
    ids = problem.ids
    wide = torch.full((260, 9), -1)
    wide[::2, 1:9:2] = ids
    shifted = torch.empty(ids.numel() + 1, dtype=torch.int64)[1:].view(ids.shape).copy_(ids)
    for strange in (ids.t().contiguous().t(), wide[::2, 1:9:2], shifted, ids.int(), ids.int().t().contiguous().t()):
        got = dataclasses.replace(problem, ids=strange)
        assert all(torch.equal(a, b) for a, b in zip(got.results(got.looked_up()), expected, strict=True))
    table = problem.table.detach()
    for strange in (table.t().contiguous().t(), torch.stack([table, table], dim=2)[..., 1]):
        got = dataclasses.replace(problem, table=strange.requires_grad_())
        assert not strange.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(got.results(got.looked_up()), expected, strict=True))


def test_one_id_expanded_to_all_rows():
    problem = make_problem(Fields(100, (4, 500), 8))
    one = torch.tensor([[2, 499]])
    expanded = dataclasses.replace(problem, ids=one.expand(100, 2))
    copied = dataclasses.replace(problem, ids=one.repeat(100, 1))
    results = [p.results(p.looked_up(sparse)) for p in (expanded, copied) for sparse in (False, True)]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_an_expanded_upstream_gradient_is_read_within_its_bounds(sparse_grad):
    problem = make_problem(Fields(100, (4, 500), 8))
    for upstream in (torch.ones(1, 1), torch.randn(1, 2), torch.randn(100, 1)):
        got, expected = (
            torch.autograd.grad(problem.looked_up(sparse_grad), problem.table, grad)[0].to_dense()
            for grad in (upstream.expand(100, 2), upstream.expand(100, 2).contiguous())
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_table_that_wants_no_gradient_gets_none(sparse_grad):
    problem = make_problem(Fields(50, (4, 500), 8))
    label = torch.zeros(50, 2)
    problem.table.requires_grad_(False)
    problem.looked_up(sparse_grad).sum().backward()
    network_loss(problem.dense, problem.domain, label, problem.weights, lookup=problem.lookup(sparse_grad))[
        0
    ].backward()
    assert problem.table.grad is None and problem.dense.grad is not None
    problem.table.requires_grad_()
    problem.dense.requires_grad_(False).grad = None
    problem.looked_up(sparse_grad).sum().backward()
    assert problem.dense.grad is None and problem.table.grad.is_sparse == sparse_grad


def test_no_fields_at_all():
    case = Case(rows=40)
    weights = make_weights(case, torch.float32)
    x, domain, _, _ = make_inputs(case, torch.float32)
    lookup = Lookup(torch.zeros(40, 0, dtype=torch.int64), torch.zeros(0, 8), ())
    assert torch.equal(network(x, domain, weights, lookup=lookup), network(x, domain, weights))


def test_a_field_without_rows_in_an_empty_batch():
    problem = make_problem(Fields(0, (3, 1, 2), 8))
    problem.ids = torch.zeros(0, 3, dtype=torch.int64)
    lookup = Lookup(problem.ids, problem.table, (3, 0, 3), True)
    logits = network(problem.dense, problem.domain, problem.weights, lookup=lookup)
    (grad,) = torch.autograd.grad(logits, problem.table, problem.grad)
    assert grad._nnz() == 0 and grad.shape == (6, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda k: k._replace(ids=k.ids[:, :1]), ValueError, "ids must be"),
        (lambda k: k._replace(ids=k.ids[1:]), ValueError, "ids must be"),
        (lambda k: k._replace(ids=k.ids.short()), TypeError, "int32 or int64"),
        (lambda k: k._replace(embedding=k.embedding[1:]), ValueError, "embedding must be"),
        (lambda k: k._replace(embedding=k.embedding.double()), TypeError, "embedding must be"),
        (lambda k: k._replace(vocab=(k.vocab[0] + 1, k.vocab[1])), ValueError, "embedding must be"),
        (lambda k: k._replace(vocab=(sum(k.vocab) + 1, -1)), RuntimeError, "negative"),
        (lambda k: k._replace(embedding=k.embedding[:, :7]), ValueError, "must be"),
    ],
)
def test_wrong_lookups_are_named(change, error, message):
    problem = make_problem(Fields(20, (4, 500), 8))
    with pytest.raises(error, match=message):
        network(problem.dense, problem.domain, problem.weights, lookup=change(problem.lookup()))


# Hostile ids and values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("bad", [-1, 500, 2**31, 2**40, 2**63 - 1, -(2**63)])
def test_an_id_out_of_range_names_row_and_field_and_does_no_harm(bad, sparse_grad, threads):
    problem = make_problem(Fields(300, (4, 500, 7), 8))
    expected = problem.results(problem.looked_up(sparse_grad))
    label = torch.zeros(300, 2)
    for row in (0, 150, 299):
        ids = problem.ids.clone()
        ids[row, 1] = bad
        broken = dataclasses.replace(problem, ids=ids)
        message = rf"ids\[{row}, 1\] is {bad}, field 1 has 500 rows"
        with pytest.raises(RuntimeError, match=message):
            broken.looked_up(sparse_grad)
        with pytest.raises(RuntimeError, match=message):
            network_loss(
                problem.dense, problem.domain, label, problem.weights, lookup=broken.lookup(sparse_grad)
            )  # ids are checked after the gradients were computed
        again = problem.results(problem.looked_up(sparse_grad))
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_of_many_bad_ids_the_first_is_named_every_time(threads):
    problem = make_problem(Fields(600, (4, 500, 7), 8))
    ids = problem.ids.clone()
    ids[torch.randperm(600)[:200], 1] = 500
    ids[torch.randperm(600)[:200], 2] = -3
    first = ((ids < 0) | (ids >= torch.tensor([4, 500, 7]))).nonzero()[0].tolist()
    broken = dataclasses.replace(problem, ids=ids)
    for _ in range(10):
        with pytest.raises(RuntimeError, match=rf"ids\[{first[0]}, {first[1]}\] is "):
            broken.looked_up()
    ids[:] = 10**9
    with pytest.raises(RuntimeError, match=r"ids\[0, 0\] is 1000000000, field 0 has 4 rows"):
        network_loss(
            problem.dense, problem.domain, torch.zeros(600, 2), problem.weights, lookup=broken.lookup(sparse_grad=True)
        )


def test_ids_changed_between_forward_and_backward_are_refused():
    problem = make_problem(Fields(50, (4, 500), 8))
    logits = problem.looked_up()
    problem.ids[3, 0] = 2**40
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", [0, 1])
def test_a_bad_table_row_poisons_only_the_rows_that_name_it(bad, field, threads):
    problem = make_problem(Fields(300, (4, 500, 7), 8))
    problem.ids[:, field] = torch.arange(300) % 4
    clean = problem.looked_up().detach()
    with torch.no_grad():
        problem.table[(0, 4, 504)[field] + 2, 3] = bad
    hit = problem.ids[:, field] == 2
    logits = problem.looked_up()
    assert torch.isnan(logits[hit]).all() and torch.equal(logits[~hit], clean[~hit])
    for sparse in (False, True):
        (grad,) = torch.autograd.grad(problem.looked_up(sparse), problem.table, problem.grad)
        expected = torch.zeros(511, dtype=torch.bool)
        expected[(problem.ids + problem.fields.first_rows)[hit].flatten()] = True
        assert torch.equal(torch.isnan(grad.to_dense()).any(1), expected)


def test_a_bad_row_that_nobody_names_is_never_read():
    problem = make_problem(Fields(300, (4, 500, 7), 8))
    problem.ids[problem.ids == 2] = 1
    expected = problem.results(problem.looked_up())
    with torch.no_grad():
        problem.table[[2, 6, 506]] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(problem.results(problem.looked_up()), expected, strict=True))


# Accumulation and determinism ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("function", ["network", "network_loss"])
def test_two_backward_passes_accumulate(function, sparse_grad):
    first, second = (make_problem(Fields(120, (4, 500, 7), 8)) for _ in range(2))
    second.ids = make_ids(second.fields, seed=8)
    second.table, second.weights = first.table, first.weights
    label = torch.ones(120, 2)

    def value(p: Problem) -> Tensor:
        if function == "network":
            return p.looked_up(sparse_grad).sum()
        return network_loss(p.dense, p.domain, label, p.weights, lookup=p.lookup(sparse_grad))[0]

    parts = [torch.autograd.grad(value(p), first.table)[0].to_dense() for p in (first, second)]
    for p in (first, second):
        value(p).backward()
    torch.testing.assert_close(first.table.grad.to_dense(), parts[0] + parts[1])
    first.table.grad = None
    once = value(first)
    for _ in range(3):
        once.backward(retain_graph=True)
    torch.testing.assert_close(first.table.grad.to_dense(), 3 * parts[0])


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_gradient_changed_in_place_is_not_what_backward_gives_again(sparse_grad):
    """The loss keeps its gradients: what clipping does to `.grad` must not reach what is kept."""
    problem = make_problem(Fields(120, (4, 500, 7), 8))
    loss, _ = network_loss(
        problem.dense, problem.domain, torch.ones(120, 2), problem.weights, lookup=problem.lookup(sparse_grad)
    )
    loss.backward(retain_graph=True)
    expected = problem.table.grad.to_dense().clone()
    optim.clip_grad_norm([problem.table], 1e-6)
    problem.table.grad = None
    loss.backward()
    assert torch.equal(problem.table.grad.to_dense(), expected)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_same_bits_every_time_and_for_large_fields_for_any_number_of_threads(sparse_grad):
    problem = make_problem(Fields(400, (4, 5000, 7, 900), 16))
    before = torch.get_num_threads()
    results = {}
    try:
        for threads in (1, 2, 3, 2, 1, 3):
            torch.set_num_threads(threads)
            result = problem.results(problem.looked_up(sparse_grad))
            known = results.setdefault(threads, result)
            assert all(torch.equal(a, b) for a, b in zip(known, result, strict=True))
    finally:
        torch.set_num_threads(before)
    large = torch.cat([torch.arange(4, 5004), torch.arange(5011, 5911)])
    for threads in (2, 3):
        assert torch.equal(results[1][0], results[threads][0])
        assert torch.equal(results[1][1][large], results[threads][1][large])
        torch.testing.assert_close(results[1][1], results[threads][1], rtol=1e-4, atol=1e-5)


def test_millions_of_rows_cost_a_sparse_gradient_no_memory():
    rows, width = 3_000_000, 4
    problem = make_problem(Fields(50, (5, 6), width))
    table = torch.zeros(rows, width, requires_grad=True)
    ids = torch.randint(1_500_000, (50, 2), generator=torch.Generator().manual_seed(0))
    ids[0] = torch.tensor([0, 1_499_999])
    lookup = Lookup(ids, table, (1_500_000, 1_500_000), True)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        network_loss(problem.dense, problem.domain, torch.ones(50, 2), problem.weights, lookup=lookup)[0].backward()
    assert table.grad.is_sparse and table.grad._values().untyped_storage().nbytes() <= 100 * width * 4
    assert torch.equal(table.grad._indices()[0], (ids + torch.tensor([0, 1_500_000])).unique())
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert largest < rows  # a dense gradient is 16 bytes a row


# The model ----------------------------------------------------------------------------------------------------------

MODEL = M3oEConfig(
    [3, 400, 12], 2, 3, 2, shared_experts=2, embed_dim=8, star_dim=16, hidden_dim=24, expert_dims=(12,), tower_dim=8
)


def make_model(sparse_grad: bool, backend: str = "cpu") -> M3oE:
    torch.manual_seed(0)
    model = M3oE(MODEL, backend=backend, sparse_grad=sparse_grad)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("function", ["loss", "forward"])
def test_both_backends_give_the_same_sparse_gradient(function):
    ids, dense, domain, label = batch(MODEL, rows=100)
    grads = []
    for backend in ("cpu", "reference"):
        for sparse in (True, False):
            model = make_model(sparse, backend)
            value = model.loss(ids, dense, domain, label) if function == "loss" else model(ids, dense, domain).sum()
            value.backward()
            grads.append(model.embedding.grad)
    ours, ours_dense, theirs, theirs_dense = grads
    assert ours.is_sparse and theirs.is_sparse and not ours_dense.is_sparse and not theirs_dense.is_sparse
    assert torch.equal(ours.to_dense(), ours_dense)
    named = theirs.coalesce()
    assert torch.equal(ours._indices(), named.indices())
    torch.testing.assert_close(ours._values(), named.values(), rtol=1e-4, atol=1e-6)


def restricted(grad: Tensor, ids: Tensor) -> Tensor:
    """A dense gradient as the sparse one of the rows in the batch."""
    rows = (ids + torch.tensor([0, 3, 403])).unique()
    return torch.sparse_coo_tensor(rows[None], grad[rows], grad.shape, is_coalesced=True, check_invariants=False)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["LazyAdam", "RowAdagrad"])
def test_training_with_sparse_gradients_is_training_with_dense_ones_at_the_rows_named(name, clip):
    models = [make_model(sparse) for sparse in (True, False)]
    start = models[0].embedding.detach().clone()
    seen = torch.zeros(len(start), dtype=torch.bool)
    optimizers = [
        (
            getattr(optim, name)([m.embedding], lr=0.05),
            torch.optim.Adam([p for n, p in m.named_parameters() if n != "embedding"], lr=0.01),
        )
        for m in models
    ]
    losses: list[list[float]] = [[], []]
    for step in range(5):
        inputs = batch(MODEL, rows=60, seed=step)
        seen[(inputs[0] + torch.tensor([0, 3, 403])).flatten()] = True
        for model, (table, rest), curve in zip(models, optimizers, losses, strict=True):
            table.zero_grad()
            rest.zero_grad()
            loss = model.loss(*inputs)
            loss.backward()
            if clip is not None:
                optim.clip_grad_norm(model.parameters(), clip)
            if not model.sparse_grad:
                model.embedding.grad = restricted(model.embedding.grad, inputs[0])
            table.step()
            rest.step()
            curve.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] != losses[0][0]
    for (label, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        if clip is None:
            assert torch.equal(a, b), label
        else:  # the norm is a sum in another order
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=label: f"{n}: {m}")
    assert torch.equal(models[0].embedding.detach()[~seen], start[~seen]) and not seen.all()
    assert (models[0].embedding.detach()[seen] != start[seen]).any(1).float().mean() > 0.9  # some have no label


def test_a_dense_row_adagrad_is_the_sparse_one():
    """Where a zero gradient moves nothing, dense and sparse gradients train alike, restricted or not."""
    models = [make_model(sparse) for sparse in (True, False)]
    for model in models:
        optimizer = optim.RowAdagrad([model.embedding], lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            model.loss(*batch(MODEL, rows=60, seed=step)).backward()
            optimizer.step()
    assert torch.equal(models[0].embedding, models[1].embedding)


def test_sparse_gradients_survive_a_copy_and_a_reload(tmp_path):
    model = make_model(True)
    model.save(tmp_path)
    for twin in (copy.deepcopy(model), M3oE.load(tmp_path, sparse_grad=True)):
        twin.loss(*batch(MODEL, rows=10)).backward()
        assert twin.embedding.grad.is_sparse
    plain = M3oE.load(tmp_path)
    plain.loss(*batch(MODEL, rows=10)).backward()
    assert not plain.embedding.grad.is_sparse
