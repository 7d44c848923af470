"""The words of a command's line: which names it knows, what belongs to which, and what a parser's complaint means."""

from __future__ import annotations

import difflib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from m3oe_fast.errors import ConfigError

_ALONE = ("--help", "-h", "--print_config")


@dataclass(frozen=True)
class Names:
    """The names a command understands.

    Attributes:
        types: the type of each option, by its name without dashes.
        aliases: from other names to ours, with dashes.
        bare: the option that a word without a name stands for, without dashes.
    """

    types: Mapping[str, Any]
    aliases: Mapping[str, str]
    bare: str | None = None

    def ours(self, name: str, *, dashes: bool = True) -> str:
        """Our name for ``name``.

        Args:
            name: as typed, with its dashes, or as in a file, without.
            dashes: which of the two; also the form of the result.

        Raises:
            ConfigError: there is no such option; the message says which might be meant.
        """
        prefix = "--" if dashes else ""
        aliases = {prefix + theirs[2:]: prefix + ours[2:] for theirs, ours in self.aliases.items()}
        shared = ("config", "print_config", "help") if self.types else ("help",)
        known = {prefix + option: prefix + option for option in (*self.types, *shared)}
        known |= aliases
        if name in known:
            return known[name]
        if dashes and name in _ALONE:
            return name
        begins = [other for other in known if other.startswith(name)] if len(name) > len(prefix) else []
        close = begins or difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {known[close[0]]}?" if close else "see --help"
        raise ConfigError(f"unknown option {name}; {hint}")


@dataclass(frozen=True)
class Words:
    """A line taken apart.

    Attributes:
        configs: the files named by --config, in their order.
        options: the rest, one word each, by our names: ``--name=value``, or --help and --print_config.
    """

    configs: tuple[str, ...]
    options: tuple[str, ...]

    @classmethod
    def split(cls, argv: Sequence[str], names: Names) -> Words:
        """Take a line apart.

        Raises:
            ConfigError: a name is unknown, a value is missing, or a word belongs to no option.
        """
        left = deque(argv)
        configs: list[str] = []
        options: list[str] = []
        bare: list[str] = []
        while left:
            word = left.popleft()
            if not word.startswith("-"):
                bare.append(word)
                options.append(f"--{names.bare}={word}")
                continue
            name, equals, value = word.partition("=")
            name = names.ours(name)
            if name in _ALONE:
                options.append(name + equals + value)
                continue
            if not equals:
                value = _value_of(name, left, names)
            if name == "--config":
                configs.append(value)
            else:
                options.append(f"{name}={value}")
        _check_bare(bare, options, names)
        return cls(tuple(configs), tuple(options))

    def values(self) -> dict[str, str]:
        """The options and their values as written, by name without dashes; the last of several counts."""
        pairs = (word.removeprefix("--").partition("=") for word in self.options if word.split("=")[0] not in _ALONE)
        return {name: value for name, _, value in pairs}


def _check_bare(words: Sequence[str], options: Sequence[str], names: Names) -> None:
    """Words without a name mean one thing, at most once."""
    if not words:
        return
    if names.bare is None:
        raise ConfigError(f"{words[0]!r} belongs to no option; write --name value, see --help")
    values = [option.partition("=")[2] for option in options if option.startswith(f"--{names.bare}=")]
    for value in values:
        if value != values[0]:
            raise ConfigError(f"both {values[0]} and {value} stand for --{names.bare}; drop one")


def _value_of(name: str, left: deque[str], names: Names) -> str:
    """The value behind an option, taken from what is left of the line; a switch without one is switched on."""
    is_switch = name != "--config" and names.types[name[2:]] is bool
    follows = bool(left) and not left[0].startswith("--")
    if is_switch and not (follows and (names.bare is None or left[0].lower() in ("true", "false"))):
        return "true"
    if follows:
        return left.popleft()
    takes = "the path of a YAML file" if name == "--config" else expected(names.types[name[2:]])
    raise ConfigError(f"{name} must be followed by {takes}")


def explain(error: Exception, types: Mapping[str, Any]) -> str:
    """A parser's complaint as one line that says what the option takes."""
    message = one_line(error)
    named = re.match(r'Parser key "(\w+)":', message)
    value = re.search(r"[Vv]alue: (.*)$", message)
    if not named or not value or named[1] not in types:
        return message
    return f"--{named[1]} must be {expected(types[named[1]])}, got {value[1]}"


def expected(kind: Any) -> str:
    """What an option of type ``kind`` takes, in words."""
    kinds = set(get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind])
    for single in kinds:
        if get_origin(single) is Literal:
            return "one of " + ", ".join(get_args(single))
    if list[int] in kinds:
        return "a whole number or a list of them"
    for single, words in ((float, "a number"), (int, "a whole number"), (bool, "true or false")):
        if single in kinds and str not in kinds:
            return words
    return "text (in a YAML file, put it in quotes)"


def one_line(error: Exception) -> str:
    """A message without its line breaks."""
    return re.sub(r"\s+", " ", str(error)).strip()
