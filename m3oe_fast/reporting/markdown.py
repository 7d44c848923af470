"""report.md: what was trained on what, the scores of every pair, the figures and what they show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m3oe_fast.metrics import NO_MIXED_USER, NOT_FINITE
from m3oe_fast.reporting.counts import Count
from m3oe_fast.reporting.record import RunRecord
from m3oe_fast.reporting.style import Drawn, Pair

MOST_PAIRS = 60
"""Rows of the table of scores; metrics.json has all."""
MOST_REASONS = 30
NONE = "-"

Counts = Mapping[str, Mapping[Pair, Count]]
"""By part, "val" and "test"; {} where the rows could not be read."""

_METRICS = {"auc": "AUC", "logloss": "logloss", "calibration": "calibration", "gauc": "GAUC"}
_MEANING = {
    "auc": "AUC: share of (positive, negative) pairs of rows in the right order.",
    "logloss": "logloss: mean binary cross-entropy in nats.",
    "calibration": "calibration: predicted by observed positives; above 1 the model promises too much.",
    "gauc": "GAUC: mean of the users' own AUCs, weighted by their rows.",
}
_PARTS = ("val", "test")


def report(run: RunRecord, drawn: Sequence[Drawn], counts: Counts, notes: Sequence[str], weights: str) -> str:
    """The text of report.md.

    Args:
        run: the run.
        drawn: the figures, written as report/<name>.png where there is one.
        counts: labelled rows by part and pair.
        notes: one line for each thing that is missing, and why.
        weights: which weights gates, calibration and embeddings are of, in words.
    """
    lines = [f"# Run {escaped(run.root.resolve().name)}", "", _summary(run), "", "## The run", ""]
    lines += table(("", ""), _facts(run), "ll")
    lines += ["", "## Scores", "", *_scores(run, counts)]
    if reasons := _undefined(run, counts):
        lines += ["", "Undefined values (`-` above), which the means leave out:", ""]
        lines += [f"- {escaped(reason)}" for reason in reasons[:MOST_REASONS]]
        if len(reasons) > MOST_REASONS:
            lines.append(f"- and {len(reasons) - MOST_REASONS} more")
    lines += ["", "## Figures", "", f"Gates, calibration and embeddings are those of {escaped(weights)}."]
    for one in drawn:
        lines += ["", f"### {one.title}", ""]
        if one.figure is None:
            lines.append(f"No figure: {escaped(one.caption)}.")
        else:
            lines += [f"![{one.title}](report/{one.name}.png)", "", escaped(one.caption)]
    if notes:
        lines += ["", "## What is missing", "", *(f"- {escaped(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _summary(run: RunRecord) -> str:
    done, planned = len(run.epochs), run.config.get("epochs")
    if not done:
        return "No epoch was finished."
    auc = run.score("test", "auc", None)
    what = f"The weights are those of epoch {run.best_epoch}"
    what += f"; their mean test AUC is {auc:.4f}." if auc is not None else "."
    if not run.ended:
        return f"The run has not ended: {done} epochs so far. `--resume last` goes on with it. {what}"
    if isinstance(planned, int) and done < planned:
        return f"The run ended after {done} of at most {planned} epochs: stopped early, or interrupted. {what}"
    return f"The run has ended after {done} {'epoch' if done == 1 else 'epochs'}. {what}"


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    metrics, config = run.metrics or {}, run.config
    data, model, train = (metrics.get(name) or {} for name in ("data", "model", "train"))
    rows = data.get("rows") or {}
    seconds = train.get("seconds")
    if seconds is None and run.epochs:
        seconds = float(np.nansum(run.column("seconds")))
    facts = [
        ("data", data.get("name") or config.get("data")),
        ("split", data.get("split") or config.get("split")),
        ("split seed", config.get("split_seed")),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in rows.items()) or None),
        ("domains", _names(run.domains)),
        ("tasks", _names(run.tasks)),
        ("model", model.get("name") or config.get("model")),
        ("parameters", f"{model['parameters']:,}" if isinstance(model.get("parameters"), int) else None),
        ("backend", metrics.get("backend") or config.get("backend")),
        ("instruction set", metrics.get("isa")),
        ("precision", metrics.get("precision") or config.get("precision")),
        ("epochs", f"{len(run.epochs)} of at most {config.get('epochs', '?')}, best {run.best_epoch or NONE}"),
        ("batch size, learning rate, seed", ", ".join(str(config.get(k, NONE)) for k in ("batch_size", "lr", "seed"))),
        ("fusion weights", config.get("bilevel")),
        ("training time", None if seconds is None else _time(seconds)),
        ("rows per second", _thousands(train.get("samples_per_second"))),
        ("peak memory", _gigabytes(train.get("peak_rss_bytes"))),
    ]
    return [(name, escaped(str(value))) for name, value in facts if value not in (None, "")]


def _scores(run: RunRecord, counts: Counts) -> list[str]:
    """The table per pair, with means and each task over all domains, and what its columns are."""
    shown = [metric for metric in _METRICS if any(_has(run, part, metric) for part in _PARTS)]
    if not shown:
        return ["There are none yet."]
    test = counts.get("test") or {}
    columns = [(part, metric) for metric in shown for part in _PARTS]
    head = ["domain", "task", *(("test rows", "positive") if test else ())]
    head += [f"{part} {_METRICS[metric]}" for part, metric in columns]
    pairs = list(run.pairs)
    if test:
        kept = set(sorted(pairs, key=lambda pair: -test[pair].rows)[:MOST_PAIRS])
        pairs = [pair for pair in pairs if pair in kept]
    rows = []
    for pair in pairs[:MOST_PAIRS]:
        cells = [escaped(pair.domain), escaped(pair.task)]
        if test:
            share = f"{test[pair].positives / test[pair].rows:.1%}" if test[pair].rows else NONE
            cells += [f"{test[pair].rows:,}", share]
        rows.append([*cells, *(_number(run.score(part, metric, pair)) for part, metric in columns)])
    blank = ["", ""] if test else []
    for task in run.tasks if len(run.domains) > 1 else ():
        values = [run.overall(part, metric, task) for part, metric in columns]
        if any(value is not None for value in values):
            rows.append(["*all rows*", escaped(task), *blank, *map(_number, values)])
    means = (_number(run.score(part, metric, None)) for part, metric in columns)
    rows.append(["**mean of pairs**", "", *blank, *means])
    lines = table(head, rows, "ll" + "r" * (len(head) - 2))
    if len(run.pairs) > MOST_PAIRS:
        which = "with most test rows" if test else "that come first"
        lines += ["", f"{MOST_PAIRS} of {len(run.pairs)} pairs, those {which}; metrics.json and the means hold all."]
    return [*lines, "", " ".join(_MEANING[metric] for metric in shown)]


def _has(run: RunRecord, part: str, metric: str) -> bool:
    return any(run.score(part, metric, pair) is not None for pair in run.pairs)


def _undefined(run: RunRecord, counts: Counts) -> list[str]:
    """A line for each score that is null, with the reason as far as it can be told."""
    if not run.ended:
        return []
    lines = []
    for part in _PARTS:
        for metric, title in _METRICS.items():
            # A log without users has no GAUC at all, and an old run neither it nor calibration.
            if metric in ("auc", "logloss") or _has(run, part, metric):
                missing = [pair for pair in run.pairs if run.score(part, metric, pair) is None]
                lines += [f"{part} {title} of {p.key}: {_reason(run, counts, part, metric, p)}" for p in missing]
    return lines


def _reason(run: RunRecord, counts: Counts, part: str, metric: str, pair: Pair) -> str:
    if not run.best_epoch:
        return "no epoch was finished"
    found = (counts.get(part) or {}).get(pair)
    if found is None:
        return "the rows, which could tell why, were not read"
    reason = found.lacking or (NO_MIXED_USER if metric == "gauc" else NOT_FINITE)
    return f"{reason} ({found.rows:,} labelled rows)"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """The lines of a table.

    Args:
        head, rows: cells, escaped.
        align: "l" or "r" for each column.
    """
    rule = ["---:" if side == "r" else "---" for side in align]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def escaped(text: str) -> str:
    """A text as Markdown shows it, signs and all, on one line."""
    line = re.sub(r"[\s\x00-\x1f\x7f]+", " ", text).strip()
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line)


def _names(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _thousands(value: Any) -> str | None:
    return f"{value:,.0f}" if isinstance(value, int | float) else None


def _gigabytes(value: Any) -> str | None:
    return f"{value / 2**30:.2f} GiB" if isinstance(value, int | float) else None


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
