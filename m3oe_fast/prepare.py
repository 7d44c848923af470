"""``python -m m3oe_fast.prepare``: write a log as a prepared folder and print what it holds.

Training prepares on first use by itself; this command does it ahead, or into a folder of your own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from m3oe_fast import cli
from m3oe_fast.data import DataOptions, load_options
from m3oe_fast.data.options import option


@dataclass(frozen=True)
class OutOptions:
    """Where the prepared log goes."""

    out: str | None = option(None, "Write this folder, for --data prepared:FOLDER, instead of one in the cache.")


COMMAND = cli.Command(
    "prepare",
    """\
Reads a log, splits its rows 8:1:1, learns vocabularies and scalers from the training rows, and
writes everything as memory-mapped columns, from which training and scoring start at once. The log
may be named without --data. Parquet and CSV logs may be larger than memory.""",
    examples=[
        "demo",
        "movielens-1m --data_path ml-1m.zip --split user",
        "recbole:dataset/ml-100k --domain_column age --domain_bins 25,35 \\\n"
        "      --labels 'click=rating>3,like=rating>4' --out prepared/ml-100k",
        "parquet:logs/2024 --schema schema.yaml --split temporal --out prepared/2024",
    ],
    groups={"data": DataOptions, "output": OutOptions},
    bare="data",
    interrupted="interrupted by Ctrl-C (nothing is written)",
)


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


def parse(argv: Sequence[str]) -> tuple[DataOptions, Path | None]:
    """The data options and the folder named by ``--out``.

    Raises:
        ConfigError: an option is unknown or its value impossible.
        SystemExit: ``--help`` was asked for, and printed.
    """
    data, output = COMMAND.parse(argv)
    return data, None if output.out is None else Path(os.path.expanduser(output.out)).absolute()


if __name__ == "__main__":
    cli.run(main)
