"""How the losses of pairs are summed: against the oracle's pair losses, and accumulation against one large batch."""

import dataclasses

import pytest
import torch

from m3oe_fast import M3oE, M3oEConfig, reference
from m3oe_fast.data import Batch
from m3oe_fast.errors import ConfigError
from m3oe_fast.training import TrainOptions
from m3oe_fast.training.weighting import LossWeighting, options_of_member, parse_pair_weights

DOMAINS, TASKS = ("home", "live", "empty"), ("click", "like")


def make_model():
    torch.manual_seed(0)
    config = M3oEConfig((8, 3), 1, 3, 2, embed_dim=4, star_dim=8, hidden_dim=8, expert_dims=(4,), tower_dim=4)
    return M3oE(config, backend="reference").double()


def make_batch(rows, seed):
    g = torch.Generator().manual_seed(seed)
    label = (torch.rand(rows, 2, generator=g) < 0.3).float()
    label[torch.rand(rows, 2, generator=g) < 0.2] = torch.nan
    domain = torch.randint(0, 2, (rows,), generator=g)  # never "empty"
    ids = torch.stack([torch.randint(0, 8, (rows,), generator=g), domain], 1).int()
    return Batch(ids, torch.rand(rows, 1, generator=g), domain, label)


def pair_losses(model, batch):
    logits = model(*batch.inputs)
    losses = reference.pair_losses(logits, batch.domain, batch.label.double(), 3)
    observed = (~torch.isnan(batch.label)).double()
    counts = torch.zeros(3, 2, dtype=torch.float64).index_add(0, batch.domain, observed)
    return losses, counts


def weighting(kind, **options):
    return LossWeighting(TrainOptions(loss_weighting=kind, **options), DOMAINS, TASKS).double()


def test_sum_is_the_loss_of_the_paper():
    model, batch = make_model(), make_batch(50, 1)
    assert torch.equal(weighting("sum").loss(model, batch), model.loss(*batch))


def test_rows_counts_every_labelled_row_the_same():
    model, batch = make_model(), make_batch(50, 1)
    losses, counts = pair_losses(model, batch)
    wanted = (losses * counts).sum() / counts.sum()
    assert weighting("rows").loss(model, batch).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_given_weights_multiply_the_pairs():
    model, batch = make_model(), make_batch(50, 1)
    losses, _ = pair_losses(model, batch)
    wanted = 2 * losses[0].sum() + 0.5 * losses[1, 0] + losses[1, 1]
    found = weighting("given", pair_weights="home/*=2,live/click=0.5").loss(model, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_uncertainty_is_kendall_and_leaves_absent_pairs_alone():
    model, batch = make_model(), make_batch(50, 1)
    chosen = weighting("uncertainty")
    with torch.no_grad():
        chosen.log_variance.copy_(torch.tensor([[0.1, -0.2], [0.3, 0.4], [5.0, 6.0]]))
    s = chosen.log_variance.detach()
    losses, _ = pair_losses(model, batch)
    wanted = (torch.exp(-s[:2]) * losses[:2] + s[:2] / 2).sum()
    found = chosen.loss(model, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    found.backward()
    expected = -torch.exp(-s[:2]) * losses[:2].detach() + 0.5
    assert torch.allclose(chosen.log_variance.grad[:2], expected, rtol=1e-5)
    assert not chosen.log_variance.grad[2].any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sum", {}), ("rows", {}), ("given", {"pair_weights": "like=3"}), ("uncertainty", {})],
)
def test_accumulated_batches_are_one_large_batch(kind, options):
    """Also where a pair is missing from one of them, and where they differ in size."""
    model, chosen = make_model(), weighting(kind, **options)
    batches = [make_batch(40, 1), make_batch(7, 2), make_batch(21, 3)]
    batches[1] = batches[1]._replace(domain=torch.zeros(7, dtype=torch.int64))
    together = Batch(*(torch.cat(columns) for columns in zip(*(batch[:4] for batch in batches), strict=True)))
    wanted = chosen.loss(model, together)
    parameters = [p for p in (*model.parameters(), *chosen.parameters()) if p.requires_grad]
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    counts = [chosen.count(batch) for batch in batches]
    parts = [chosen.loss(model, batch, counts, place) for place, batch in enumerate(batches)]
    assert sum(parts).item() == pytest.approx(wanted.item(), rel=1e-6)
    found = torch.autograd.grad(sum(parts), parameters, allow_unused=True)
    for one, other in zip(gradients, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)


def test_the_last_weight_that_fits_counts():
    found = parse_pair_weights("like=0.5, home/like=2 ,live/*=3", DOMAINS, TASKS)
    assert found.tolist() == [[1.0, 2.0], [3.0, 3.0], [1.0, 0.5]]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("like", "'like' names no pair"),
        ("share=1", "'share=1' names no pair"),
        ("moon/like=1", "'moon/like=1' names no pair"),
        ("like=much", "must end in a number"),
        ("like=-1", "must end in a number"),
        ("like=nan", "must end in a number"),
        ("", "names no pair"),
    ],
)
def test_weights_that_cannot_be_read_are_one_line(text, named):
    with pytest.raises(ConfigError, match=named) as error:
        parse_pair_weights(text, DOMAINS, TASKS)
    assert "\n" not in str(error.value)


def test_a_slash_in_a_name_is_part_of_the_domain():
    assert parse_pair_weights("a/b/like=2", ("a/b",), TASKS).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize(
    "options", [{"loss_weighting": "given"}, {"pair_weights": "like=1"}, {"loss_weighting": "mean"}]
)
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(ConfigError, match="loss_weighting"):
        dataclasses.replace(TrainOptions(), **options)


@pytest.mark.parametrize(
    ("domains", "tasks", "kind", "weights"),
    [
        (("home",), TASKS, "given", "like=0.5,home/like=2"),
        (("live",), TASKS, "given", "like=0.5,live/*=3"),
        (DOMAINS, ("like",), "given", "like=0.5,home/like=2,live/*=3"),
        (DOMAINS, TASKS, "given", "like=0.5,home/like=2,live/*=3"),
        (("empty", "home"), ("click",), "sum", None),  # nothing is said of its pairs: each counts 1
        (("home",), ("like",), "sum", None),  # nothing to weigh it against
    ],
)
def test_a_model_of_some_pairs_has_the_weights_of_these(domains, tasks, kind, weights):
    options = TrainOptions(loss_weighting="given", pair_weights="like=0.5,home/like=2,live/*=3")
    own = options_of_member(options, domains, tasks)
    assert (own.loss_weighting, own.pair_weights) == (kind, weights)
    whole = parse_pair_weights(options.pair_weights, DOMAINS, TASKS)
    if weights is not None:
        rows, columns = [DOMAINS.index(d) for d in domains], [TASKS.index(t) for t in tasks]
        assert torch.equal(parse_pair_weights(weights, domains, tasks), whole[rows][:, columns])


def test_other_weightings_stay_unless_there_is_one_pair():
    options = TrainOptions(loss_weighting="uncertainty")
    assert options_of_member(options, DOMAINS, ("click",)) == options
    assert options_of_member(options, ("home",), ("click",)) == TrainOptions()
