"""``python -m m3oe_fast``: the commands, one line each."""

from __future__ import annotations

from m3oe_fast import cli
from m3oe_fast.errors import ConfigError

COMMANDS = {
    "train": "train a model on a log and write a run folder; without options on a generated demo log",
    "evaluate": "AUC, logloss and more of a saved model per domain and task",
    "predict": "score raw rows in Parquet or CSV files with a saved model",
    "tune": "search the options with the best validation AUC",
    "report": "figures and text about a run",
    "table": "train every model over several seeds and write the comparison",
    "prepare": "fetch a public data set; write a log as memory-mapped columns ahead of training",
    "info": "what is installed, which backends run here, and why others do not",
}


def main(argv: list[str]) -> int:
    """List the commands; returns the exit status."""
    if argv and argv[0] in COMMANDS:
        rest = "".join(f" {word}" for word in argv[1:])
        raise ConfigError(f"a dot goes before the command: python -m m3oe_fast.{argv[0]}{rest}")
    if argv and argv != ["--help"] and argv != ["-h"]:
        raise ConfigError(f"there is no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}")
    width = max(map(len, COMMANDS))
    for name, does in COMMANDS.items():
        print(f"python -m m3oe_fast.{name:<{width}}  {does}")
    print("Each explains its options with --help.")
    return 0


if __name__ == "__main__":
    cli.run(main)
