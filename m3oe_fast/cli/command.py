"""A command's options: groups of dataclasses, read from its line, from YAML files, or from both.

Whatever is wrong with a line or a file is one line that names the option and what it takes.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser

from m3oe_fast.cli import config_file
from m3oe_fast.cli.help import HelpFormatter, epilog, metavar
from m3oe_fast.cli.words import Names, Words, explain
from m3oe_fast.errors import ConfigError

ALIASES = {
    "--epoch": "--epochs",
    "--learning_rate": "--lr",
    "--learning_rate_darts": "--fusion_lr",
    "--expert_num": "--shared_experts",
    "--dataset_path": "--data_path",
    "--model_name": "--model",
    "--save_dir": "--out",
    "--output_dir": "--out",
    "--num_train_epochs": "--epochs",
    "--gradient_accumulation_steps": "--accumulate",
    "--resume_from_checkpoint": "--resume",
    "--report_to": "--logger",
    "--save_total_limit": "--keep_last",
}
"""Names that users of the published M3oE code and of Hugging Face's Trainer type, and ours."""

INTERRUPTED = "interrupted by Ctrl-C"


@dataclass(frozen=True)
class Command:
    """What ``python -m m3oe_fast.<name>`` understands.

    Attributes:
        name: behind ``m3oe_fast.``.
        description: the head of ``--help``.
        examples: for ``--help``: what stands behind the command's name.
        groups: from the heading in ``--help`` to a dataclass whose fields were made by ``data.options.option``; each
            field is an option ``--<field>``, and no two groups share one. What ``__post_init__`` refuses, as a
            ConfigError, is refused on the line.
        aliases: from other names to ours, both with their dashes; those for options that the command lacks are left
            out.
        bare: the option, without dashes, that a word without a name in front of it stands for.
        interrupted: what exit status 130 means.
    """

    name: str
    description: str
    examples: Sequence[str]
    groups: Mapping[str, type]
    aliases: Mapping[str, str] = field(default_factory=lambda: ALIASES)
    bare: str | None = None
    interrupted: str = INTERRUPTED

    def parse(self, argv: Sequence[str], base: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
        """The options of one line: a dataclass for each group, in the groups' order.

        Args:
            argv: what stands behind the command's name.
            base: values in the place of the defaults, by option name; ``--config`` and the line win over them.

        Raises:
            ConfigError: an option, a value or a YAML file is wrong; one line says which.
            SystemExit: ``--help`` or ``--print_config`` was asked for, and printed.
        """
        words = Words.split(argv, self.names)
        parser = self._parser()
        texts = [] if base is None else [config_file.as_text(base)]
        texts += [config_file.read(path, self.names, parser.parse_string) for path in words.configs]
        try:
            # Files go first: whatever else is on the line wins over them.
            values = vars(parser.parse_args([*(f"--config={text}" for text in texts), *words.options]))
        except argparse.ArgumentError as error:
            raise ConfigError(explain(error, self.names.types)) from error
        return tuple(_take(group, values) for group in self.groups.values())

    def given(self, argv: Sequence[str], *, files: bool = True) -> dict[str, Any]:
        """The options that a line names itself, without dashes, and their values as written.

        Args:
            argv: as for ``parse``, which is to be called first: it refuses what is wrong.
            files: also those in its ``--config`` files.
        """
        words = Words.split(argv, self.names)
        named: dict[str, Any] = {}
        for path in words.configs if files else ():
            named |= config_file.load(path, self.names)
        return named | words.values()

    @cached_property
    def names(self) -> Names:
        """Every name the command understands."""
        types = {name: kind for group in self.groups.values() for name, kind in get_type_hints(group).items()}
        aliases = {theirs: ours for theirs, ours in self.aliases.items() if ours.removeprefix("--") in types}
        return Names(types, aliases, self.bare)

    def _parser(self) -> ArgumentParser:
        parser = ArgumentParser(
            prog=f"python -m m3oe_fast.{self.name}",
            description=self.description,
            usage="%(prog)s" + (f" [{self.bare.upper()}]" if self.bare else "") + " [--option value ...]",
            epilog=epilog(self.name, self.examples, self.names.aliases, self.interrupted),
            formatter_class=HelpFormatter,
            exit_on_error=False,
            default_env=False,
            allow_abbrev=False,
        )
        if self.groups:
            parser.add_argument(
                "--config",
                action=ActionConfigFile,
                metavar="FILE",
                help="A YAML file of options, name: value on each line; the rest of the line wins over it.",
            )
        for title, group in self.groups.items():
            section = parser.add_argument_group(title)
            types = get_type_hints(group)
            for item in dataclasses.fields(group):
                kind = types[item.name]
                section.add_argument(
                    f"--{item.name}",
                    type=kind,
                    default=item.default,
                    help=item.metadata["help"],
                    metavar=metavar(kind),
                )
        return parser


def _take(group: type, values: Mapping[str, Any]) -> Any:
    return group(**{item.name: values[item.name] for item in dataclasses.fields(group)})
