"""The folder of a table:

table.yaml                        the protocol: what all runs share, and the digest of the rows
runs/<model>-<form>/<seed>        a run folder of m3oe_fast.train; <seed>-lr<rate> where rates are compared
logs/<model>-<form>-<seed>.log    what that run printed last
table.md, table.csv, summary.csv, table.png
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3oe_fast.cli import config_file
from m3oe_fast.comparison.plan import Run
from m3oe_fast.errors import ConfigError
from m3oe_fast.training.resume import short
from m3oe_fast.training.run_folder import RunFolder, write_text

FREE_TO_CHANGE = {
    *("out", "models", "seeds", "jobs", "data_path", "cache_dir"),
    *("prefetch", "checkpoint_every", "keep_last", "logger", "profile"),
}
"""Options that leave every number of the table as it is."""


class TableFolder:
    """Paths and checks of a table's folder; making the object touches no file.

    Args:
        root: the folder, existing or not.
        names_rates: whether the folders of runs say their learning rate, since several are compared.
    """

    def __init__(self, root: str, names_rates: bool) -> None:
        self.root = Path(root)
        self.settings = self.root / "table.yaml"
        self.markdown = self.root / "table.md"
        self.scores = self.root / "table.csv"
        self.summary = self.root / "summary.csv"
        self.figure = self.root / "table.png"
        self._names_rates = names_rates

    def run(self, run: Run) -> Path:
        """The run folder of a run."""
        return self.root / "runs" / run.row.name / self._name(run)

    def log(self, run: Run) -> Path:
        """The file that takes what a run prints."""
        return self.root / "logs" / f"{run.row.name}-{self._name(run)}.log"

    def _name(self, run: Run) -> str:
        return f"{run.seed}-lr{run.lr:g}" if self._names_rates else str(run.seed)

    def check(self) -> None:
        """Make sure, before any work, that a table may and can be written here; leaves no trace.

        Raises:
            ConfigError: the folder holds something else, or cannot be written.
        """
        folder = RunFolder(self.root)
        if folder.holds_run():
            raise ConfigError(f"{self.root} holds a training run; name another folder with --out")
        folder.check(resuming=False)
        if self.settings.is_file() or not self.root.exists():
            return
        # A table that was killed before its first file was whole left at most a hidden one.
        held = sorted(name for name in os.listdir(self.root) if not name.startswith("."))
        if held:
            raise ConfigError(
                f"{self.root} is no table folder: it holds {held[0]} and no table.yaml; name another folder with --out"
            )

    def check_protocol(self, settings: Mapping[str, Any]) -> None:
        """Make sure that a table which lies here has the same protocol.

        Args:
            settings: what all runs share, as `write_settings` gets it.

        Raises:
            ConfigError: it has not, or table.yaml cannot be read.
        """
        if not self.settings.is_file():
            return
        try:
            saved = config_file.load_mapping(str(self.settings))
        except ConfigError as error:
            raise ConfigError(f"{self.settings}: {error}") from error
        if name := first_difference(settings, saved):
            raise ConfigError(
                f"{self.root} holds a table with another {name}: it was {short(saved.get(name))} and is now "
                f"{short(_plain(settings[name]))}; a table has one protocol, name another folder with --out"
            )

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write table.yaml.

        Raises:
            UserError: the folder cannot be written.
        """
        kept = {name: _plain(value) for name, value in settings.items() if name not in FREE_TO_CHANGE}
        write_text(self.settings, config_file.as_text(kept))

    def check_run(self, run: Run, config: Mapping[str, Any]) -> None:
        """Make sure that a run folder which lies here is the run that is wanted.

        Args:
            run: the run.
            config: what its config.yaml has to say.

        Raises:
            ConfigError: it is another, or its config.yaml cannot be read.
        """
        file = RunFolder(self.run(run)).config
        if not file.is_file():
            return
        try:
            saved = config_file.load_mapping(str(file))
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}; remove the run's folder to train it again") from error
        if name := first_difference(config, saved):
            raise ConfigError(
                f"{self.run(run)} is a run with another {name}: it was {short(saved.get(name))} and would be "
                f"{short(_plain(config[name]))}; a table has one protocol, remove that folder or name another --out"
            )

    def result(self, run: Run, epochs: int, patience: int, rows: Mapping[str, int]) -> dict[str, Any] | None:
        """The metrics.json of a run if it is finished, else None.

        Args:
            run: the run.
            epochs, patience: as it was asked for; an interrupted run has a metrics.json as well.
            rows: of each part of the log.

        Raises:
            ConfigError: the run went over other rows.
        """
        folder = RunFolder(self.run(run))
        metrics = folder.read_metrics()
        if metrics is None or not _is_whole(metrics) or not folder.config.is_file():
            return None
        if metrics["data"]["rows"] != dict(rows):
            raise ConfigError(
                f"{folder.metrics} tells of other rows: {short(metrics['data']['rows'])}, not {short(dict(rows))}; a "
                "table has one protocol, remove that folder or name another --out"
            )
        if run.row.form != "mdmt":  # written at the very end only
            return metrics
        done = metrics["train"]["epochs"]
        stopped_early = 0 < patience <= done - metrics["best_epoch"]
        return metrics if done >= epochs or stopped_early else None


def first_difference(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> str | None:
    """The first option that changes numbers and is not the same in both."""
    for name, value in wanted.items():
        if name not in FREE_TO_CHANGE and saved.get(name) != _plain(value):
            return name
    return None


_NEEDED = {
    "data": ("rows", "domains", "tasks"),
    "model": ("parameters", "multiply_adds"),
    "train": ("epochs", "seconds", "samples_per_second", "peak_rss_bytes"),
    "val": ("auc", "logloss"),
    "test": ("auc", "logloss"),
}


def _is_whole(metrics: Mapping[str, Any]) -> bool:
    """Whether metrics.json tells what a table needs; one of an older version does not, and is written again."""
    groups = {name: metrics.get(name) for name in _NEEDED}
    whole = all(isinstance(group, dict) and group.keys() >= set(_NEEDED[name]) for name, group in groups.items())
    return whole and {"backend", "best_epoch"} <= metrics.keys()


def _plain(value: Any) -> Any:
    """As YAML has it."""
    return list(value) if isinstance(value, tuple) else value
