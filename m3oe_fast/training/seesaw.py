"""The seesaw: what each (domain, task) pair gains or loses by being trained together with the others.

For every pair a model of the same configuration with one domain and one task is trained on the pair's rows
alone, with the same options and seed, in RUN/baselines/<pair>: the members of form single (`forms`). RUN/seesaw.json
compares their test AUC with the run's own, which metrics.json holds.
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
from m3oe_fast.data.schema import Schema
from m3oe_fast.errors import ConfigError, DataError
from m3oe_fast.metrics import Measure, seesaw
from m3oe_fast.model import RankingModel
from m3oe_fast.models import MODELS
from m3oe_fast.training.console import Display
from m3oe_fast.training.forms import Part, parts_of, train_member
from m3oe_fast.training.options import TrainOptions
from m3oe_fast.training.run_folder import RunFolder, write_text

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
    # A logger would mix the baselines up with the run.
    options = dataclasses.replace(options, logger="", profile=False)
    baselines: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    parts = parts_of("single", schema)
    for part in parts:
        key = f"{schema.domains[part.domains[0]]}/{schema.tasks[part.tasks[0]]}"
        measured = _train(part, dataset, root / BASELINES / part.name, one, options, place)
        baselines[key] = measured.value
        said = f"test AUC {measured.value:.4f}" if measured.reason is None else measured.reason
        if measured.reason is not None:
            reasons[key] = measured.reason
        tell(f"baseline {len(baselines)}/{len(parts)}  {key}  {said}")
    result = seesaw(own, baselines, reasons)
    write_text(root / FILE, json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _train(
    part: Part, dataset: Dataset, folder: Path, config: ModelConfig, options: TrainOptions, place: Place
) -> Measure:
    """The baseline's test AUC."""

    def make(schema: Schema) -> RankingModel:
        return MODELS[config.name](config, backend=place.backend, precision=place.precision).to(place.device)

    try:
        _, result = train_member(part, dataset, make, options, folder, Display())
    except (DataError, ConfigError) as error:
        return Measure(None, str(error))
    return result.test.pairs[0].auc
