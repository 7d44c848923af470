"""table.md: the protocol, the scores of every row, what they cost, and what is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from m3oe_fast.comparison.results import MEAN, Results, Summary
from m3oe_fast.comparison.statistics import Spread
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.reporting.markdown import NONE, escaped, table

MOST_PAIRS = 12
"""Columns of pairs; the files have all."""


def text(results: Results, data: Dataset, protocol: Mapping[str, str], figure: str) -> str:
    """The text of table.md.

    Args:
        results: all runs.
        data: the log.
        protocol: what all runs share, in words, by its label.
        figure: name of the figure's file beside it.
    """
    lines = [f"# Comparison on {escaped(data.name)}", "", "## Protocol", ""]
    lines += table(("", ""), [(label, escaped(value)) for label, value in protocol.items()], "ll")
    lines += ["", *_counts(data), "", "## Test AUC x 100", "", *_scores(results), "", *_notes(results)]
    lines += ["", f"![Mean test AUC of every row]({figure})"]
    lines += ["", "## Cost", "", *_costs(results)]
    if results.missing:
        lines += ["", "## Missing", ""]
        lines += [f"- {escaped(run.label)}: {escaped(reason)}" for run, reason in results.missing]
    return "\n".join(lines) + "\n"


def _counts(data: Dataset) -> list[str]:
    rows = [
        (part, f"{count['rows']:,}", *(NONE if count[name] is None else f"{count[name]:,}" for name in _USERS))
        for part, count in data.counts.items()
    ]
    return table(("part", "rows", "users", "users not in train"), rows, "lrrr")


_USERS = ("users", "new_users")


def _scores(results: Results) -> list[str]:
    pairs = results.pairs if len(results.pairs) <= MOST_PAIRS else ()
    columns = [("auc", pair) for pair in (*pairs, MEAN)] + [("logloss", MEAN)]
    marks = [_marks(results.summaries, *column) for column in columns]
    head = ["model", "form", *map(escaped, pairs), "mean AUC", "logloss x 100", "seeds", "M3oE is better by", "p"]
    rows = []
    for summary in results.summaries:
        cells = [_title(summary), summary.row.form]
        for column, mark in zip(columns, marks, strict=True):
            cells.append(mark(summary, _cell(summary.spread(*column), summary.count)))
        against = results.against(summary)
        cells.append(f"{summary.count}/{len(results.plan.seeds)}")
        cells.append(NONE if against is None or against.improvement is None else f"{against.improvement:+.2%}")
        cells.append(NONE if against is None or against.p is None else _p(against.p))
        rows.append(cells)
    return table(head, rows, "ll" + "r" * (len(head) - 2))


def _title(summary: Summary) -> str:
    return summary.row.title + (" †" if summary.row.extra else "")


def _cell(spread: Spread, count: int) -> str:
    """A score in hundredths; says of how many seeds where it is not defined for all that have a result."""
    if spread.mean is None:
        return NONE
    std = "" if spread.std is None else f" ± {100 * spread.std:.2f}"
    return f"{100 * spread.mean:.2f}{std}" + ("" if spread.count == count else f" ({spread.count})")


def _marks(summaries: Sequence[Summary], metric: str, pair: str) -> Callable[[Summary, str], str]:
    """Makes the best of a column bold and the second italic."""
    means = {summary.row: summary.spread(metric, pair).mean for summary in summaries}
    distinct = sorted({mean for mean in means.values() if mean is not None}, reverse=metric == "auc")
    signs = dict(zip(distinct, ("**", "*"), strict=False))

    def mark(summary: Summary, cell: str) -> str:
        sign = signs.get(means[summary.row], "")
        return f"{sign}{cell}{sign}"

    return mark


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _notes(results: Results) -> list[str]:
    seeds = len(results.plan.seeds)
    notes = [
        "Best of a column **bold**, second *italic*; the weights are those of the epoch with the best validation AUC."
    ]
    if seeds > 1:
        notes.append(
            "± is the sample standard deviation over training seeds; the split is the same for all, so it says nothing "
            "of other splits."
        )
    notes.append("M3oE is better by (AUC - 0.5) / (AUC of the row - 0.5) - 1, mean AUCs of the seeds that both have.")
    notes.append(
        "p is two-sided, from a paired t-test of the mean AUCs over these seeds, not corrected for the number of rows."
        if seeds > 1
        else "There is no p: a paired t-test needs two seeds or more."
    )
    if any(value is None for summary in results.summaries for value in _of_finished(results, summary)):
        notes.append(f"{NONE} is undefined or missing; (n) means that n of the row's seeds have the value.")
    if any(summary.row.extra for summary in results.summaries):
        notes.append("† is no row of the paper's table.")
    if len(results.pairs) > MOST_PAIRS:
        notes.append(f"The {len(results.pairs)} pairs of domain and task are in summary.csv.")
    return [" ".join(notes)]


def _of_finished(results: Results, summary: Summary) -> list[float | None]:
    return [summary.spread("auc", pair).mean for pair in results.pairs]


def _costs(results: Results) -> list[str]:
    head = ["model", "form", "lr", "runs", "parameters", "multiply-adds", "s/epoch", "rows/s", "peak memory", "backend"]
    rows = []
    for summary in results.summaries:
        cells = [_title(summary), summary.row.form, NONE if summary.lr is None else f"{summary.lr:g}"]
        cells.append(str(summary.spent))
        cost = summary.cost
        if cost is None:
            rows.append([*cells, *[NONE] * 6])
            continue
        cells += [f"{cost.parameters:,}", f"{cost.multiply_adds:,}"]
        cells.append(NONE if cost.epoch_seconds is None else f"{cost.epoch_seconds:.2f}")
        cells.append(NONE if cost.rows_per_second is None else f"{cost.rows_per_second:,.0f}")
        rows.append([*cells, f"{cost.peak_bytes / 2**20:,.0f} MiB", escaped(cost.backend)])
    lines = table(head, rows, "llrrrrrrrl")
    return [
        *lines,
        "",
        "runs: trained for the row, those that only tried a learning rate included. multiply-adds: per row of the log, "
        "forward, without the lookup of embeddings. s/epoch: a pass over the training and the validation rows in every "
        "model of the form, which go over a row as often as it has a model for it. Times are medians over the seeds, "
        "peak memory the largest.",
    ]
