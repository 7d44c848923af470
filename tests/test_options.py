"""The data options on a command line."""

from dataclasses import fields

import pytest
from jsonargparse import ArgumentParser

from m3oe_fast.data.options import DataOptions, add_arguments


@pytest.fixture
def parser():
    parser = ArgumentParser()
    add_arguments(parser, DataOptions, "data")
    return parser


def test_nothing_typed_gives_the_defaults(parser):
    assert DataOptions(**parser.parse_args([]).as_dict()) == DataOptions()


def test_values_keep_their_types(parser):
    line = "--data recbole:a#b --domain_bins 25 --split user --split_seed 3 --labels click=rating>3"
    assert DataOptions(**parser.parse_args(line.split()).as_dict()) == DataOptions(
        data="recbole:a#b", domain_bins="25", split="user", split_seed=3, labels="click=rating>3"
    )


def test_every_option_is_explained(parser):
    text = " ".join(parser.format_help().split())
    for item in fields(DataOptions):
        assert f"--{item.name} " in text
        assert item.metadata["help"].split(";")[0].split()[-1].rstrip(".") in text
