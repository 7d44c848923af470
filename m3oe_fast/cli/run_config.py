"""The options that a run was trained with, from the config.yaml in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from m3oe_fast.cli import config_file
from m3oe_fast.cli.command import Command
from m3oe_fast.data.options import DataOptions
from m3oe_fast.errors import ConfigError
from m3oe_fast.training.run_folder import RunFolder, root_of


def options_of_run(checkpoint: str) -> dict[str, Any] | None:
    """The options of the run that ``checkpoint`` (a run folder, a checkpoint folder or a file) belongs to, by name.

    Returns:
        None if it lies in no run folder, or in one without a config.yaml.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    root = root_of(checkpoint)
    if root is None or not (file := RunFolder(root).config).is_file():
        return None
    try:
        return {str(name): value for name, value in config_file.load_mapping(str(file)).items()}
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def parse_with_data_of(run: Mapping[str, Any], command: Command, argv: Sequence[str]) -> tuple[Any, ...]:
    """As ``command.parse``, with the data options of a run where the line leaves them out.

    Where the line names a log of another kind (``recbole:`` where the run's was ``csv:``), the run's options are about
    something else, and none of them is used.

    Raises:
        ConfigError: as ``command.parse``.
    """
    named = command.given(argv).get("data")
    if named is not None and _kind(named) != _kind(run.get("data")):
        return command.parse(argv)
    return command.parse(argv, {field.name: run[field.name] for field in fields(DataOptions) if field.name in run})


def _kind(log: object) -> str:
    return str(log).partition(":")[0]
