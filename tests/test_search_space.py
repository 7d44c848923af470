"""What a search space may hold, and what it draws."""

from pathlib import Path

import pytest

from m3oe_fast import search_space
from m3oe_fast.errors import ConfigError
from m3oe_fast.search_space import DEFAULT, Choices, Range
from m3oe_fast.tune import _searchable


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def read(text, fixed=()):
    Path("s.yaml").write_text(text)
    return search_space.read("s.yaml", _searchable(), fixed)


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("lr: {low: 1e-4, high: 1e-2, log: true}", Range(1e-4, 1e-2, True)),
        ("learning_rate: {low: 1, high: 2}", Range(1.0, 2.0)),
        ("shared_experts: {low: 1, high: 8}", Range(1, 8)),
        ("hidden_dim: {choices: [64, 128]}", Choices((64, 128))),
        ("expert_dims: {choices: [64, '128,64', [32, 16]]}", Choices(("64", "128,64", "32,16"))),
        ("schedule: {choices: [constant, cosine]}", Choices(("constant", "cosine"))),
        ("cuda_graph: {choices: [off, auto]}", Choices(("off", "auto"))),
        ("gate_detach: {choices: [true, false]}", Choices((True, False))),
        ("weight_decay: {choices: [0, 1e-5]}", Choices((0, 1e-5))),
        ("clip_norm: {low: 0.1, high: 10, log: true}", Range(0.1, 10.0, True)),
    ],
)
def test_entries_have_the_option_s_type(text, entry):
    (found,) = read(text).values()
    assert found == entry
    if isinstance(found, Range):
        assert type(found.low) is type(entry.low)


def test_the_text_of_a_space_reads_back():
    assert read(search_space.to_yaml(DEFAULT)) == DEFAULT


def test_the_default_leaves_out_what_is_set():
    assert set(search_space.default(["lr", "tower_dim", "out"])) == set(DEFAULT) - {"lr", "tower_dim"}
    with pytest.raises(ConfigError, match="every option of the default search space is set"):
        search_space.default(DEFAULT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden_dims: {low: 1, high: 2}", r"unknown option hidden_dims; did you mean hidden_dim\?"),
        ("split: {choices: [user]}", "unknown option split"),
        ("out: {choices: [a]}", "unknown option out"),
        ("config: {choices: [a]}", "config cannot be searched"),
        ("lr: {low: 1, high: 2}\nlearning_rate: {low: 1, high: 2}", "lr is there twice, once by another name"),
        ("seed: {low: 1, high: 2}", "seed is searched here and set on the line; drop one"),
        ("lr: 3", r"lr must be \{low: 1, high: 8\}, with log: true if wanted, or \{choices: \[1, 2\]\}"),
        ("lr: {low: 1}", "lr must be"),
        ("lr: {low: 1, high: 2, step: 1}", "lr must be"),
        ("lr: {choices: [1], low: 1}", "lr must be"),
        ("lr: {low: 2, high: 1}", r"lr: low \(2\.0\) must be below high \(1\.0\)"),
        ("lr: {low: 1, high: 1}", "must be below high"),
        ("lr: {low: 0, high: 1, log: true}", "with log: true low must be above 0, got 0"),
        ("lr: {low: 1, high: 2, log: maybe}", "log must be true or false, got 'maybe'"),
        ("lr: {low: .nan, high: 1}", "lr must be a finite number, got nan"),
        ("lr: {low: a, high: b}", "lr must be a number, got 'a'"),
        ("epochs: {low: 1.5, high: 3}", "epochs must be a whole number, got 1.5"),
        ("epochs: {low: true, high: 3}", "epochs must be a whole number, got True"),
        ("schedule: {low: 1, high: 3}", "schedule takes one of constant, .* which has no range: list its values"),
        ("expert_dims: {low: 1, high: 3}", "expert_dims takes .* which has no range"),
        ("gate_detach: {low: 0, high: 1}", "gate_detach takes true or false, which has no range"),
        ("schedule: {choices: [sine]}", "schedule must be one of .* got 'sine'"),
        ("lr: {choices: []}", "choices must be a list such as"),
        ("lr: {choices: 3}", "choices must be a list such as"),
        ("lr: {choices: [1, 1]}", "a choice is there twice"),
        ("lr: {choices: [null]}", "lr must be a number, got None"),
        ("hidden_dim: {choices: [[1]]}", r"hidden_dim must be a whole number, got \[1\]"),
        ("", "it holds no options"),
        ("{}", "it names no option to search"),
        ("lr: {low", "while"),
    ],
)
def test_a_wrong_space_is_one_line_that_names_the_file(text, message):
    with pytest.raises(ConfigError, match=rf"^search space s\.yaml: .*{message}") as caught:
        read(text, fixed=["seed"])
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"^search space none\.yaml: No such file or directory$"):
        search_space.read("none.yaml", _searchable(), ())


@pytest.mark.parametrize("name", ["lr", "shared_experts", "hidden_dim", "expert_dims"])
def test_draws_lie_in_the_space(name):
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    drawn = [DEFAULT[name].draw(study.ask(), name) for _ in range(30)]
    assert all(DEFAULT[name].holds(value) for value in drawn)
    assert len(set(drawn)) > 3
    assert not DEFAULT[name].holds("999999")
    assert not DEFAULT[name].holds(10**6)
