"""What the files of a run folder say, as far as they are there; a missing or damaged one is noted, never fatal."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from m3oe_fast.errors import ConfigError
from m3oe_fast.reporting.style import Pair
from m3oe_fast.training.run_folder import RunFolder

FUSION, SEESAW = "fusion.csv", "seesaw.json"
_FUSION_STEMS = ("alpha_domain", "alpha_task", "beta_domain", "beta_task")


@dataclass(frozen=True)
class RunRecord:
    """One run, read once.

    Attributes:
        root: the run folder.
        config: config.yaml, {} if missing.
        metrics: metrics.json, None while the run has not ended.
        epochs: metrics.csv, a dict per finished epoch; a cell that is empty or no number is NaN.
        fusion_rows: fusion.csv in the same form, () if missing.
        seesaw: seesaw.json, None if missing.
        domains, tasks: their names.
        notes: one line for each file that is missing or cannot be read.
    """

    root: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, Any] | None
    epochs: tuple[Mapping[str, float], ...]
    fusion_rows: tuple[Mapping[str, float], ...]
    seesaw: Mapping[str, Any] | None
    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Every (domain, task) pair, domain by domain."""
        return tuple(Pair(domain, task) for domain in self.domains for task in self.tasks)

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights the run kept: of metrics.json, else the best of metrics.csv; 0 if none."""
        if self.ended:
            return int(self.metrics.get("best_epoch") or 0)
        auc = self.column("val_auc/mean")
        if not len(auc):
            return 0
        place = len(auc) - 1 if np.isnan(auc).all() else int(np.nanargmax(auc))
        return int(self.epochs[place]["epoch"])

    @property
    def covers_history(self) -> bool:
        """Whether metrics.json tells of all epochs in metrics.csv; one that was resumed and killed does not."""
        told = ((self.metrics or {}).get("train") or {}).get("epochs")
        return told is not None and (not self.epochs or told >= len(self.epochs))

    @property
    def ended(self) -> bool:
        """Whether metrics.json holds the result of all epochs that there are."""
        return self.metrics is not None and self.covers_history

    def column(self, name: str) -> np.ndarray:
        """A column of metrics.csv, float64 [epochs]; NaN where it has no number."""
        return np.array([row.get(name, math.nan) for row in self.epochs])

    def fusion(self) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        """Steps [n], the fusion weights by column [n] each, and the file they are from.

        Without fusion.csv they are metrics.csv's, one per epoch, and the steps are epochs.
        """
        rows, step, source = self.fusion_rows, "step", FUSION
        if not rows:
            rows, step, source = self.epochs, "epoch", "metrics.csv"
        names = [name for name in (rows[0] if rows else ()) if name.partition("/")[0] in _FUSION_STEMS]
        columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
        columns = {name: values for name, values in columns.items() if not np.isnan(values).all()}
        return np.array([row.get(step, math.nan) for row in rows]), columns, source

    def score(self, part: str, metric: str, pair: Pair | None) -> float | None:
        """A score of metrics.json, of ``pair`` or (None) the mean; None where it is undefined or not there.

        Args:
            part: "val" or "test". Without a usable metrics.json, "val" is the best epoch's row of metrics.csv.
            metric: "auc", "logloss", "calibration" or "gauc".
        """
        key = "mean" if pair is None else pair.key
        if self.ended:
            return _number(((self.metrics.get(part) or {}).get(metric) or {}).get(key))
        if part != "val":
            return None
        return _number(self._best_row.get(f"val_{metric}/{key}"))

    def overall(self, part: str, metric: str, task: str) -> float | None:
        """A task's score over the rows of all domains; otherwise as ``score``."""
        if self.ended:
            of_part = (self.metrics.get(part) or {}).get("overall") or {}
            return _number((of_part.get(metric) or {}).get(task))
        return _number(self._best_row.get(f"val_overall_{metric}/{task}")) if part == "val" else None

    @property
    def _best_row(self) -> Mapping[str, float]:
        return next((row for row in self.epochs if row["epoch"] == self.best_epoch), {})


def read(path: str | os.PathLike[str], domains: Sequence[str] = (), tasks: Sequence[str] = ()) -> RunRecord:
    """Read the run folder ``path``.

    Args:
        domains, tasks: their names, known from a checkpoint; by default those of metrics.json or metrics.csv.

    Raises:
        ConfigError: it is no run folder.
    """
    run, notes = RunFolder(path), []
    if not run.holds_run():
        what = "holds no run" if run.root.is_dir() else "is no folder"
        raise ConfigError(f"{run.root} {what}; name the folder that m3oe_fast.train wrote")
    config = _read(run.config, yaml.safe_load, notes) or {}
    metrics = _read(run.metrics, json.loads, notes)
    epochs = _read_rows(run.history, "epoch", notes)
    seesaw = _read(run.root / SEESAW, json.loads, []) if (run.root / SEESAW).exists() else None
    has_fusion = not metrics or metrics.get("fusion") != {}  # baselines have no fusion weights
    fusion_rows = _read_rows(run.root / FUSION, "step", notes if has_fusion else [])
    named = (metrics or {}).get("data") or {}
    if not domains or not tasks:
        domains, tasks = named.get("domains") or (), named.get("tasks") or ()
    if not domains or not tasks:
        domains, tasks = _names_in(epochs)
    return RunRecord(
        root=run.root,
        config=config,
        metrics=metrics,
        epochs=epochs,
        fusion_rows=fusion_rows,
        seesaw=seesaw,
        domains=tuple(domains),
        tasks=tuple(tasks),
        notes=tuple(notes),
    )


def _read(path: Path, parse: Any, notes: list[str]) -> dict[str, Any] | None:
    """The mapping in a file; None, and a note, where there is none."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return None
    if not isinstance(content, dict):
        notes.append(f"{path.name} cannot be read: it is no mapping")
        return None
    return content


def _read_rows(path: Path, key: str, notes: list[str]) -> tuple[dict[str, float], ...]:
    """The rows of a CSV file whose ``key`` is a number; (), and a note, where there are none."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [{name: _cell(text) for name, text in row.items() if name} for row in csv.DictReader(stream)]
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return ()
    except (OSError, ValueError, csv.Error) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}")
        return ()
    numbered = tuple(row for row in rows if math.isfinite(row.get(key, math.nan)))
    if not numbered:
        notes.append(f"{path.name} holds no row with a number in column {key}")
    return numbered


def _cell(text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.nan
    return value if math.isfinite(value) else math.nan


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _names_in(epochs: Sequence[Mapping[str, float]]) -> tuple[list[str], list[str]]:
    """Domains and tasks from the columns val_auc/<domain>/<task>; a task is taken to have no slash."""
    prefix = "val_auc/"
    keys = [name.removeprefix(prefix) for name in (epochs[0] if epochs else ()) if name.startswith(prefix)]
    halves = [key.rpartition("/") for key in keys if "/" in key]
    return list(dict.fromkeys(d for d, _, _ in halves)), list(dict.fromkeys(t for _, _, t in halves))
