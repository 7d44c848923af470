"""Tables of `bench.bilevel`."""

from __future__ import annotations

from typing import Any

from bench.markdown import table


def render(document: dict[str, Any]) -> list[str]:
    """A line per mode."""
    settings, modes = document["settings"], document["modes"]
    seeds = len(settings["seeds"])
    names = list(modes[0]["fusion"])
    rows = [
        [
            row["mode"],
            f"{row['mean']:.5f}",
            f"{row['std']:.5f}",
            "" if row["mode"] == "off" else f"{row['difference']:+.5f}",
            "" if row["mode"] == "off" else f"{row['better_seeds']} of {seeds}",
            f"{row['epoch_seconds']:.2f}",
            f"{row['fit_seconds']:.1f}",
            *(f"{row['fusion'][name]:.4f}" for name in names),
        ]
        for row in modes
    ]
    head = ["bilevel", "mean test AUC", "std", "minus off", "better than off", "s per epoch", "s per run", *names]
    rate = "default" if settings["unroll_rate"] is None else f"{settings['unroll_rate']:g}"
    return [
        f"**{document['data']}, split {settings['split']}: {seeds} seeds, at most {settings['epochs']} epochs, "
        f"fusion_lr {settings['fusion_lr']:g}, outer_every {settings['outer_every']}, "
        f"outer_fraction {settings['outer_fraction']:g}, unroll_rate {rate}, "
        f"neumann_terms {settings['neumann_terms']}**",
        "",
        *table(head, rows),
        "",
        "Seconds are medians; fusion weights are means over the seeds, after the sigmoid, of the best epoch.",
        "",
    ]
