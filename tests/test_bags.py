"""Multi-hot fields: pooling against plain loops, through the ops and the model against the oracle, hostile input."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3oe_fast import M3oE, M3oEConfig, bags, folded, kernels, optim, reference
from m3oe_fast.bags import Bags, pool
from m3oe_fast.data.batch import Bag, Batch
from m3oe_fast.ops import Lookup, infer, network, network_loss, pack
from tests.cases import Case, cast, make_inputs, make_weights, names, stacked_axes
from tests.tolerance import FORWARD, GRADIENT, assert_close_to_oracle

VOCAB, POOLING, WIDTH = (7, 1, 40), ("mean", "sum", "mean"), 5


def bag(rows: int, vocab: int, seed: int = 0, most: int = 5) -> Bag:
    """Rows of 0 to `most` ids, some more than once."""
    g = torch.Generator().manual_seed(seed)
    ends = torch.randint(most + 1, (rows,), generator=g).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    return Bag(torch.randint(vocab, (int(offsets[-1]),), generator=g), offsets)


def fields_of(rows: int, vocab=VOCAB, seed: int = 0) -> tuple[Bag, ...]:
    return tuple(bag(rows, size, seed * 10 + place) for place, size in enumerate(vocab))


def table(vocab=VOCAB, dtype=torch.float64, width: int = WIDTH) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(sum(vocab), width, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def by_loops(b: Bags, rows: int) -> Tensor:
    """What `pool` computes, row by row from the definition."""
    out = []
    for row in range(rows):
        parts, first = [], 0
        for (values, offsets), size, how in zip(b.fields, b.vocab, b.pooling, strict=True):
            ids = values[offsets[row] : offsets[row + 1]].tolist()
            part = torch.zeros(b.embedding.shape[1], dtype=b.embedding.dtype)
            for i in ids:
                part = part + b.embedding[first + i]
            parts.append(part / len(ids) if ids and how == "mean" else part)
            first += size
        out.append(torch.cat(parts))
    return torch.stack(out) if out else b.embedding.new_zeros(0, len(b.vocab) * b.embedding.shape[1])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 30])
@pytest.mark.parametrize("count", [1, 3])
def test_pooling_and_its_gradient_are_those_of_a_loop(count, rows, sparse):
    weight = table(VOCAB[:count])
    b = Bags(fields_of(rows)[:count], weight, VOCAB[:count], POOLING[:count], sparse)
    expected, got = by_loops(b, rows), pool(b, rows)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    assert got.shape == (rows, count * WIDTH)
    grad = torch.randn_like(got)
    (gradient,) = torch.autograd.grad(got, weight, grad)
    assert gradient.is_sparse == sparse
    wanted = torch.autograd.grad(expected, weight, grad)[0] if rows else torch.zeros_like(weight)
    torch.testing.assert_close(gradient.to_dense() if sparse else gradient, wanted, rtol=1e-13, atol=1e-13)


@given(
    rows=st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=6),
    how=st.sampled_from(["mean", "sum"]),
    narrow=st.booleans(),
)
def test_any_bag_pools_as_a_loop_does(rows, how, narrow):
    offsets = torch.tensor([0, *np.cumsum([len(row) for row in rows]).tolist()])
    values = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
    dtype = torch.int32 if narrow else torch.int64
    b = Bags([(values.to(dtype), offsets.to(dtype))], table((4,)), (4,), (how,))
    torch.testing.assert_close(pool(b, len(rows)), by_loops(b, len(rows)), rtol=1e-13, atol=1e-13)


def test_a_row_without_values_is_zero_and_has_no_gradient():
    nothing = (torch.empty(0, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    b = Bags([nothing, nothing], table((4, 6)), (4, 6), ("mean", "sum"))
    pooled = pool(b, 4)
    assert torch.equal(pooled, torch.zeros(4, 2 * WIDTH, dtype=torch.float64))
    assert not torch.autograd.grad(pooled.sum(), b.embedding)[0].any()


def test_strides_do_not_matter():
    values, ends = torch.tensor([[4, 9], [0, 9], [6, 9]]), torch.tensor([[0, 9], [1, 9], [1, 9], [3, 9]])
    strided = (values[:, 0], ends[:, 0])
    empty = (values[:0, 0], torch.zeros(1, dtype=torch.int64).expand(4))
    for fields, vocab in (([strided], (7,)), ([empty], (7,)), ([empty, strided], (1, 7))):
        b = Bags(fields, table(vocab), vocab, ("mean", "sum")[: len(fields)])
        torch.testing.assert_close(pool(b, 3), by_loops(b, 3), rtol=1e-13, atol=1e-13)
    transposed = table((WIDTH - 1, 1), width=8).detach().T  # [8, 5], columns behind each other
    b = Bags([strided], transposed, (8,), ("sum",))
    torch.testing.assert_close(pool(b, 3), by_loops(b, 3), rtol=1e-13, atol=1e-13)


def test_a_row_of_the_table_that_is_not_finite_stays_where_it_is_used():
    weight = table((7,)).detach()
    weight[0] = float("nan")
    b = Bags([(torch.tensor([3, 0, 2]), offsets(0, 1, 2, 2, 3))], weight, (7,), ("mean",))
    assert pool(b, 4).isnan().any(1).tolist() == [False, True, False, False]


def test_gradcheck_in_double():
    fields = fields_of(6)

    def pooled(weight):
        return pool(Bags(fields, weight, VOCAB, POOLING), 6)

    assert torch.autograd.gradcheck(pooled, (table(),), nondet_tol=0.0)


def test_the_same_bits_for_any_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            weight = table((50, 3000), torch.float32, 16)
            b = Bags(fields_of(5000, (50, 3000)), weight, (50, 3000), ("mean", "sum"))
            pooled = pool(b, 5000)
            results.append((pooled.detach(), *torch.autograd.grad(pooled.square().sum(), weight)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def offsets(*values: int) -> Tensor:
    return torch.tensor(values)


GOOD = (torch.tensor([0, 6, 2]), offsets(0, 1, 1, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda v, o: (v + 1, o), ValueError, r"bags\[1\], row 2 holds 7, bag 1 has 7 rows"),
        (lambda v, o: (v - 1, o), ValueError, r"bags\[1\], row 0 holds -1, bag 1 has 7 rows"),
        (lambda v, o: (v - 2**40, o), ValueError, r"row 0 holds -1099511627776"),
        (lambda v, o: (v, o + 1), ValueError, r"bags\[1\].offsets must start at 0, got 1"),
        (lambda v, o: (v, offsets(0, 2, 1, 3)), ValueError, r"bags\[1\].offsets decreases in row 1, from 2 to 1"),
        (lambda v, o: (v, offsets(0, -5, 1, 3)), ValueError, r"decreases in row 0, from 0 to -5"),
        (lambda v, o: (v, offsets(0, 2**40, 1, 3)), ValueError, r"decreases in row 1"),
        (lambda v, o: (v, offsets(0, 1, 1, 2)), ValueError, r"must end at 3, the number of values, got 2"),
        (lambda v, o: (v[:0], o), ValueError, r"must end at 0, the number of values, got 3"),
        (lambda v, o: (v, o[:-1]), ValueError, r"bags\[1\].offsets must be \[B \+ 1\] = \[4\], got \[3\]"),
        (lambda v, o: (v, o[None]), ValueError, r"offsets must be \[B \+ 1\]"),
        (lambda v, o: (v[None], o), ValueError, r"bags\[1\].values must be \[n\], got \[1, 3\]"),
        (lambda v, o: (v.float(), o), TypeError, r"bags\[1\].values must be int32 or int64, got torch.float32"),
        (lambda v, o: (v, o.bool()), TypeError, r"bags\[1\].offsets must be int32 or int64, got torch.bool"),
        (lambda v, o: (v.to("meta"), o), ValueError, r"bags\[1\].values must be on cpu, it is on meta"),
    ],
)
def test_a_wrong_bag_is_named(change, error, message):
    b = Bags([GOOD, change(*GOOD)], table((7, 7)), (7, 7), ("mean", "sum"))
    with pytest.raises(error, match=message):
        pool(b, 3)


def test_wrong_tables_and_counts_are_named():
    b = Bags([GOOD], table((7,)), (7,), ("mean",))
    with pytest.raises(ValueError, match=r"bag_embedding must be \[W, N\] with W = sum\(vocab\) = 8, got \[7, 5\]"):
        pool(b._replace(vocab=(8,)), 3)
    for wrong in (b._replace(fields=[]), b._replace(fields=[GOOD, GOOD])):
        with pytest.raises(ValueError, match=r"bags must hold 1 pairs \(values, offsets\), got \d"):
            pool(wrong, 3)


def test_where_nothing_can_be_raised_the_nearest_id_is_taken_and_remembered():
    values = torch.tensor([3, -4, 9, 0])
    assert torch.equal(bags.clamped(values.clamp(0, 6), 7, 2), values.clamp(0, 6))
    kernels.check_inputs(values.device)
    assert torch.equal(bags.clamped(values, 7, 2), torch.tensor([3, 0, 6, 0]))
    bags.clamped(values[:0], 7, 1)
    with pytest.raises(ValueError, match=r"an id of bags\[2\] of a batch is out of range"):
        kernels.check_inputs(values.device)
    kernels.check_inputs(values.device)


# Through the ops ----------------------------------------------------------------------------------------------------

CASE = Case(rows=60, inputs=2 * WIDTH + 3 * WIDTH + 3, gate_detach=False)
IDS_VOCAB = (6, 11)


def op_inputs(rows: int = CASE.rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, table of the ids, dense columns, domain, label."""
    g = torch.Generator().manual_seed(5)
    ids = torch.stack([torch.randint(size, (rows,), generator=g) for size in IDS_VOCAB], dim=1)
    embedding = torch.randn(sum(IDS_VOCAB), WIDTH, generator=g)
    domain = torch.randint(CASE.domains, (rows,), generator=g)
    label = torch.randint(2, (rows, CASE.tasks), generator=g).float()
    label[torch.rand(label.shape, generator=g) < 0.3] = float("nan")
    return ids, embedding, torch.randn(rows, 3, generator=g), domain, label


