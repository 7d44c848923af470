"""Packed weights kept between predictions: whatever changes a parameter, the next prediction must follow."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

from m3oe_fast import M3oE, M3oEConfig, optim
from m3oe_fast.errors import BackendError
from m3oe_fast.packed import PackedCache, PackedWeights
from tests.test_model import CONFIG, SWITCHED, batch, make

INPUTS = batch(CONFIG, rows=60)
SQUARE = M3oEConfig(
    [20, 12], 0, 2, 2, shared_experts=4, embed_dim=16, star_dim=32, hidden_dim=32, expert_dims=(32,), tower_dim=32
)


def ready(config: M3oEConfig = CONFIG) -> M3oE:
    """In eval mode, with packed weights in its cache."""
    model = make(config).eval()
    model.predict(*batch(config, rows=60)[:3])
    return model


def fresh(model: M3oE, inputs=INPUTS[:3]) -> torch.Tensor:
    """What the parameters say now: probabilities of a model that never kept anything."""
    twin = M3oE(model.config, precision=model.precision).to(model.embedding.dtype)
    twin.load_state_dict(model.state_dict())
    return twin.eval().predict(*inputs)


def predictions(model: M3oE, inputs=INPUTS[:3]) -> list[torch.Tensor]:
    """By predict, and by a forward pass without gradients, which keeps weights too."""
    with torch.no_grad():
        return [model.predict(*inputs), torch.sigmoid(model(*inputs))]


def assert_follows(model: M3oE, before: torch.Tensor, inputs=INPUTS[:3]) -> None:
    expected = fresh(model, inputs)
    assert not torch.allclose(expected, before, atol=1e-4), "the change changes nothing"
    probability, by_forward = predictions(model, inputs)
    assert torch.equal(probability, expected)
    torch.testing.assert_close(by_forward, expected, rtol=0, atol=2e-7)
    assert torch.equal(model.predict(*inputs), expected)


def train_step(model: M3oE, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model.loss(*INPUTS).backward()
    optimizer.step()


# Changes that must be seen ------------------------------------------------------------------------------------------

OPTIMIZERS = [
    *(
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
    ),
    "LBFGS",
]
FUSED = ["Adam", "AdamW", "SGD", "Adagrad"]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=["plain", "foreach", "fused"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_of_torch(name, options):
    if ("fused" in options and name not in FUSED) or (options and name == "LBFGS"):
        pytest.skip("no such form")
    model = make().eval()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **options)
    gradients = torch.autograd.grad(model.loss(*INPUTS), list(model.parameters()))
    before = model.predict(*INPUTS[:3])
    # Gradients set by hand and no forward pass with gradients in between: the step alone must be noticed.
    for _ in range(2):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step(lambda: torch.zeros(())) if name == "LBFGS" else optimizer.step()
        assert_follows(model, before)
        before = model.predict(*INPUTS[:3])


@pytest.mark.parametrize("name", ["LazyAdam", "RowAdagrad"])
def test_optimizers_of_this_package(name):
    model = ready()
    before = model.predict(*INPUTS[:3])
    model.embedding.grad = torch.ones_like(model.embedding).mul_(torch.randn(len(model.embedding), 1)).to_sparse(1)
    getattr(optim, name)([model.embedding], lr=0.3).step()
    assert_follows(model, before)


def change_in_place(model: M3oE) -> None:
    with torch.no_grad():
        model.head_bias.add_(1)


def change_one_expert(model: M3oE) -> None:
    with torch.no_grad():
        model.expert_weight[0][3].mul_(-1)


def load_state(model: M3oE) -> None:
    model.load_state_dict(make_other(model).state_dict())


def load_state_by_assignment(model: M3oE) -> None:
    model.load_state_dict(make_other(model).state_dict(), assign=True)


def load_through_a_parent(model: M3oE) -> None:
    parent = nn.Sequential(model)
    parent.load_state_dict(nn.Sequential(make_other(model)).state_dict())


def load_weights(model: M3oE) -> None:
    model.load_weights(make_other(model).state_dict(), source="other")


def assign_data(model: M3oE) -> None:
    model.star_weight.data = model.star_weight.data * -1


def replace_parameter(model: M3oE) -> None:
    model.star_weight = nn.Parameter(model.star_weight.detach() * -1)


def replace_in_a_list(model: M3oE) -> None:
    model.expert_weight[0] = nn.Parameter(model.expert_weight[0].detach() * -1)


def replace_a_list(model: M3oE) -> None:
    model.expert_offset = nn.ParameterList([nn.Parameter(p.detach() + 1) for p in model.expert_offset])


def change_storage(model: M3oE) -> None:
    model.head_bias.untyped_storage().copy_((model.head_bias.detach() + 1).untyped_storage())
    model.eval()  # nothing else tells


def set_to(model: M3oE) -> None:
    with torch.no_grad():
        model.head_bias.set_(model.head_bias + 1)


def swap(model: M3oE) -> None:
    torch.utils.swap_tensors(model.star_weight, nn.Parameter(-model.star_weight.detach()))


def through_a_view(model: M3oE) -> None:
    with torch.no_grad():
        model.tower_weight.view(-1)[::2].zero_()


def by_vector(model: M3oE) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.7, model.parameters())


def reset(model: M3oE) -> None:
    torch.manual_seed(5)
    model.reset_parameters()


def through_data_then_training(model: M3oE) -> None:
    model.head_bias.data.add_(1)
    model(*INPUTS[:3])  # with gradients: training may have begun


def make_other(model: M3oE) -> M3oE:
    torch.manual_seed(9)
    other = M3oE(model.config)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return other


CHANGES = [
    *(change_in_place, change_one_expert, load_state, load_state_by_assignment, load_through_a_parent, load_weights),
    *(assign_data, replace_parameter, replace_in_a_list, replace_a_list, change_storage, set_to, swap, through_a_view),
    *(by_vector, reset, through_data_then_training),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_predictions_is_followed(change):
    model = ready()
    before = model.predict(*INPUTS[:3])
    change(model)
    assert_follows(model, before)


def test_a_change_of_every_single_parameter_is_followed():
    model = ready(SWITCHED)
    inputs = batch(SWITCHED, rows=60)[:3]
    for name, parameter in model.named_parameters():
        if name in ("star_gain", "star_offset", "gate_weight", "gate_bias"):  # this configuration does not use them
            continue
        before = model.predict(*inputs)
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
        after = model.predict(*inputs)
        assert not torch.equal(after, before) and torch.equal(after, fresh(model, inputs)), name


def test_what_is_documented_as_unseen_is_seen_after_dropping():
    model = ready()
    before = model.predict(*INPUTS[:3])
    model.head_bias.data.add_(1)
    model.drop_packed_weights()
    assert_follows(model, before)
    for mode in (True, False):
        before = model.predict(*INPUTS[:3])
        model.head_bias.data.add_(-0.3)
        model.train(mode)
        assert_follows(model, before)


def test_in_train_mode_nothing_is_kept():
    model = make().train()
    for _ in range(3):
        before = model.predict(*INPUTS[:3])
        model.head_bias.data.add_(0.5)
        assert_follows(model, before)


def test_data_assigned_from_a_transposed_view_is_followed():
    """The same object, address, version and shape; only the strides differ."""
    model = ready(SQUARE)
    inputs = batch(SQUARE, rows=60)[:3]
    before = model.predict(*inputs)
    model.star_out_weight.data = model.star_out_weight.data.t()
    after = model.predict(*inputs)
    assert not torch.allclose(after, before)
    # Not the same bits: the fold's product reads the view in another order.
    model.drop_packed_weights()
    torch.testing.assert_close(after, model.predict(*inputs))


def test_another_precision_is_followed():
    """Packed sizes differ, or at widths that are multiples of 32 they are equal and the kernels read garbage."""
    for config in (CONFIG, SQUARE):
        inputs = batch(config, rows=60)[:3]
        model = ready(config)
        expected = model.predict(*inputs)
        for precision in ("bf16", "bf16x3"):
            model.precision = precision
            torch.testing.assert_close(model.predict(*inputs), expected, rtol=0, atol=0.03)


# Casts, copies, temporary tensors -----------------------------------------------------------------------------------


def test_to_double_and_back():
    model = ready()
    single = model.predict(*INPUTS[:3])
    model.double()
    double = model.predict(*INPUTS[:3])
    assert double.dtype == torch.float64 and torch.equal(double, fresh(model))
    torch.testing.assert_close(double.float(), single)
    with torch.no_grad():
        model.head_bias.add_(1)
    model.float()
    assert_follows(model, single)


def test_half_is_refused_by_name_and_the_way_back_is_right():
    model = ready()
    model.backend = "cpu"
    before = model.predict(*INPUTS[:3])
    model.half()
    with pytest.raises(BackendError, match="float16"):
        model.predict(*INPUTS[:3])
    model.float()
    torch.testing.assert_close(model.predict(*INPUTS[:3]), before, rtol=0, atol=0.02)
    assert torch.equal(model.predict(*INPUTS[:3]), fresh(model))


def test_functional_calls_with_temporary_tensors():
    """Freed after every call, so that the next ones come back to the same addresses with the same versions."""
    model = ready()
    own = model.predict(*INPUTS[:3])
    addresses = set()
    for shift in range(8):
        temporary = {name: (p.detach() + 0.02 * shift).clone() for name, p in model.named_parameters()}
        addresses.add(temporary["star_weight"].data_ptr())
        expected = copy.deepcopy(model)
        expected.load_state_dict(temporary)
        with torch.no_grad():
            logits = torch.func.functional_call(model, temporary, INPUTS[:3])
        torch.testing.assert_close(torch.sigmoid(logits), expected.predict(*INPUTS[:3]), rtol=0, atol=2e-7)
        del temporary
    assert torch.equal(model.predict(*INPUTS[:3]), own)


def test_storage_freed_and_taken_again():
    """`.data =` a new tensor, free the old one, `.data =` another: it must not come back to the first address."""
    model = ready()
    for shift in range(10):
        before = model.predict(*INPUTS[:3])
        model.head_bias.data = model.head_bias.detach() + 0.1 * (shift + 1)
        assert_follows(model, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_do_not_share_what_is_kept(copied):
    model = ready()
    own = model.predict(*INPUTS[:3])
    twin = copied(model)
    assert torch.equal(twin.predict(*INPUTS[:3]), own)
    change_in_place(twin)
    assert_follows(twin, own)
    assert torch.equal(model.predict(*INPUTS[:3]), own)
    change_one_expert(model)
    assert_follows(model, own)
    load_state(twin)  # the hook that forgets came along, and forgets the twin's
    assert torch.equal(twin.predict(*INPUTS[:3]), fresh(twin))


def test_whole_models_saved_by_torch_hold_no_packed_weights():
    model = make().eval()
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model, file)
        sizes.append(file.tell())
        model.predict(*INPUTS[:3])
    assert sizes[0] == sizes[1]
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).predict(*INPUTS[:3]), model.predict(*INPUTS[:3]))


def test_nothing_of_it_is_in_state_dict_parameters_or_buffers():
    model = make().eval()
    names = [list(model.state_dict()), [n for n, _ in model.named_buffers()], [n for n, _ in model.named_parameters()]]
    model.predict(*INPUTS[:3])
    assert names == [
        list(model.state_dict()),
        [n for n, _ in model.named_buffers()],
        [n for n, _ in model.named_parameters()],
    ]


@pytest.mark.filterwarnings("ignore:precision")
def test_models_that_share_parameters_keep_weights_apart():
    first = make().eval()
    others = [M3oE(CONFIG, precision=precision, backend="cpu").eval() for precision in ("bf16", "bf16x3")]
    for other in others:
        for name, parameter in first.named_parameters():
            module, _, last = name.rpartition(".")
            setattr(other.get_submodule(module), last, parameter)
    for model in (first, *others):
        assert model.embedding is first.embedding
    expected = [fresh(model) for model in (first, *others)]
    for _ in range(2):
        assert all(torch.equal(m.predict(*INPUTS[:3]), e) for m, e in zip((first, *others), expected, strict=True))
    change_in_place(others[0])
    for model, before in zip((first, *others), expected, strict=True):
        assert_follows(model, before)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = make().eval()
        before = model.predict(*INPUTS[:3])
        model.head_bias.add_(1)  # inference tensors have no version
        assert_follows(model, before)
    before = model.predict(*INPUTS[:3])
    with torch.inference_mode():
        model.head_bias.add_(-0.5)
    after = model.predict(*INPUTS[:3])
    assert torch.equal(after, fresh(model)) and not torch.allclose(after, before)


def test_predictions_inside_and_outside_of_inference_mode():
    model = make().eval()
    with torch.inference_mode():
        first = model.predict(*INPUTS[:3])
    second = model.predict(*INPUTS[:3])
    assert torch.equal(first, second)
    change_in_place(model)
    assert_follows(model, second)
    train_step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.predict(*INPUTS[:3]), fresh(model))


# Threads ------------------------------------------------------------------------------------------------------------


def test_a_step_while_weights_are_packed_leaves_nothing_stale():
    """A fused step changes no version: an entry made of what it half read must not count as of after the step."""
    parameter = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    cache = PackedCache()

    def packed() -> PackedWeights:
        return PackedWeights(None, parameter.detach().clone())

    def overtaken() -> PackedWeights:
        old = packed()
        optimizer.step()
        return old

    cache.get([parameter], "fp32", overtaken)
    assert torch.equal(cache.get([parameter], "fp32", packed).packed, torch.zeros(4))


@pytest.mark.parametrize("fused", [False, True])
def test_predictions_by_threads_while_another_trains(fused):
    model = make().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    gradients = torch.autograd.grad(model.loss(*INPUTS), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    before = model.predict(*INPUTS[:3])
    stop = threading.Event()
    failures: list[BaseException] = []

    def predict() -> None:
        try:
            while not stop.is_set():
                probability = model.predict(*INPUTS[:3])
                assert probability.shape == before.shape and torch.isfinite(probability).all()
        except BaseException as error:  # what a thread raises is lost otherwise
            failures.append(error)

    threads = [threading.Thread(target=predict) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(30):
        optimizer.step()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert_follows(model, before)


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("config", [CONFIG, SWITCHED], ids=["default", "switched"])
def test_predictions_in_chunks_are_those_at_once_to_the_bit(config, training):
    model = make(config).train(training)
    ids, dense, domain, _ = batch(config, rows=333)
    whole = model.predict(ids, dense, domain)
    for size in (50, 333) if training else (1, 7, 16, 100, 333):
        parts = [model.predict(*(v[at : at + size] for v in (ids, dense, domain))) for at in range(0, 333, size)]
        assert torch.equal(torch.cat(parts), whole), size


@pytest.mark.parametrize("double", [False, True])
def test_a_prediction_is_the_sigmoid_of_the_logits(double):
    model = make().eval()
    if double:
        model.double()
    with torch.no_grad():
        model.head_weight.mul_(30)  # probabilities from 0 to 1
    logits = model(*INPUTS[:3]).detach()
    probability = model.predict(*INPUTS[:3])
    exact = torch.sigmoid(logits.double())
    assert probability.dtype == logits.dtype and logits.abs().max() > 20
    eps = torch.finfo(logits.dtype).eps
    assert ((probability.double() - exact).abs() <= 4 * eps * exact).all()
    assert torch.equal(probability, model.train().predict(*INPUTS[:3]))


def test_extreme_logits_are_probabilities():
    model = make().eval()
    for bias, probability in ((1e30, 1.0), (-1e30, 0.0), (200.0, 1.0), (float("nan"), float("nan"))):
        with torch.no_grad():
            model.head_bias.fill_(bias)
        got = model.predict(*INPUTS[:3])
        expected = torch.full_like(got, probability)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-37, equal_nan=True)
    with torch.no_grad():
        model.head_bias.fill_(-87.0)
    assert (model.predict(*INPUTS[:3]) < 1e-30).all()


@pytest.mark.parametrize("rows", [0, 1])
def test_tiny_batches(rows):
    model = ready()
    inputs = [v[:rows] for v in INPUTS[:3]]
    got = model.predict(*inputs)
    assert got.shape == (rows, 2) and not got.requires_grad
    assert torch.equal(got, model.predict(*INPUTS[:3])[:rows])


def test_a_bad_id_names_itself_and_leaves_the_kept_weights_intact():
    model = ready()
    before = model.predict(*INPUTS[:3])
    ids = INPUTS[0].clone()
    ids[17, 1] = 30
    for _ in range(2):
        with pytest.raises(ValueError, match=r"ids\[17, 1\] is 30, field 1 has 30 rows"):
            model.predict(ids, *INPUTS[1:3])
    with pytest.raises(ValueError, match=r"domain\[0\] is 3"):
        model.predict(*INPUTS[:2], INPUTS[2] * 0 + 3)
    assert torch.equal(model.predict(*INPUTS[:3]), before)


# Compiled and exported ----------------------------------------------------------------------------------------------


def test_compiled_modules_and_predictions_in_eval_mode_follow():
    model = ready()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    predict = torch.compile(model.predict, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        before = model.predict(*INPUTS[:3])
        with torch.no_grad():
            torch.testing.assert_close(torch.sigmoid(compiled(*INPUTS[:3])), before)
        torch.testing.assert_close(predict(*INPUTS[:3]), before)
        change_in_place(model)
        assert_follows(model, before)
        with torch.no_grad():
            torch.testing.assert_close(torch.sigmoid(compiled(*INPUTS[:3])), fresh(model))
        torch.testing.assert_close(predict(*INPUTS[:3]), fresh(model))


def test_exported_in_eval_mode():
    model = ready()
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        program = torch.export.export(model, INPUTS[:3], dynamic_shapes=[{0: rows}] * 3)
    other = batch(CONFIG, rows=33, seed=4)[:3]
    torch.testing.assert_close(torch.sigmoid(program.module()(*other)), model.predict(*other))
    before = model.predict(*INPUTS[:3])
    change_in_place(model)
    assert_follows(model, before)
