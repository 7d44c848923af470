"""Tables of `bench.ablations`."""

from __future__ import annotations

from typing import Any

from bench.markdown import table


def render(document: dict[str, Any]) -> list[str]:
    """A line per variant."""
    settings = document["settings"]
    seeds = len(settings["seeds"])
    full, *others = document["variants"]
    rows = [[full["name"], f"{100 * full['mean']:.2f} ± {100 * full['std']:.2f}", "", "", f"{full['parameters']:,}"]]
    rows += [
        [
            row["name"],
            f"{100 * row['mean']:.2f} ± {100 * row['std']:.2f}",
            f"{100 * row['difference']:+.2f} ± {100 * row['standard_error']:.2f}",
            f"{row['better_seeds']} of {seeds}",
            f"{row['parameters']:,}",
        ]
        for row in others
    ]
    head = ["M3oE", "test AUC x 100", "minus the full model", "better seeds", "parameters"]
    return [
        f"**{document['data']}, split {settings['split']}: {seeds} seeds, at most {settings['epochs']} epochs, "
        f"B = {settings['batch_size']:,}, lr {settings['lr']:g}, K = 4 unless the line says otherwise**",
        "",
        *table(head, rows),
        "",
        "AUC: mean over the pairs, then mean and standard deviation over the seeds. Differences are of runs with the "
        "same seed, with the standard error of their mean.",
        "",
    ]