def run_op(name: str, dtype: torch.dtype, backend: str = "cpu") -> list[Tensor]:
    """The value and the gradients of dense columns, both tables and every weight; "eager" by plain PyTorch."""
    ids, embedding, dense, domain, label = op_inputs()
    weights = cast(make_weights(CASE, torch.float32), dtype)
    dense, embedding, bag_table = (
        v.detach().to(dtype).requires_grad_() for v in (dense, embedding, table(dtype=torch.float32))
    )
    b = Bags(fields_of(CASE.rows), bag_table, VOCAB, POOLING)
    if name == "eager":
        rows = F.embedding(ids + torch.tensor([0, IDS_VOCAB[0]]), embedding).flatten(1)
        x = torch.cat([rows, by_loops(b, CASE.rows), dense], dim=1)
        logits = folded.routed(x, domain, weights, **CASE.switches)
        value = reference.pair_losses(logits, domain, label.to(dtype), CASE.domains).sum()
    else:
        lookup = Lookup(ids, embedding, IDS_VOCAB)
        if name == "network_loss":
            value, _ = network_loss(
                dense, domain, label.to(dtype), weights, lookup=lookup, bags=b, backend=backend, **CASE.switches
            )
        else:
            logits = network(dense, domain, weights, lookup=lookup, bags=b, backend=backend, **CASE.switches)
            value = reference.pair_losses(logits, domain, label.to(dtype), CASE.domains).sum()
    return [value.detach(), *torch.autograd.grad(value, [dense, embedding, bag_table, *weights.flat()])]


