"""Every impossible field is refused by name; a configuration survives the trip through JSON."""

import json

import pytest

from m3oe_fast import M3oEConfig
from m3oe_fast.errors import ConfigError

GOOD = {"vocab_sizes": [5, 9], "num_dense": 1, "num_domains": 3, "num_tasks": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_sizes", [5, 0]),
        ("vocab_sizes", "59"),
        ("vocab_sizes", [1.5]),
        ("num_dense", -1),
        ("num_domains", 0),
        ("num_tasks", True),
        ("shared_experts", -1),
        ("embed_dim", 0),
        ("star_dim", 2.0),
        ("hidden_dim", None),
        ("expert_dims", []),
        ("expert_dims", 64),
        ("tower_dim", 0),
        ("star_activation", "tanh"),
        ("gate_detach", 1),
        ("fusion", "both"),
        ("fusion_init", float("nan")),
        ("init", "zeros"),
        ("bag_vocab_sizes", [4, 0]),
        ("bag_vocab_sizes", 4),
        ("bag_pooling", ["mean"]),
        ("bag_pooling", "mean"),
        ("bag_pooling", None),
    ],
)
def test_a_wrong_field_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        M3oEConfig(**{**GOOD, field: value})


def test_a_model_without_input_is_refused():
    with pytest.raises(ConfigError, match="no input"):
        M3oEConfig([], 0, 1, 1)


@pytest.mark.parametrize(
    ("pooling", "message"),
    [
        ((), r"one name for each of the 2 bags, got \(\)"),
        (("mean",) * 3, "each of the 2 bags"),
        ("ms", "each of the 2 bags"),
        (("mean", "max"), r"bag_pooling\[1\] must be one of 'mean', 'sum', got 'max'"),
        ((["mean"], "sum"), r"bag_pooling\[0\]"),
    ],
)
def test_every_bag_needs_a_pooling(pooling, message):
    with pytest.raises(ConfigError, match=message):
        M3oEConfig(**GOOD, bag_vocab_sizes=[3, 9], bag_pooling=pooling)


def test_bags_widen_the_input():
    config = M3oEConfig(**GOOD, embed_dim=10, bag_vocab_sizes=[3, 9, 2], bag_pooling=["sum", "mean", "sum"])
    assert config.input_dim == (2 + 3) * 10 + 1
    assert config.bag_vocab_sizes == (3, 9, 2) and config.bag_pooling == ("sum", "mean", "sum")
    assert M3oEConfig([], 0, 1, 1, bag_vocab_sizes=[5], bag_pooling=["mean"]).input_dim == 16


def test_what_was_saved_before_there_were_bags_still_loads():
    plain = M3oEConfig(**GOOD).to_dict()
    del plain["bag_vocab_sizes"], plain["bag_pooling"]
    assert M3oEConfig.from_dict(plain) == M3oEConfig(**GOOD)


def test_the_published_sizes_are_the_defaults():
    config = M3oEConfig([6040, 3706, 2, 21, 3439, 18, 3], 1, 3, 2)
    assert config.input_dim == 113 and config.num_experts == 9 and config.expert_dim == 64
    assert (config.star_dim, config.hidden_dim, config.tower_dim) == (512, 256, 64)


def test_json_round_trip():
    config = M3oEConfig(**GOOD, expert_dims=(8, 4), fusion="per_pair", bag_vocab_sizes=(3,), bag_pooling=("sum",))
    assert M3oEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(("change", "name"), [({"depth": 3}, "depth"), ({"num_tasks": None}, "num_tasks")])
def test_from_dict_names_the_field(change, name):
    plain = {k: v for k, v in {**M3oEConfig(**GOOD).to_dict(), **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=name):
        M3oEConfig.from_dict(plain)
