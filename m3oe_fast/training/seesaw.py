"""The seesaw: what each (domain, task) pair gains or loses by being trained together with the others.

For every pair a model of the same configuration with one domain and one task is trained on the pair's rows
alone, with the same options and seed, in RUN/baselines/<pair>. RUN/seesaw.json compares their test AUC with
the run's own, which metrics.json holds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from m3oe_fast.config import ModelConfig
from m3oe_fast.data.dataset import Dataset
from m3oe_fast.data.restrict import restrict, rows_of_pairs
from m3oe_fast.data.store import PARTS
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.metrics import Measure, seesaw
from m3oe_fast.models import MODELS
from m3oe_fast.training.console import Display
from m3oe_fast.training.forms import folder_name
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.run_folder import RunFolder, write_text
from m3oe_fast.training.trainer import Trainer

BASELINES, FILE = "baselines", "seesaw.json"


@dataclass(frozen=True)
class Place:
    """Where the baselines compute, as the run did."""

    device: torch.device
    backend: str
    precision: str


def compare(
    root: Path,
    dataset: Dataset,
    config: ModelConfig,
    options: TrainOptions,
    place: Place,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Train the baselines that are not there yet and write seesaw.json.

    Args:
        root: the folder of a finished run.
        dataset: what it was trained on.
        config, options: its own.
        place: where to compute.
        tell: hears one line per pair.

    Returns:
        The content of seesaw.json: that of ``metrics.seesaw``, for the test AUC.

    Raises:
        ConfigError: the run has no test AUC yet.
        CheckpointError: a folder holds a baseline of another configuration.
        KeyboardInterrupt: Ctrl-C; what is trained so far is gone on with next time.
    """
    metrics = RunFolder(root).read_metrics() or {}
    own = (metrics.get("test") or {}).get("auc")
    if not own or not metrics.get("best_epoch"):
        raise ConfigError(f"{root} has no test AUC to compare with: finish the run with m3oe_fast.train --resume last")
    schema = dataset.schema
    one = dataclasses.replace(config, num_domains=1, num_tasks=1)
    # One pair has nothing to weigh, and a logger would mix the baselines up with the run.
    options = dataclasses.replace(options, loss_weighting="sum", pair_weights=None, logger="", profile=False)
    baselines: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    total = len(schema.domains) * len(schema.tasks)
    for d, of_tasks in enumerate(rows_of_pairs(dataset)):
        for t, rows in enumerate(of_tasks):
            key = f"{schema.domains[d]}/{schema.tasks[t]}"
            folder = root / BASELINES / folder_name(f"{d}-{t}", key)
            measured = _train(restrict(dataset, [d], [t], rows), folder, one, options, place)
            baselines[key] = measured.value
            said = f"test AUC {measured.value:.4f}" if measured.reason is None else measured.reason
            if measured.reason is not None:
                reasons[key] = measured.reason
            tell(f"baseline {len(baselines)}/{total}  {key}  {said}")
    result = seesaw(own, baselines, reasons)
    write_text(root / FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _train(dataset: Dataset, folder: Path, config: ModelConfig, options: TrainOptions, place: Place) -> Measure:
    """The baseline's test AUC."""
    for part in PARTS:
        if not len(getattr(dataset, part)):
            return Measure(None, f"no labelled row in {part}")
    torch.manual_seed(options.seed)
    model = MODELS[config.name](config, backend=place.backend, precision=place.precision).to(place.device)
    try:
        result = Trainer(model, dataset, options, out=folder, display=Display()).fit(resume="last")
    except (DataError, ConfigError) as error:
        return Measure(None, str(error))
    if result.ended == "interrupted":
        raise KeyboardInterrupt
    return result.test.pairs[0].auc