@pytest.mark.parametrize("name", ["network", "network_loss"])
def test_ops_with_bags_against_the_oracle(name):
    assert_as_close_as_eager(name, "cpu")


def assert_as_close_as_eager(name: str, backend: str) -> None:
    ours = run_op(name, torch.float32, backend)
    results = [ours, run_op("eager", torch.float32), run_op("eager", torch.float64)]
    labels = ["loss", "dense", "embedding", "bag_embedding", *names(make_weights(CASE))]
    for label, *values in zip(labels, *results, strict=True):
        assert_close_to_oracle(*values, FORWARD if label == "loss" else GRADIENT, label, stacked_axes(label))


@pytest.mark.parametrize("function", [network, network_loss])
def test_gradcheck_of_the_ops_in_double(function):
    case = Case(rows=7, inputs=2 * 3 + 2, hidden=6, widths=(5,), tower=4, shared=2, gate_detach=False)
    weights = make_weights(case)
    _, domain, _, _ = make_inputs(case)
    fields = fields_of(case.rows, (5, 4))
    label = torch.tensor([[1.0, 0.0]] * 6 + [[float("nan"), 1.0]], dtype=torch.float64)

    def value(dense, weight):
        b = Bags(fields, weight, (5, 4), ("mean", "sum"))
        if function is network:
            return network(dense, domain, weights, bags=b, **case.switches)
        return network_loss(dense, domain, label, weights, bags=b, **case.switches)[0]

    dense = torch.randn(case.rows, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (dense, table((5, 4), width=3)), atol=1e-5, nondet_tol=0.0)


