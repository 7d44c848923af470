"""Where a run's numbers go beside its files: TensorBoard and Weights & Biases, each in the run folder.

metrics.csv, metrics.jsonl and fusion.csv are written by `run_folder`, always and as a whole. A logger
here only adds to what it has written before, so one that goes on with a resumed run is told the step that
the run goes on from, and sees to it that no later step of the earlier attempt is there twice.
"""

from __future__ import annotations

import importlib.util
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from m3oe_fast.errors import ConfigError
from m3oe_fast.training.run_folder import RunFolder, write_text

PROJECT = "m3oe_fast"
RUN_ID = "run-id"
"""File in RUN/wandb that holds the id which a resumed run goes on with."""

_TRAIN = {
    "loss": "train_loss",
    "lr": "lr",
    "rows_per_second": "samples_per_second",
    "seconds": "seconds",
    "validation_seconds": "validation_seconds",
}


class Logger(Protocol):
    """Takes the numbers of a run in the order of its steps."""

    def epoch(self, record: Mapping[str, Any], step: int) -> None:
        """An epoch has ended.

        Args:
            record: ``Epoch.to_record()``.
            step: steps of the run done by then.
        """

    def outer(self, step: int, values: Mapping[str, float]) -> None:
        """The fusion weights moved, or an epoch has ended with them.

        Args:
            step: steps of the run done by then.
            values: every fusion weight by its name in fusion.csv.
        """

    def close(self) -> None:
        """Write what is still in memory; nothing is logged afterwards."""


def make_loggers(names: str, run_root: str | os.PathLike[str], resumed_step: int) -> list[Logger]:
    """The loggers named in ``names``, opened.

    Args:
        names: "", "tensorboard", "wandb", or both with a comma between.
        run_root: the run folder; it is made where it is missing.
        resumed_step: steps done when the run goes on; 0 if it begins, also over an attempt that left no checkpoint.

    Raises:
        ConfigError: an unknown name, a missing package, or Weights & Biases asked to upload and no key for it.
    """
    root = Path(run_root)
    chosen = parse_names(names)
    root.mkdir(parents=True, exist_ok=True)
    return [_LOGGERS[name](root, resumed_step) for name in chosen]


def parse_names(names: str) -> tuple[str, ...]:
    """The loggers in a list such as "tensorboard,wandb", each once, none of them opened.

    Raises:
        ConfigError: an unknown name, or one whose package is missing.
    """
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip() not in ("", "none")))
    for name in chosen:
        if name not in _LOGGERS:
            allowed = ", ".join(_LOGGERS)
            raise ConfigError(f"logger {name!r} does not exist; choose of {allowed} (CSV and JSON lines are always on)")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"logger {name} needs a package that is missing: pip install 'm3oe_fast[{name}]'")
    return chosen


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record by their names in a logger: train/loss, train/lr, train/rows_per_second,
    val/auc/<domain>/<task>, val/auc/mean, val/overall/auc/<task>, ...

    What is undefined has no entry. The fusion weights come by ``Logger.outer``.
    """
    found = {f"train/{ours}": record.get(theirs) for ours, theirs in _TRAIN.items()}
    found |= _flat("val", record.get("val") or {})
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}/{name}"
        flat |= _flat(path, value) if isinstance(value, Mapping) else {path: value}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class _Fresh:
    """Passes each step once. At the end of an epoch the fusion weights may be told twice."""

    def __init__(self, resumed_step: int) -> None:
        self.step = resumed_step if resumed_step else -1

    def __call__(self, step: int) -> bool:
        if step <= self.step:
            return False
        self.step = step
        return True


class TensorBoardLogger:
    """Writes events into RUN/tensorboard; what an earlier attempt wrote beyond ``resumed_step`` is taken back."""

    def __init__(self, run_root: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A reader drops events of older files from this step on; before step 1 there may be fusion weights at 0.
        purge = resumed_step + 1 if resumed_step else 0
        self._writer = SummaryWriter(str(run_root / "tensorboard"), purge_step=purge)
        self._fresh = _Fresh(resumed_step)
        self._last = resumed_step

    def epoch(self, record: Mapping[str, Any], step: int) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()
        self._last = step

    def outer(self, step: int, values: Mapping[str, float]) -> None:
        if self._fresh(step):
            for name, value in values.items():
                self._writer.add_scalar(f"fusion/{name}", value, step)
            # A checkpoint may follow at once, and a run that is killed behind it must not lack what came before.
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Writes a Weights & Biases run into RUN/wandb, under an id that a resumed run keeps.

    Nothing leaves the machine, and nobody is asked to log in, unless the user says so: with WANDB_API_KEY or
    WANDB_MODE in the environment. What was kept offline is uploaded later with ``wandb sync``.
    """

    def __init__(self, run_root: Path, resumed_step: int) -> None:
        import wandb

        folder = run_root / "wandb"
        folder.mkdir(exist_ok=True)
        self._fresh = _Fresh(resumed_step)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=os.environ.get("WANDB_NAME") or run_root.resolve().name,
            id=_run_id(folder, resumed_step),
            dir=str(run_root),
            mode=_mode(wandb),
            resume="allow",
            config=_config(run_root),
            allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )
        # The library drops what is not beyond its own last step, which a resumed run may lie behind.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def epoch(self, record: Mapping[str, Any], step: int) -> None:
        self._run.log({**scalars(record), "epoch": record.get("epoch"), "step": step})

    def outer(self, step: int, values: Mapping[str, float]) -> None:
        if self._fresh(step):
            self._run.log({**{f"fusion/{name}": value for name, value in values.items()}, "step": step})

    def close(self) -> None:
        self._run.finish()


def _run_id(folder: Path, resumed_step: int) -> str:
    """The id of the run that is resumed, else a new one; kept in the folder either way."""
    file = folder / RUN_ID
    if resumed_step:
        try:
            if known := file.read_text(encoding="utf-8").strip():
                return known
        except (OSError, ValueError):
            pass  # it was not logged here so far
    new = secrets.token_hex(4)
    write_text(file, new + "\n")
    return new


def _mode(wandb: Any) -> str | None:
    """None lets WANDB_MODE decide."""
    mode = os.environ.get("WANDB_MODE")
    if not mode:
        return "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode in ("online", "shared") and not wandb.api.api_key:
        raise ConfigError(
            f"logger wandb: WANDB_MODE is {mode}, but there is no key to log in with; set WANDB_API_KEY or "
            "WANDB_MODE=offline"
        )
    return None


def _config(run_root: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(RunFolder(run_root).config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


_LOGGERS = {"tensorboard": TensorBoardLogger, "wandb": WandbLogger}
