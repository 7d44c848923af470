"""What a run writes about itself: the content of metrics.json, and of config.yaml where the command line wrote none."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from m3oe_fast.data.dataset import Dataset
from m3oe_fast.metrics import Scores
from m3oe_fast.model import RankingModel
from m3oe_fast.models.family import Family
from m3oe_fast.training.evaluation import device_of
from m3oe_fast.training.history import Epoch
from m3oe_fast.training.options import TrainOptions


def metrics_of(
    model: RankingModel | Family, data: Dataset, history: Sequence[Epoch], best_epoch: int, val: Scores, test: Scores
) -> dict[str, Any]:
    """The content of metrics.json; without a best epoch (0) there are no fusion weights worth telling."""
    seconds = math.fsum(epoch.seconds for epoch in history)
    samples = sum(epoch.samples for epoch in history)
    return {
        "data": {
            "name": data.name,
            "split": data.split,
            "rows": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
            "domains": list(data.schema.domains),
            "tasks": list(data.schema.tasks),
        },
        "model": {
            "name": model.config.name,
            "form": "mdmt",
            "parameters": sum(p.numel() for p in model.parameters()),
            "multiply_adds": model.multiply_adds(),
        },
        "backend": model.backend_name,
        "isa": model.isa_name,
        "precision": model.precision,
        "train": {
            "epochs": len(history),
            "seconds": seconds,
            "cpu_seconds": math.fsum(epoch.cpu_seconds for epoch in history),
            "samples_per_second": samples / seconds if history else None,
            "peak_rss_bytes": peak_rss_bytes(),
        },
        "best_epoch": best_epoch,
        "val": val.to_dict(),
        "test": test.to_dict(),
        "fusion": model.fusion_values() if best_epoch else dict.fromkeys(model.fusion_values()),
    }


def family_metrics_of(
    family: Family, data: Dataset, members: Mapping[str, Mapping[str, Any]], val: Scores, test: Scores
) -> dict[str, Any]:
    """The content of metrics.json of several models.

    Seconds, samples and parameters are those of all members together, epochs and the best one the largest of any, and a
    row's multiply-adds those of all members that score it, in the domain with most.

    Args:
        family: the members as one model.
        data: the whole log.
        members: metrics.json of each, by its name.
        val, test: the family's scores.
    """
    trained = [member["train"] for member in members.values()]
    seconds = math.fsum(train["seconds"] for train in trained)
    samples = math.fsum((train["samples_per_second"] or 0) * train["seconds"] for train in trained)
    of_one = metrics_of(family, data, (), 0, val, test)
    return of_one | {
        "model": of_one["model"] | {"form": family.form},
        "train": {
            "epochs": max(train["epochs"] for train in trained),
            "seconds": seconds,
            "cpu_seconds": math.fsum(train["cpu_seconds"] for train in trained),
            "samples_per_second": samples / seconds if seconds else None,
            "peak_rss_bytes": max(peak_rss_bytes(), *(train["peak_rss_bytes"] for train in trained)),
        },
        "best_epoch": max(member["best_epoch"] for member in members.values()),
        "members": {
            name: {
                "rows": member["data"]["rows"],
                "epochs": member["train"]["epochs"],
                "best_epoch": member["best_epoch"],
                "val_auc": member["val"]["auc"]["mean"],
                "test_auc": member["test"]["auc"]["mean"],
            }
            for name, member in members.items()
        },
    }


def config_of(model: RankingModel, data: Dataset, options: TrainOptions, out: str) -> dict[str, Any]:
    """The content of config.yaml for a run from Python: what the command needs to do the same.

    The command cannot name a view of a log (`data.restrict`): "view", which is no option, makes it refuse the file
    instead of training on the whole log.
    """
    of_data = ("vocab_sizes", "num_dense", "num_domains", "num_tasks", "bag_vocab_sizes", "bag_pooling")
    sizes = {k: v for k, v in model.config.to_dict().items() if k not in of_data}
    return {
        "data": f"prepared:{data.folder}",
        **({"view": data.name} if data.encoder is None else {}),
        "split": data.split,
        "split_seed": data.split_seed,
        "model": model.config.name,
        **sizes,
        **dataclasses.asdict(options),
        "device": device_of(model).type,
        "backend": model.backend_name,
        "precision": model.precision,
        "out": out,
    }


def peak_rss_bytes() -> int:
    """Largest resident memory this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
