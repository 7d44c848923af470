"""The data options on a command's line."""

from dataclasses import fields

import pytest

from m3oe_fast import cli
from m3oe_fast.data.options import DataOptions

COMMAND = cli.Command("test", "Reads a log.", [""], {"data": DataOptions})


def test_nothing_typed_gives_the_defaults():
    assert COMMAND.parse([]) == (DataOptions(),)


def test_values_keep_their_types():
    line = "--data recbole:a#b --domain_bins 25 --split user --split_seed 3 --labels click=rating>3"
    assert COMMAND.parse(line.split()) == (
        DataOptions(data="recbole:a#b", domain_bins="25", split="user", split_seed=3, labels="click=rating>3"),
    )


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        COMMAND.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in fields(DataOptions):
        assert f"--{item.name} " in text
        assert item.metadata["help"].split(";")[0].split()[-1].rstrip(".") in text
