"""``python -m m3oe_fast.prepare``: write a log as a prepared folder and print what it holds.

Training prepares on first use by itself; this command does it ahead, or into a folder of your own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path

from jsonargparse import ArgumentParser

from m3oe_fast import cli
from m3oe_fast.data import DataOptions, load_options
from m3oe_fast.data.options import add_arguments
from m3oe_fast.errors import ConfigError

DESCRIPTION = """\
Reads a log, splits its rows 8:1:1, learns vocabularies and scalers from the training rows, and
writes everything as memory-mapped columns, from which training and scoring start at once."""

EPILOG = """\
examples:
  python -m m3oe_fast.prepare demo
  python -m m3oe_fast.prepare movielens-1m --data_path ml-1m.zip --split user
  python -m m3oe_fast.prepare recbole:dataset/ml-100k --domain_column age --domain_bins 25,35 \\
      --labels 'click=rating>3,like=rating>4' --out prepared/ml-100k
  python -m m3oe_fast.train --data prepared:prepared/ml-100k

exit status: 0 done, 2 wrong input, 130 interrupted by Ctrl-C
"""


def main(argv: list[str]) -> int:
    """Run the command with the arguments after its name; returns the exit status.

    Raises:
        ConfigError: an option is wrong.
        DataError: the log cannot be read or the folder not written.
    """
    options, out = parse(argv)
    dataset = load_options(options, out)
    print("\n".join(dataset.summary()))
    print(f"prepared in {dataset.folder}")
    return 0


def parse(argv: list[str]) -> tuple[DataOptions, Path | None]:
    """The data options and the folder named by ``--out``.

    Raises:
        ConfigError: an option is unknown or its value impossible.
        SystemExit: ``--help`` was asked for, and printed.
    """
    try:
        values = vars(_make_parser().parse_args(argv))
    except argparse.ArgumentError as error:
        message = re.sub(r'Parser key "(\w+)"', r"--\1", " ".join(str(error).split()))
        raise ConfigError(f"{message}; see --help") from error
    name, out = values["name"], values["out"]
    options = DataOptions(**{f.name: values[f.name] for f in dataclasses.fields(DataOptions)})
    if name is not None:
        if options.data not in (DataOptions.data, name):
            raise ConfigError(f"both {name} and --data {options.data} name the log; drop one")
        options = dataclasses.replace(options, data=name)
    return options, None if out is None else Path(os.path.expanduser(out)).absolute()


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m m3oe_fast.prepare",
        usage="%(prog)s [NAME] [--option value ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="The log, in place of --data.")
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="Write this folder, for --data prepared:FOLDER, instead of one in the cache.",
    )
    add_arguments(parser, DataOptions, "data")
    return parser


if __name__ == "__main__":
    cli.run(main)
