"""The YAML file behind --config: ``name: value`` on each line, by our names or their aliases."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, get_args

import yaml

from m3oe_fast.cli.words import Names, explain, one_line
from m3oe_fast.errors import ConfigError


def read(path: str, names: Names, check: Callable[[str], object]) -> str:
    """The options in a file, by our names, as YAML; checked on their own first, so that an error names the file.

    Args:
        path: the file.
        names: what may stand in it.
        check: raises argparse.ArgumentError for YAML with a wrong value.

    Raises:
        ConfigError: the file cannot be read, a name is unknown or there twice, or a value is wrong.
    """
    text = as_text(load(path, names))
    try:
        check(text)
    except argparse.ArgumentError as error:
        raise ConfigError(f"config file {path}: {explain(error, names.types)}") from error
    return text


def load(path: str, names: Names) -> dict[str, Any]:
    """The options in a file, by our names; values are as YAML has them, not yet checked.

    Raises:
        ConfigError: as ``read``, but for wrong values.
    """
    try:
        content = load_mapping(path)
        renamed: dict[str, Any] = {}
        for name, value in content.items():
            ours = names.ours(str(name), dashes=False)
            if ours not in names.types:
                raise ConfigError(f"{ours} works on the line only")
            if ours in renamed:
                raise ConfigError(f"{ours} is there twice, once by another name; drop one")
            renamed[ours] = _word(value, names.types[ours])
        return renamed
    except ConfigError as error:
        raise ConfigError(f"config file {path}: {error}") from error


def load_mapping(path: str) -> dict[Any, Any]:
    """The content of a YAML file that maps names to values.

    Raises:
        ConfigError: it cannot be read or is no such file; the message leaves its name to the caller.
    """
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a day such as 2020-13-45
        raise ConfigError(one_line(error)) from error
    if not isinstance(content, dict):
        raise ConfigError("it holds no options; write name: value on each line")
    return content


def as_text(values: Mapping[str, Any]) -> str:
    """Options as YAML, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _word(value: Any, kind: Any) -> Any:
    """``value``, or the word behind it where YAML took a bare on or off for true or false."""
    if isinstance(value, bool) and {"on", "off"} & set(get_args(kind)):
        return "on" if value else "off"
    return value
