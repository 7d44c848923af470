"""`python -m bench.report RESULT.json ...`: Markdown tables from result documents, no number typed
by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.gpu import table as gpu
from bench.tables import (
    ablations,
    bilevel,
    compare,
    complexity,
    epoch,
    kill,
    latency,
    loop,
    memory,
    metrics,
    models,
    reproduction,
    scaling,
    seeds,
    stream,
)
from m3oe_fast import cli
from m3oe_fast.errors import DataError

RENDERERS = {
    "ablations": ablations.render,
    "bilevel": bilevel.render,
    "compare": compare.render,
    "complexity": complexity.render,
    "epoch": epoch.render,
    "gpu": gpu.render,
    "kill": kill.render,
    "latency": latency.render,
    "loop": loop.render,
    "memory": memory.render,
    "metrics": metrics.render,
    "models": models.render,
    "reproduction": reproduction.render,
    "scaling": scaling.render,
    "seeds": seeds.render,
    "stream": stream.render,
}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", metavar="FILE", help="write here instead of printing")
    parser.add_argument("--summary", action="store_true", help="one line per measurement, as in the README")
    options = parser.parse_args(argv)
    text = "\n".join(map(summary if options.summary else render, map(read, options.results)))
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


def read(path: str) -> dict[str, Any]:
    """A result document.

    Raises:
        DataError: the file is not one.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in RENDERERS:
        raise DataError(f"{path} is no result of a benchmark: its kind is {kind!r}, not one of {', '.join(RENDERERS)}")
    return document


def render(document: dict[str, Any]) -> str:
    """One result document as Markdown."""
    return "\n".join([_conditions(document), "", *RENDERERS[document["kind"]](document)])


def summary(document: dict[str, Any]) -> str:
    """One result document of `bench.compare` as a short table: a line per measurement.

    Raises:
        DataError: another kind of document.
    """
    if document["kind"] != "compare":
        raise DataError(f"--summary is for results of bench.compare, this one is of bench.{document['kind']}")
    return "\n".join([*compare.summary(document), "", _conditions(document)])


def _conditions(document: dict[str, Any]) -> str:
    if document["kind"] == "gpu":
        return gpu.conditions(document)
    place, settings, commit = document["machine"], document["settings"], document["commit"]
    state = "no commit" if commit["hash"] is None else commit["hash"][:12]
    state += " with uncommitted changes" if commit["modified"] else ""
    allocator = "the better one for each" if settings["allocator"] == "both" else settings["allocator"]
    rounds = f" {settings['rounds']} rounds," if "rounds" in settings else ""
    return (
        f"{place['cpu']}, {place['cores']} cores ({', '.join(place['flags'])}), "
        f"{settings['threads']} threads, {', '.join(settings.get('precision', ['fp32']))}; "
        f"torch {document['versions']['torch']}, "
        f"m3oe_fast {document['versions']['m3oe_fast']} ({state}); "
        f"allocator {allocator},{rounds} {document['date'][:10]}."
    )


if __name__ == "__main__":
    cli.run(main)