def test_infer_gives_the_logits_of_network():
    ids, embedding, dense, domain, _ = op_inputs()
    weights = make_weights(CASE, torch.float32)
    b = Bags(fields_of(CASE.rows), table(dtype=torch.float32), VOCAB, POOLING)
    parts = {"lookup": Lookup(ids, embedding, IDS_VOCAB), "bags": b}
    with torch.no_grad():
        expected = network(dense, domain, weights, **parts)
        packed = pack(weights, CASE.inputs)
        assert torch.equal(infer(dense, domain, weights.flat(), packed, **parts), expected)


def test_the_ops_refuse_a_table_of_another_dtype_and_a_wrong_width():
    ids, embedding, dense, domain, _ = op_inputs()
    weights, lookup = make_weights(CASE, torch.float32), Lookup(ids, embedding, IDS_VOCAB)
    b = Bags(fields_of(CASE.rows), table(), VOCAB, POOLING)
    with pytest.raises(TypeError, match=r"bag_embedding must be torch.float32 on cpu like x, got torch.float64"):
        network(dense, domain, weights, lookup=lookup, bags=b)
    with pytest.raises(ValueError, match="star_weight must be"):
        network(dense, domain, weights, lookup=lookup, bags=b._replace(embedding=table(dtype=torch.float32, width=6)))
    with pytest.raises(ValueError, match=r"x must be \[B, I\]"):
        network(dense[0], domain, weights, lookup=lookup, bags=b)


# The model ----------------------------------------------------------------------------------------------------------

CONFIG = M3oEConfig(
    [50, 30, 4], 2, 3, 2, shared_experts=2, embed_dim=8, star_dim=16, hidden_dim=24, expert_dims=(12,), tower_dim=8,
    bag_vocab_sizes=(9, 300), bag_pooling=("mean", "sum"),
)  # fmt: skip
ALONE = dataclasses.replace(CONFIG, vocab_sizes=(), num_dense=0)  # nothing but bags


