"""The metrics.json of all runs as one tidy table, and each row's summary over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from m3oe_fast.comparison.plan import OURS, Outcome, Plan, Row, Run
from m3oe_fast.comparison.statistics import Spread, improvement, p_value, paired

MEAN = "mean"
METRICS = ("auc", "logloss", "calibration", "gauc")
PARTS = ("val", "test")

Outcomes = Mapping[Run, Outcome]


@dataclass(frozen=True)
class Cost:
    """What a row takes to train.

    Attributes:
        parameters: of all its models.
        multiply_adds: per row of the log, forward, own domain only, without the embedding lookup.
        epoch_seconds: of one pass over the training rows and one over the validation rows, in every model; the median
            of the runs.
        rows_per_second: training rows that go through its models, median.
        peak_bytes: largest resident memory of any run.
        backend: what computed, with its instruction set.
    """

    parameters: int
    multiply_adds: int
    epoch_seconds: float | None
    rows_per_second: float | None
    peak_bytes: int
    backend: str


@dataclass(frozen=True)
class Summary:
    """A row of the table over its seeds.

    Attributes:
        row: which.
        lr: its learning rate; None if no run could choose one.
        spent: runs that were trained for it.
        scores: test scores by (metric, pair), a value for each seed of the plan; pairs are "<domain>/<task>" and
            "mean", None is undefined or missing.
        count: seeds that have a result.
        cost: None without a result.
    """

    row: Row
    lr: float | None
    spent: int
    scores: Mapping[tuple[str, str], tuple[float | None, ...]]
    count: int
    cost: Cost | None

    def values(self, metric: str, pair: str = MEAN) -> tuple[float | None, ...]:
        """A test score by seed."""
        return self.scores[metric, pair]

    def spread(self, metric: str, pair: str = MEAN) -> Spread:
        """A test score over the seeds."""
        return Spread.of(self.values(metric, pair))


@dataclass(frozen=True)
class Against:
    """M3oE against another row, on the seeds that both have.

    Attributes:
        improvement: relative, of the mean test AUC over the seeds; None where undefined.
        p: two-sided, of a paired t-test over the seeds; None for fewer than two.
        count: seeds.
    """

    improvement: float | None
    p: float | None
    count: int


@dataclass(frozen=True)
class Results:
    """Everything that a table shows.

    Attributes:
        plan: its runs.
        outcomes: how they ended.
        pairs: "<domain>/<task>" in the log's order.
        summaries: in the table's order.
    """

    plan: Plan
    outcomes: Outcomes
    pairs: tuple[str, ...]
    summaries: tuple[Summary, ...]

    @property
    def missing(self) -> list[tuple[Run, str]]:
        """The runs that failed, and why."""
        return [(run, outcome.reason) for run, outcome in self.outcomes.items() if outcome.metrics is None]

    def against(self, summary: Summary) -> Against | None:
        """M3oE against a row; None for M3oE itself, or if the table lacks it."""
        ours = next((other for other in self.summaries if other.row == OURS), None)
        if ours is None or summary.row == OURS:
            return None
        pairs = paired(ours.values("auc"), summary.values("auc"))
        own, base = (Spread.of([pair[place] for pair in pairs]).mean for place in (0, 1))
        return Against(improvement(own, base), p_value(pairs), len(pairs))


def gather(plan: Plan, outcomes: Outcomes, domains: Sequence[str], tasks: Sequence[str]) -> Results:
    """Bring the runs of a plan together.

    Args:
        plan: the runs.
        outcomes: of all of them.
        domains, tasks: of the log, in its order.
    """
    pairs = tuple(f"{domain}/{task}" for domain in domains for task in tasks)
    return Results(plan, outcomes, pairs, tuple(_summary(plan, outcomes, row, pairs) for row in plan.rows))


def _summary(plan: Plan, outcomes: Outcomes, row: Row, pairs: Sequence[str]) -> Summary:
    runs = plan.runs_of(row, outcomes)
    by_seed = {run.seed: outcomes[run].metrics for run in runs if run in outcomes}
    scores = {
        (metric, pair): tuple(_score(by_seed.get(seed), "test", metric, pair) for seed in plan.seeds)
        for metric in METRICS
        for pair in (*pairs, MEAN)
    }
    found = [metrics for metrics in by_seed.values() if metrics is not None]
    return Summary(
        row=row,
        lr=plan.chosen_lr(row, outcomes),
        spent=sum(run.row == row for run in outcomes),
        scores=scores,
        count=len(found),
        cost=_cost(found) if found else None,
    )


def _score(metrics: Mapping[str, Any] | None, part: str, metric: str, pair: str) -> float | None:
    return None if metrics is None else (metrics[part].get(metric) or {}).get(pair)


def _cost(runs: Sequence[Mapping[str, Any]]) -> Cost:
    return Cost(
        parameters=runs[0]["model"]["parameters"],
        multiply_adds=runs[0]["model"]["multiply_adds"],
        epoch_seconds=_median(runs, _epoch_seconds),
        rows_per_second=_median(runs, lambda run: run["train"]["samples_per_second"]),
        peak_bytes=max(run["train"]["peak_rss_bytes"] for run in runs),
        backend=", ".join(dict.fromkeys(" ".join(filter(None, (run["backend"], run.get("isa")))) for run in runs)),
    )


def _median(runs: Sequence[Mapping[str, Any]], value_of: Callable[[Mapping[str, Any]], float | None]) -> float | None:
    values = [value for run in runs if (value := value_of(run)) is not None]
    return statistics.median(values) if values else None


def _epoch_seconds(metrics: Mapping[str, Any]) -> float | None:
    """Of one epoch in every model; the models of a form may have had different numbers of them."""
    train = metrics["train"]
    rate = train["samples_per_second"]
    if not rate or not train["epochs"]:
        return None
    if members := metrics.get("members"):
        return sum(member["rows"]["train"] for member in members.values()) / rate
    return train["seconds"] / train["epochs"]


def tidy(results: Results) -> pd.DataFrame:
    """A line per model, form, seed, learning rate, part, pair and metric, of every run with a result.

    ``chosen`` tells the runs whose scores the table shows from those that only tried a learning rate; an undefined
    value is empty.
    """
    lines = []
    for run, outcome in results.outcomes.items():
        if outcome.metrics is None:
            continue
        head = (run.row.model, run.row.form, run.seed, run.lr, run in results.plan.runs_of(run.row, results.outcomes))
        lines += [
            (*head, part, pair, metric, _score(outcome.metrics, part, metric, pair))
            for part in PARTS
            for metric in METRICS
            if metric in outcome.metrics[part]
            for pair in (*results.pairs, MEAN)
        ]
    columns = ["model", "form", "seed", "lr", "chosen", "part", "pair", "metric", "value"]
    return _in_order(pd.DataFrame(lines, columns=columns), results.plan)


def _in_order(frame: pd.DataFrame, plan: Plan) -> pd.DataFrame:
    """Sorted by row of the table and seed: runs end in another order each time."""
    place = {(row.model, row.form): number for number, row in enumerate(plan.rows)}
    rank = [
        (place[model, form], seed, lr)
        for model, form, seed, lr in zip(frame["model"], frame["form"], frame["seed"], frame["lr"], strict=True)
    ]
    return frame.iloc[sorted(range(len(rank)), key=rank.__getitem__)]


def wide(results: Results) -> pd.DataFrame:
    """A line per row of the table: means and standard deviations of the test scores, comparison, cost."""
    return pd.DataFrame([_wide(results, summary) for summary in results.summaries])


def _wide(results: Results, summary: Summary) -> dict[str, Any]:
    row, against, cost = summary.row, results.against(summary), summary.cost
    line: dict[str, Any] = {
        "model": row.model,
        "form": row.form,
        "in_paper": not row.extra,
        "lr": summary.lr,
        "seeds": summary.count,
        "runs": summary.spent,
    }
    for metric in ("auc", "logloss"):
        for pair in (MEAN, *results.pairs):
            spread = summary.spread(metric, pair)
            line |= {f"{metric}/{pair}": spread.mean, f"{metric}_std/{pair}": spread.std}
    return line | {
        "m3oe_improvement": against and against.improvement,
        "m3oe_p": against and against.p,
        "parameters": cost and cost.parameters,
        "multiply_adds": cost and cost.multiply_adds,
        "epoch_seconds": cost and cost.epoch_seconds,
        "rows_per_second": cost and cost.rows_per_second,
        "peak_rss_bytes": cost and cost.peak_bytes,
        "backend": cost and cost.backend,
    }
