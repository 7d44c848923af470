"""Tables of `bench.reproduction`."""

from __future__ import annotations

from typing import Any

from bench.markdown import table


def render(document: dict[str, Any]) -> list[str]:
    """A line per split and way; a split's users say what it measures."""
    settings, splits = document["settings"], document["splits"]
    found = [(split, way) for split in splits for way in split["ways"]]
    _, first = found[0]
    pairs = [pair for pair in first["auc"] if pair != "mean"]
    names = list(first["fusion"])
    rows = [
        [
            split["split"],
            way["way"],
            f"{100 * way['auc']['mean']:.2f}",
            f"{100 * way['std']:.2f}",
            *(f"{100 * way['auc'][pair]:.2f}" for pair in pairs),
            f"{100 * way['logloss']:.2f}",
            " ".join(str(run["best_epoch"]) for run in way["runs"]),
            *(f"{way['fusion'][name]:.3f}" for name in names),
        ]
        for split, way in found
    ]
    head = ["split", "fusion weights", "mean test AUC", "std", *pairs, "logloss", "best epochs", *names]
    users = [
        [
            split["split"],
            *(f"{split['counts'][part]['rows']:,}" for part in ("train", "val", "test")),
            _number(split["counts"]["test"]["users"]),
            _number(split["counts"]["test"]["new_users"]),
        ]
        for split in splits
    ]
    return [
        f"**{document['data']}, M3oE as published: K = {settings['shared_experts']}, lr {settings['lr']:g}, batches of "
        f"{settings['batch_size']:,}, {len(settings['seeds'])} seeds, at most {settings['epochs']} epochs, patience "
        f"{settings['patience']}; AUC and logloss x 100**",
        "",
        *table(head, rows),
        "",
        *table(["split", "train rows", "val rows", "test rows", "test users", "not in train"], users),
        "",
    ]


def _number(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"