def batch(config: M3oEConfig = CONFIG, rows: int = 120, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    columns = [torch.randint(v, (rows,), generator=g) for v in config.vocab_sizes]
    ids = torch.stack(columns, dim=1) if columns else torch.empty(rows, 0, dtype=torch.int64)
    domain = torch.randint(config.num_domains, (rows,), generator=g)
    label = torch.randint(2, (rows, config.num_tasks), generator=g).float()
    label[torch.rand(label.shape, generator=g) < 0.2] = float("nan")
    dense = torch.randn(rows, config.num_dense, generator=g)
    return Batch(ids, dense, domain, label, None, fields_of(rows, config.bag_vocab_sizes, seed))


def make(config: M3oEConfig = CONFIG, backend: str = "cpu", **options) -> M3oE:
    torch.manual_seed(0)
    model = M3oE(config, backend=backend, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.mark.parametrize("rows", [0, 1, 120])
@pytest.mark.parametrize("config", [CONFIG, ALONE], ids=["mixed", "alone"])
def test_loss_and_every_gradient_against_the_oracle(config, rows):
    ours, eager, oracle = make(config), make(config, "reference"), make(config, "reference").double()
    losses = [m.loss(*batch(config, rows)) for m in (ours, eager, oracle)]
    assert_close_to_oracle(*losses, FORWARD, "loss")
    for loss in losses:
        loss.backward()
    for (name, a), b, c in zip(ours.named_parameters(), eager.parameters(), oracle.parameters(), strict=True):
        if c.grad is None:
            assert name == "embedding" and config is ALONE and a.grad is None
        else:
            assert_close_to_oracle(a.grad, b.grad, c.grad, GRADIENT, name)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_x_is_embeddings_then_bags_then_dense(backend):
    model, inputs = make(backend=backend), batch(rows=3)
    x = model.embed(inputs.ids, inputs.dense, inputs.bags)
    first = [0, 50, 80]
    for row in range(3):
        embedded = [model.embedding[first[f] + inputs.ids[row, f]] for f in range(3)]
        genres, tags = (b.values[b.offsets[row] : b.offsets[row + 1]] for b in inputs.bags)
        zeros = torch.zeros(8)
        mean = model.bag_embedding[genres].mean(0) if len(genres) else zeros
        total = model.bag_embedding[9 + tags].sum(0) if len(tags) else zeros
        torch.testing.assert_close(x[row], torch.cat([*embedded, mean, total, inputs.dense[row]]))
    logits = reference.forward(dict(model.named_parameters()), CONFIG, x, inputs.domain)
    torch.testing.assert_close(model(*inputs.inputs), logits)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_predictions_follow_training_and_are_those_of_the_logits(backend, training):
    model, inputs = make(backend=backend).train(training), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    for _ in range(3):
        expected = torch.sigmoid(model(*inputs.inputs))
        for _ in range(2):
            torch.testing.assert_close(model.predict(*inputs.inputs), expected.detach(), rtol=1e-5, atol=1e-6)
        optimizer.zero_grad()
        model.loss(*inputs).backward()
        optimizer.step()
    assert (model.predict(*inputs.inputs) - expected).abs().max() > 1e-3


def test_a_change_of_the_bag_table_is_seen_by_kept_weights():
    model, inputs = make().eval(), batch()
    before = model.predict(*inputs.inputs)
    with torch.no_grad():
        model.bag_embedding.mul_(2)
    after = model.predict(*inputs.inputs)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, torch.sigmoid(model(*inputs.inputs)).detach(), rtol=1e-5, atol=1e-6)


def test_the_bag_table_is_a_table_with_published_initialisation():
    model = M3oE(CONFIG)
    assert [id(p) for p in model.table_parameters()] == [id(model.embedding), id(model.bag_embedding)]
    assert {id(p) for p in model.table_parameters()} <= {id(p) for p in model.network_parameters()}
    assert model.bag_embedding.shape == (309, 8)
    assert model.bag_embedding.std().item() == pytest.approx(1e-4, rel=0.1)


def test_without_bags_there_is_no_table_and_none_may_be_given():
    plain = dataclasses.replace(CONFIG, bag_vocab_sizes=(), bag_pooling=())
    model, inputs = make(plain), batch()
    assert "bag_embedding" not in model.state_dict() and len(model.table_parameters()) == 1
    with pytest.raises(ValueError, match=r"bags must hold 0 pairs \(values, offsets\), got 2"):
        model(*inputs.inputs)
    with pytest.raises(ValueError, match=r"bags must hold 2 pairs \(values, offsets\), got 0"):
        make()(*inputs.inputs[:3])


@pytest.mark.parametrize("function", ["forward", "predict", "loss"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_model_names_a_wrong_bag(backend, function):
    model, inputs = make(backend=backend), batch()
    genres, tags = inputs.bags
    row = int(genres.offsets.diff().argmax())
    values = genres.values.clone()
    values[genres.offsets[row]] = 9  # a row of the next bag
    arguments = inputs._replace(bags=(Bag(values, genres.offsets), tags))
    with pytest.raises(ValueError, match=rf"bags\[0\], row {row} holds 9, bag 0 has 9 rows"):
        getattr(model, function)(*(arguments if function == "loss" else arguments.inputs))


def test_autocast_changes_nothing():
    model, inputs = make(), batch()
    expected = model(*inputs.inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(*inputs.inputs)
        loss = model.loss(*inputs)
    assert torch.equal(logits, expected) and torch.equal(loss, model.loss(*inputs))


def test_compiles_as_one_graph_for_any_number_of_rows_and_values():
    model = make()
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    for rows in (120, 33, 57):
        inputs = batch(rows=rows, seed=rows)
        results = []
        for loss in (model.loss, compiled):
            model.zero_grad()
            loss(*inputs).backward()
            results.append([p.grad for p in model.parameters()])
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    genres, tags = batch().bags
    for wrong, message in (
        (Bag(genres.values + 5, genres.offsets), r"an id of bags\[0\] is not in \[0, 9\)"),
        (Bag(genres.values, genres.offsets.flip(0)), r"bags\[0\].offsets do not divide its values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            compiled(*batch()._replace(bags=(wrong, tags)))


def test_exports():
    model, inputs = make(), batch()
    auto = {0: torch.export.Dim.AUTO}
    shapes = (auto, auto, auto, ((auto, auto), (auto, auto)))
    with torch.no_grad():
        pairs = tuple(map(tuple, inputs.bags))
        program = torch.export.export(model, (*inputs.inputs[:3], pairs), dynamic_shapes=shapes)
        other = batch(rows=17, seed=4)
        got = program.module()(*other.inputs[:3], tuple(map(tuple, other.bags)))
        torch.testing.assert_close(got, model(*other.inputs))


@pytest.mark.parametrize("name", ["copy", "pickle", "torch", "files"])
def test_copies_and_files_hold_the_bag_table(name, tmp_path):
    model, inputs = make().eval(), batch()
    expected = model.predict(*inputs.inputs)
    if name == "copy":
        twin = copy.deepcopy(model)
    elif name == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif name == "torch":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    else:
        model.save(tmp_path)
        twin = M3oE.load(tmp_path)
        assert twin.config == CONFIG
    with torch.no_grad():
        model.bag_embedding.add_(1)
    assert torch.equal(twin.predict(*inputs.inputs), expected)


def test_a_double_model_with_bags(tmp_path):
    model, inputs = make().double(), batch()
    expected = model.predict(*inputs.inputs)
    assert expected.dtype == torch.float64
    model.save(tmp_path)
    assert torch.equal(M3oE.load(tmp_path).predict(*inputs.inputs), expected)


def test_a_bfloat16_model_with_bags_falls_back_to_the_oracle():
    model, inputs = make(backend="reference"), batch()
    expected = model.predict(*inputs.inputs)
    got = model.bfloat16().predict(*inputs.inputs)
    assert got.dtype == torch.bfloat16 and (got.float() - expected).abs().max() < 0.1


@pytest.mark.filterwarnings("ignore:precision")
@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
def test_pooled_columns_are_rounded_as_all_of_x(precision):
    inputs = batch()
    with torch.no_grad():
        logits = make(precision=precision)(*inputs.inputs)
        model = make(precision=precision)
        x = model.embed(inputs.ids, inputs.dense, inputs.bags)
        expected = network(x, inputs.domain, model._op_weights(), precision=precision)
    assert torch.equal(logits, expected)


# Sparse gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_sparse_gradient_is_the_dense_one_at_the_rows_named(backend):
    inputs = batch()
    sparse, dense = (make(backend=backend, sparse_grad=flag) for flag in (True, False))
    for model in (sparse, dense):
        model.loss(*inputs).backward()
    grad = sparse.bag_embedding.grad
    assert grad.is_sparse and sparse.embedding.grad.is_sparse and not dense.bag_embedding.grad.is_sparse
    named = torch.cat([inputs.bags[0].values, inputs.bags[1].values + 9]).unique()
    assert torch.equal(grad.coalesce().indices()[0], named)
    torch.testing.assert_close(grad.to_dense(), dense.bag_embedding.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["LazyAdam", "RowAdagrad"])
def test_table_optimizers_train_the_bag_table_row_by_row(name, clip):
    models = [make(sparse_grad=flag) for flag in (True, False)]
    start = models[0].bag_embedding.detach().clone()
    seen = torch.zeros(len(start), dtype=torch.bool)
    optimizers = [getattr(optim, name)(m.table_parameters(), lr=0.05) for m in models]
    for step in range(4):
        inputs = batch(rows=40, seed=step)
        rows = torch.cat([inputs.bags[0].values, inputs.bags[1].values + 9]).unique()
        seen[rows] = True
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            model.loss(*inputs).backward()
            if clip is not None:
                optim.clip_grad_norm(model.parameters(), clip)
            if not model.sparse_grad:
                first = torch.tensor([0, 50, 80])
                for table, named in ((model.embedding, (inputs.ids + first).unique()), (model.bag_embedding, rows)):
                    table.grad = torch.sparse_coo_tensor(
                        named[None], table.grad[named], table.shape, is_coalesced=True, check_invariants=False
                    )
            optimizer.step()
    for a, b in zip(models[0].table_parameters(), models[1].table_parameters(), strict=True):
        # The norm, and the gradient of a row, are sums in another order, which Adam's first steps magnify.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert torch.equal(models[0].bag_embedding.detach()[~seen], start[~seen]) and not seen.all()
    assert (models[0].bag_embedding.detach()[seen] != start[seen]).any(1).float().mean() > 0.9


# Scoring ------------------------------------------------------------------------------------------------------------


def test_scoring_passes_the_bags_chunk_by_chunk(monkeypatch):
    from m3oe_fast import model as module

    inputs = batch(rows=100)
    model = make()
    model.encoder = type("Encoder", (), {"transform": lambda self, frame: inputs.rows(0, len(frame))})()
    whole = model.score(range(100))
    torch.testing.assert_close(torch.from_numpy(whole), model.predict(*inputs.inputs), rtol=0, atol=1e-7)
    for size in (1, 33, 100):
        monkeypatch.setattr(module, "SCORED_AT_ONCE", size)
        torch.testing.assert_close(model.score(range(100)), whole, rtol=0, atol=1e-7)
    assert model.score(range(0)).shape == (0, 2)
