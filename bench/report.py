"""`python -m bench.report RESULT.json ...`: Markdown tables from result documents, no number typed
by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from m3oe_fast import cli

TITLES = {
    "forward": "Forward (from ids)",
    "network": "Forward (from x, kernels alone)",
    "train": "Forward + backward",
    "step": "Training step (forward + backward + Adam)",
}


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", metavar="FILE", help="write here instead of printing")
    parser.add_argument("--summary", action="store_true", help="one line per measurement, as in the README")
    options = parser.parse_args(argv)
    documents = [json.loads(Path(path).read_text(encoding="utf-8")) for path in options.results]
    text = "\n".join(map(summary if options.summary else render, documents))
    if options.out:
        Path(options.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    return 0


def render(document: dict[str, Any]) -> str:
    """One result document as Markdown."""
    body = {"compare": _compare, "epoch": _epoch}[document["kind"]](document)
    return "\n".join([_conditions(document), "", *body])


def summary(document: dict[str, Any]) -> str:
    """One result document of `bench.compare` as a short table: a line per measurement."""
    opponents = [row["name"] for row in document["measurements"][0]["contenders"] if not row["own"]]
    rows = []
    for measured in document["measurements"]:
        by_name = {row["name"]: row for row in measured["contenders"]}
        own = next(row for row in measured["contenders"] if row["own"])
        share = "-" if own["share_of_peak"] is None else f"{100 * own['share_of_peak']:.0f} %"
        rows.append(
            [
                f"{TITLES[measured['what']]}, B = {measured['batch']:,}",
                f"{own['rows_per_second'] / 1e3:.0f}",
                share,
                *(f"{by_name[name]['speedup_of_own']:.1f}x" for name in opponents),
            ]
        )
    head = ["", "k rows/s", "of FMA peak", *(f"vs {name}" for name in opponents)]
    return "\n".join([*table(head, rows), "", _conditions(document)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, padded so that it reads as plain text too; every column but the first is
    right-aligned.
    """
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [line(head), line(rule), *map(line, rows)]


def _conditions(document: dict[str, Any]) -> str:
    place, settings, commit = document["machine"], document["settings"], document["commit"]
    state = "no commit" if commit["hash"] is None else commit["hash"][:12]
    state += " with uncommitted changes" if commit["modified"] else ""
    return (
        f"{place['cpu']}, {place['cores']} cores ({', '.join(place['flags'])}), "
        f"{settings['threads']} threads, fp32; torch {document['versions']['torch']}, "
        f"m3oe_fast {document['versions']['m3oe_fast']} ({state}); "
        f"allocator {settings['allocator']}, {settings['rounds']} rounds, {document['date'][:10]}."
    )


def _compare(document: dict[str, Any]) -> list[str]:
    lines = []
    for measured in document["measurements"]:
        peak = measured["fma_peak_gflops"]
        roof = "FMA peak not measured" if peak is None else f"FMA peak {peak:.0f} GFLOP/s"
        if any((row["share_of_peak"] or 0) > 1 for row in measured["contenders"]):
            roof += ", but the rounds beat it: other load disturbed this run"
        rows = [
            [
                row["name"],
                _ms(row["seconds"]["median"]),
                f"{_ms(row['seconds']['q1'])}-{_ms(row['seconds']['q3'])}",
                _ms(row["cpu_seconds"]),
                f"{row['rows_per_second'] / 1e3:.0f}",
                "-" if row["share_of_peak"] is None else f"{100 * row['share_of_peak']:.0f} %",
                f"{row['minor_faults']:.0f}",
                "" if row["own"] else f"{row['speedup_of_own']:.2f}x",
            ]
            for row in measured["contenders"]
        ]
        head = [
            "contender",
            "ms",
            "quartiles",
            "CPU ms",
            "k rows/s",
            "of peak",
            "faults",
            "m3oe_fast is faster by",
        ]
        lines += [
            f"**{TITLES[measured['what']]}, B = {measured['batch']:,}** ({roof})",
            "",
            *table(head, rows),
            "",
        ]
    return lines


def _epoch(document: dict[str, Any]) -> list[str]:
    head = [
        "backend",
        "fit s",
        "quartiles",
        "CPU s",
        "epoch s",
        "k rows/s",
        "mean test AUC",
        "epochs",
        "best epoch",
    ]
    rows = [
        [
            row["backend"],
            f"{row['fit_seconds']['median']:.3f}",
            f"{row['fit_seconds']['q1']:.3f}-{row['fit_seconds']['q3']:.3f}",
            f"{row['cpu_seconds']:.3f}",
            f"{row['epoch_seconds']['median']:.3f}",
            f"{document['rows']['train'] / row['epoch_seconds']['median'] / 1e3:.0f}",
            _auc(row["accuracy"]["test_auc"]["mean"]),
            f"{row['accuracy']['epochs']}",
            f"{row['accuracy']['best_epoch']}",
        ]
        for row in document["backends"]
    ]
    pairs = [name for name in document["backends"][0]["accuracy"]["test_auc"] if name != "mean"]
    by_pair = [[p, *(_auc(row["accuracy"]["test_auc"][p]) for row in document["backends"])] for p in pairs]
    difference = document["auc_difference"]
    return [
        f"**{document['data']}, split {document['settings']['split']}: one epoch end to end, data prepared before**",
        "",
        *table(head, rows),
        "",
        f"Speed-up of {document['own']}: {document['speedup']['fit']:.2f}x (fit: one epoch with "
        "validation, then validation and test of the best weights), "
        f"{document['speedup']['epoch']:.2f}x (the epoch with its validation). "
        f"Mean test AUC differs by {'-' if difference is None else f'{difference:+.5f}'}.",
        "",
        *table(["test AUC", *(row["backend"] for row in document["backends"])], by_pair),
        "",
    ]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _auc(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"


if __name__ == "__main__":
    cli.run(main)
