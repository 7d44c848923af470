"""What --help looks like: plain words, a default for every option, examples, other names, exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

HELP_COLUMN = 28
"""Where the texts begin; a longer option has its text on the next line."""


class HelpFormatter(DefaultHelpFormatter):
    """Keeps the line breaks of description and epilog, and leaves Python types out of the help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"max_help_position": HELP_COLUMN})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._HelpAction):
            return "Show this text."
        if "--print_config" in action.option_strings:
            return "Print all options as they are now, ready for --config, and do nothing else."
        unset = (None, "", argparse.SUPPRESS)
        shown = action.default not in unset and "default:" not in action.help
        default = str(action.default).lower() if isinstance(action.default, bool) else "%(default)s"
        return f"{action.help} (default: {default})" if shown else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if "--print_config" in action.option_strings:
            return "--print_config"
        # jsonargparse also offers --name+ for lists; nobody needs to read of it.
        spelled = super()._format_action_invocation(action)
        return spelled if "+" not in spelled else spelled.split(", --")[0]


def metavar(kind: Any) -> str:
    """What stands behind the name of an option of type ``kind``."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(get_args(kind)) + "}"
    if kind is bool:
        return "{true,false}"
    kinds = get_args(kind) or (kind,)
    if str in kinds:
        return "TEXT"
    return "NUMBER" if float in kinds else "N"


def epilog(name: str, examples: Sequence[str], aliases: Mapping[str, str], interrupted: str) -> str:
    """The end of ``--help``: examples, names that work as well, exit codes.

    Args:
        name: the command.
        examples: what stands behind it; several lines are one example.
        aliases: from other names to ours, with dashes.
        interrupted: what exit status 130 means.
    """
    lines = ["examples:", *(f"  python -m m3oe_fast.{name} {example}".rstrip() for example in examples)]
    if aliases:
        width = max(map(len, aliases))
        lines += ["", "names of the published code and of Hugging Face's Trainer work as well, here and in YAML:"]
        lines += [f"  {theirs:<{width}} = {ours}" for theirs, ours in aliases.items()]
    lines += ["", f"exit status: 0 done, 2 wrong input, 130 {interrupted}"]
    return "\n".join(lines)
