"""What `bench.gpu` prints: one line per measurement in the terminal, a table per measurement from `bench.report`."""

from __future__ import annotations

from typing import Any

from bench.markdown import percent, table, times

TITLES = {"forward": "Forward", "step": "Training step"}
GRAPH = ", CUDA graph"
OPPONENTS = {
    "published": "eager, published style",
    "batched": "eager, batched + folded",
    "compiled": "torch.compile, batched + folded",
    "max-autotune": "torch.compile max-autotune, batched + folded",
}


def conditions(document: dict[str, Any]) -> str:
    """Machine, versions and ceilings in a paragraph."""
    place, versions, commit = document["device"], document["versions"], document["commit"]
    if place["type"] != "cuda":
        return "Dry run on a CPU: these numbers say nothing about a GPU."
    state = "no commit" if commit["hash"] is None else commit["hash"][:12]
    state += " with uncommitted changes" if commit["modified"] else ""
    ceilings = document["ceilings"]
    products = ", ".join(f"{p} {ceilings[f'{p}_flops_per_second'] / 1e12:.0f}" for p in ("bf16", "tf32", "fp32"))
    return (
        f"{place['name']} (capability {place['capability']}, {place['multiprocessors']} multiprocessors, "
        f"driver {place['driver']}); torch {versions['torch']}, CUDA {place['cuda']}, Triton {place['triton']}, "
        f"m3oe_fast {versions['m3oe_fast']} ({state}); measured ceilings: copy "
        f"{ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, products {products} TFLOP/s; {document['date'][:10]}."
    )


def render(document: dict[str, Any]) -> list[str]:
    """A table per measurement, then what is missing."""
    lines = []
    for measured in document["measurements"]:
        lines += [f"**{_title(measured)}, {measured['precision']}, {measured['mix']}, {measured['stage']}**", ""]
        lines += [*table(HEAD, [_cells(row) for row in measured["contenders"]]), ""]
    return lines + missing(document)


def summary(document: dict[str, Any]) -> list[str]:
    """A line per batch size, precision and kind, stages side by side; then what is missing."""
    found: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for measured in document["measurements"]:
        key = (measured["precision"], _title(measured), measured["mix"])
        for row in measured["contenders"]:
            # m3oe_fast is in every stage; the first has no compiler at work beside it.
            found.setdefault(key, {}).setdefault(row["name"], row)
    if not found:
        return missing(document)
    rows = [_line(key, named) for key, named in found.items()]
    head = ["", "ours us", "graph us", "of bf16", "error", *(f"vs {k}{g}" for k in OPPONENTS for g in ("", " graph"))]
    kept = [i for i in range(len(head)) if i < 5 or any(row[i] != "-" for row in rows)]
    short = [[row[i] for i in kept] for row in rows]
    return [*table([head[i] for i in kept], short), "", *missing(document)]


def missing(document: dict[str, Any]) -> list[str]:
    """A line for everything that was refused, failed or left out."""
    lines = [f"refused: {_place(row)}: {row['reason']}" for row in document["refused"]]
    lines += [f"failed: {_place(row)}: {row['error']}" for row in document["failed"]]
    lines += [f"left out, the budget was used up: {_place(row)}" for row in document["left_out"]]
    return lines


HEAD = ["contender", "us", "quartiles", "rate of bf16 ceiling", "error of logits", "step MiB"]
HEAD += ["m3oe_fast is faster by", "in its best form by"]


def _cells(row: dict[str, Any]) -> list[str]:
    seconds, extra = row["seconds"], row["step_extra_bytes"]
    return [
        row["name"],
        _us(seconds["median"]),
        f"{_us(seconds['q1'])}-{_us(seconds['q3'])}",
        percent(row["share_of_bf16_ceiling"]),
        f"{row['logit_error']:.1e}",
        "-" if extra is None else f"{extra / 2**20:.0f}",
        "" if row["own"] else times(row["speedup_of_own"]),
        "" if row["own"] else times(row["speedup_of_best_own"]),
    ]


def _line(key: tuple[str, ...], named: dict[str, dict[str, Any]]) -> list[str]:
    precision, title, mix = key
    own, graph = (named.get(f"m3oe_fast, {precision}{g}") for g in ("", GRAPH))
    best = graph or own
    ratios = [named.get(f"{name}{g}") for name in OPPONENTS.values() for g in ("", GRAPH)]
    return [
        f"{precision}: {title}" + ("" if mix == "uniform" else f", {mix}"),
        "-" if own is None else _us(own["seconds"]["median"]),
        "-" if graph is None else _us(graph["seconds"]["median"]),
        "-" if best is None else percent(best["share_of_bf16_ceiling"]),
        "-" if best is None else f"{best['logit_error']:.1e}",
        *("-" if row is None else times(row["speedup_of_own"]) for row in ratios),
    ]


def _title(measured: dict[str, Any]) -> str:
    return f"{TITLES[measured['what']]}, B = {measured['batch']:,}"


def _place(row: dict[str, Any]) -> str:
    return f"{row['contender'] or 'all'} ({row['precision']}, B = {row['batch']:,}, {row['mix']}, {row['stage']})"


def _us(seconds: float) -> str:
    """Microseconds, to about three digits."""
    return f"{1e6 * seconds:.1f}" if seconds < 1e-4 else f"{1e6 * seconds:.0f}"
