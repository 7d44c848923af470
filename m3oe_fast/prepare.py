"""``python -m m3oe_fast.prepare``: write a log as a prepared folder and print what it holds.

Training prepares on first use by itself; this command does it ahead, or into a folder of your own. It also fetches
public data sets from their publishers: ``--download``, and ``list`` in the place of a name shows them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from m3oe_fast import cli
from m3oe_fast.cli.transfer import TransferDisplay
from m3oe_fast.data import DataOptions, load_options
from m3oe_fast.data.catalogue import CATALOGUE, downloadable, place_in
from m3oe_fast.data.download import checksum_like, fetch
from m3oe_fast.data.loading import cache_dir
from m3oe_fast.data.options import option
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.training.console import make_console, print_table, say

LIST = "list"


@dataclass(frozen=True)
class PrepareOptions:
    """Where the log comes from, if not from ``--data_path``, and where the prepared one goes."""

    download: bool = option(
        False,
        "Fetch the data set's archive from its publisher into the cache (CACHE/raw) first. Prints licence and "
        "citation, goes on with a download that was cut off, compares size and checksum, and does nothing where the "
        "archive is there and intact. From then on --data NAME finds it by itself.",
    )
    out: str | None = option(None, "Write this folder, for --data prepared:FOLDER, instead of one in the cache.")


COMMAND = cli.Command(
    "prepare",
    """\
Reads a log, splits its rows 8:1:1, learns vocabularies and scalers from the training rows, and
writes everything as memory-mapped columns, from which training and scoring start at once. The log
may be named without --data. Parquet and CSV logs may be larger than memory.

Public data sets: the name "list" shows them with sizes and licences; --download fetches one from
its publisher; --from PATH (the same as --data_path) takes an archive or folder that you have, and
compares an archive with the publisher's checksum.""",
    examples=[
        "demo",
        LIST,
        "movielens-1m --download",
        "movielens-1m --from ml-1m.zip --split user",
        "recbole:dataset/ml-100k --domain_column age --domain_bins 25,35 \\\n"
        "      --labels 'click=rating>3,like=rating>4' --out prepared/ml-100k",
        "parquet:logs/2024 --schema schema.yaml --split temporal --out prepared/2024",
    ],
    groups={"data": DataOptions, "preparing": PrepareOptions},
    aliases=cli.ALIASES | {"--from": "--data_path"},
    bare="data",
    interrupted="interrupted by Ctrl-C (a download goes on with the same line; nothing else is written)",
)


def main(argv: list[str]) -> int:
    """Run the command with the arguments after its name; returns the exit status.

    Raises:
        ConfigError: an option is wrong.
        DataError: the log cannot be fetched or read, or the folder not written.
    """
    options, preparing = parse(argv)
    console = make_console()
    if options.data == LIST:
        _print_catalogue(console)
        return 0
    if preparing.download:
        _download(options.data, cache_dir(options), console)
    elif options.data_path is not None:
        _compare(options.data, Path(os.path.expanduser(options.data_path)))
    out = None if preparing.out is None else Path(os.path.expanduser(preparing.out)).absolute()
    dataset = load_options(options, out)
    print("\n".join(dataset.summary()))
    print(f"prepared in {dataset.folder}")
    return 0


def parse(argv: Sequence[str]) -> tuple[DataOptions, PrepareOptions]:
    """The options of one line.

    Raises:
        ConfigError: an option is unknown or its value impossible, or two of them name the log's files.
        SystemExit: ``--help`` was asked for, and printed.
    """
    data, preparing = COMMAND.parse(argv)
    named = {word.partition("=")[0] for word in argv}
    places = [name for name in ("--from", "--data_path", "--dataset_path") if name in named]
    if preparing.download and data.data_path is not None:
        places = ["--download", *(places or ["data_path"])]
    if len(places) > 1:
        raise ConfigError(f"both {places[0]} and {places[1]} say where the files come from; drop one")
    return data, preparing


def _download(name: str, cache: Path, console: Console) -> None:
    file, log = downloadable(name), CATALOGUE[name]
    place = place_in(cache, file)
    for line in (
        f"{log.title}: {log.holds}; {file.url}, {log.size}",
        f"licence   {log.terms}; see {log.page}",
        f"cite      {log.citation}",
    ):
        say(console, line)
    with TransferDisplay(console, file.name, file.size) as display:
        try:
            fetched = fetch(file, place, display.report, display.tell)
        except KeyboardInterrupt:
            display.tell(f"stopped; what came is kept in {place}.part, and the same line goes on from there")
            raise
    say(console, f"fetched   {place}, checksum as published" if fetched else f"{place} is there and intact")


def _compare(name: str, path: Path) -> None:
    """Warn where a local archive is not the publisher's one: republished ones exist, with other rows or other order."""
    file = CATALOGUE[name].file if name in CATALOGUE else None
    if file is None or not path.is_file() or not path.name.endswith("".join(Path(file.name).suffixes)):
        return
    try:
        found = checksum_like(path, file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}; check the path") from error
    if found != file.checksum:
        warnings.warn(
            f"{path} ({found}) is not the publisher's {file.name} ({file.checksum}); its rows may differ", stacklevel=2
        )


def _print_catalogue(console: Console) -> None:
    plain = not console.is_terminal
    table = Table(box=box.MARKDOWN if plain else box.SIMPLE_HEAD)
    for heading in ("name", "holds", "download", "licence"):
        table.add_column(heading, no_wrap=plain or heading == "name", overflow="fold")
    for name, log in CATALOGUE.items():
        table.add_row(name, log.holds, log.size if log.file else f"by hand: {log.page}", log.terms)
    print_table(console, table)
    say(console, "python -m m3oe_fast.prepare NAME --download fetches one; --from PATH takes the files you have")


if __name__ == "__main__":
    cli.run(main)
