"""What every ``python -m m3oe_fast.<command>`` shares: its line, its help, its YAML file, and how it ends.

A command declares itself as a ``Command`` and ends with ``run(main)``:

    COMMAND = Command("score", "Scores a log.", examples=["--part test"], groups={"data": DataOptions})

    def main(argv: list[str]) -> int:
        (data,) = COMMAND.parse(argv)
        ...
        return 0

    if __name__ == "__main__":
        cli.run(main)
"""

from m3oe_fast.cli.command import ALIASES, Command
from m3oe_fast.cli.exits import run

__all__ = ["ALIASES", "Command", "run"]
