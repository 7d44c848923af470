"""Everything in order: for each stage, batch size and precision the gate, then the clock; all kept as it goes.

Stages go from cheap to dear, so that a budget that is used up costs the least: what runs as written and its graphs,
what torch.compile makes of it, what it makes of it after a search. m3oe_fast takes part in every stage, so that every
ratio is between contenders of the same rounds.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo

from bench import command, flops, gate
from bench.gpu import clock, device, feed, verify
from bench.gpu.budget import Budget
from bench.gpu.contenders import MODES, Batched, DeviceContender, Own, Published, batched_name
from bench.gpu.feed import Packed, Supply
from bench.gpu.graphed import Graphed
from m3oe_fast import M3oEConfig, kernels
from m3oe_fast.atomic import replacing

STAGES = ("plain", *MODES)
PRECISIONS = ("bf16", "tf32", "fp32")
# bf16x3 is fp32-class: its opponents are those of fp32.
OWN_PRECISIONS = {"bf16": ("bf16",), "tf32": ("tf32",), "fp32": ("fp32", "bf16x3")}
WHAT = ("forward", "step")
# Seconds that must be left before a compiler is started, which nothing can stop half-way.
RESERVE = {"plain": 0.0, "compiled": 60.0, "max-autotune": 150.0}


class DeviceLost(Exception):
    """The device answers no more, and nothing else can be measured in this process."""


@dataclass(frozen=True)
class Job:
    """Contenders that are timed in the same rounds."""

    stage: str
    mix: str
    batch: int
    precision: str


@dataclass(frozen=True)
class Entrant:
    """A contender before it exists."""

    name: str
    reserve: float
    make: Callable[[], DeviceContender]


@dataclass
class Ready:
    """A contender that has passed the gate, and what is known of it besides its times."""

    contender: DeviceContender
    facts: dict[str, Any] = field(default_factory=dict)


def jobs(
    stages: tuple[str, ...], mixes: tuple[str, ...], batches: tuple[int, ...], precisions: tuple[str, ...]
) -> list[Job]:
    """All of them, in the order of their arguments; the stages are the outermost."""
    return [Job(s, m, b, p) for s in stages for m in mixes for b in batches for p in precisions]


def entrants(job: Job, supply: Supply, graphs: bool) -> Iterator[Entrant]:
    """Who takes part, m3oe_fast first; `graphs` off leaves out what replays CUDA graphs."""

    for precision in OWN_PRECISIONS[job.precision]:
        make = functools.partial(Own, supply.drawn, precision)
        name = f"m3oe_fast, {precision}"
        yield Entrant(name, 0.0, make)
        if graphs:
            yield Entrant(f"{name}, CUDA graph", 0.0, lambda make=make: _graphed(make(), make(), supply))
    if job.stage == "plain":
        yield Entrant("eager, published style", 0.0, lambda: Published(supply.drawn, job.precision))
    mode = None if job.stage == "plain" else job.stage
    batched = functools.cache(lambda: Batched(supply, job.precision, mode))
    yield Entrant(batched_name(mode), RESERVE[job.stage], batched)
    if graphs:
        # The same contender: compiled by now, unless there was no budget for it.
        reserve = 0.0 if batched.cache_info().currsize else RESERVE[job.stage]
        yield Entrant(f"{batched_name(mode)}, CUDA graph", reserve, lambda: _graphed(batched(), batched(), supply))


class Session:
    """A run: what it has found so far is in `document`, and in the file after every measurement."""

    def __init__(
        self, document: dict[str, Any], config: M3oEConfig, target: torch.device, budget: Budget, path: str | None
    ) -> None:
        self.document = document
        self.config, self.device, self.budget, self.path = config, target, budget, path
        self._supplies: dict[tuple[str, int], tuple[Supply, verify.Oracles]] = {}
        for name in ("gate", "measurements", "refused", "failed", "left_out"):
            document.setdefault(name, [])

    def run(self, todo: list[Job], what: tuple[str, ...], rounds: int, seed: int) -> None:
        """Work the jobs off until the budget is used up or the device is lost."""
        for i, job in enumerate(todo):
            try:
                self._job(job, what, rounds, seed)
            except DeviceLost as lost:
                self.document["device_lost"] = _line(lost)
                self.document["left_out"] += [asdict(left) | {"contender": None} for left in todo[i + 1 :]]
                break
            finally:
                self.save()

    def save(self) -> None:
        """Keep what there is."""
        self.document["seconds_used"] = round(self.budget.used(), 1)
        if self.path is None:
            return
        with replacing(Path(self.path)) as stream:
            stream.write(json.dumps(self.document, indent=1, allow_nan=False).encode() + b"\n")

    @property
    def succeeded(self) -> bool:
        """Whether the gate let everybody pass and m3oe_fast ran throughout."""
        own_failed = any(row["contender"] is None or row["own"] for row in self.document["failed"])
        return not (self.document["refused"] or own_failed or "device_lost" in self.document)

    def _job(self, job: Job, what: tuple[str, ...], rounds: int, seed: int) -> None:
        if not self.budget.allows(RESERVE[job.stage]):
            self.document["left_out"].append(asdict(job) | {"contender": None})
            return
        try:
            supply, oracles = self._supply(job, seed)
        except Exception as error:
            self._failed(job, None, False, error)
            return
        self._section(job, what, rounds, supply, oracles)
        if job.stage in MODES:
            torch._dynamo.reset()  # or it would count the next batch size as a recompilation, of which it allows few
        device.release(self.device)

    def _section(self, job: Job, what: tuple[str, ...], rounds: int, supply: Supply, oracles: verify.Oracles) -> None:
        """Gate and time the contenders of a job; none of them outlives this."""
        where = f"{job.precision}, B = {job.batch}, {job.mix}, {job.stage}"
        with device.matmul_precision(device.MATMUL_PRECISION[job.precision]):
            ready = []
            for entrant in entrants(job, supply, self.device.type == "cuda"):
                command.say(f"{self.budget.used():5.0f} s  {where}: preparing {entrant.name}")
                ready += self._prepare(job, entrant, supply, oracles)
            for kind in what if ready else ():
                command.say(f"{self.budget.used():5.0f} s  {where}: timing {kind}")
                try:
                    self.document["measurements"].append(self._measure(job, kind, ready, supply, rounds))
                except Exception as error:
                    self._failed(job, None, False, error)
                self.save()

    def _supply(self, job: Job, seed: int) -> tuple[Supply, verify.Oracles]:
        key = (job.mix, job.batch)
        if key not in self._supplies:
            command.say(f"{self.budget.used():5.0f} s  B = {job.batch}, {job.mix}: running the float64 oracle")
            cache = device.cache_bytes(self.device)
            with device.matmul_precision("highest"):
                supply = feed.make_supply(self.config, job.batch, self.device, feed.MIXES[job.mix], seed, cache)
                precisions = tuple(p for group in OWN_PRECISIONS.values() for p in group)
                self._supplies[key] = supply, verify.make_oracles(supply, precisions)
        return self._supplies[key]

    def _prepare(self, job: Job, entrant: Entrant, supply: Supply, oracles: verify.Oracles) -> list[Ready]:
        """The contender, if there is budget for it and it passes; the document says why where not."""
        if not self.budget.allows(entrant.reserve):
            self.document["left_out"].append(asdict(job) | {"contender": entrant.name})
            return []
        start = self.budget.used()
        try:
            contender = entrant.make()
            found = verify.check(contender, supply, oracles)
            facts = _facts(contender, supply)
        except gate.GateError as refusal:
            command.say(f"refused: {refusal}")
            self.document["refused"].append(asdict(job) | {"contender": entrant.name, "reason": str(refusal)})
            return []
        except Exception as error:
            self._failed(job, entrant.name, entrant.name.startswith("m3oe_fast"), error)
            return []
        recorded = verify.record(contender, found)
        self.document["gate"].append(asdict(job) | recorded)
        facts |= {"logit_error": recorded["logit_error"], "prepare_seconds": round(self.budget.used() - start, 1)}
        return [Ready(contender, facts)]

    def _measure(self, job: Job, what: str, ready: list[Ready], supply: Supply, rounds: int) -> dict[str, Any]:
        calls = {r.contender.name: call_of(what, r.contender, supply) for r in ready}
        with torch.set_grad_enabled(what != "forward"):
            timed = clock.interleave(calls, rounds, self.device)
        per_row = flops.row_flops(self.config, what)
        rows = []
        for entry in ready:
            taken = timed[entry.contender.name]
            rate = per_row * job.batch / taken.quartiles()["median"]
            rows.append(
                _identity(entry.contender)
                | {"seconds": taken.quartiles(), "calls_per_sample": taken.burst}
                | {"rows_per_second": job.batch / taken.quartiles()["median"], "flops_per_second": rate}
                | {"share_of_bf16_ceiling": rate / self.document["ceilings"]["bf16_flops_per_second"]}
                | entry.facts
                | {"notes": dict(entry.contender.notes)}
            )
        add_speedups(rows, job.precision)
        measured = asdict(job) | {"what": what, "rounds": rounds, "rows_per_domain": supply.counts}
        measured |= {"batches": len(supply.feeds), "flops_per_row": per_row}
        if self.device.type == "cuda":
            measured["feed_seconds"] = _feed_seconds(supply, rounds, self.device)
        return measured | {"contenders": rows}

    def _failed(self, job: Job, name: str | None, own: bool, error: Exception) -> None:
        command.say(f"failed: {name or 'all'}: {_line(error)}")
        self.document["failed"].append(asdict(job) | {"contender": name, "own": own, "error": _line(error)})
        try:
            device.release(self.device)
            device.synchronize(self.device)
        except Exception as lost:
            raise DeviceLost(_line(lost)) from error


def call_of(what: str, contender: DeviceContender, supply: Supply) -> clock.Call:
    """Call number i of a contender, on another batch than the one before."""
    feeds: list[Packed] = supply.ordered_feeds if contender.takes_ordered else supply.feeds
    if isinstance(contender, Graphed):
        replay = contender.replay_forward if what == "forward" else contender.replay_step
        return lambda i: (contender.feed(feeds[i % len(feeds)]), replay())
    plain = contender.forward if what == "forward" else contender.step
    return lambda i: plain(feeds[i % len(feeds)].batch)


def add_speedups(rows: list[dict[str, Any]], precision: str) -> None:
    """How many times faster m3oe_fast is at this precision: launched as the row is, and launched as is fastest."""
    own = {row["launch"]: row["seconds"]["median"] for row in rows if row["own"] and row["precision"] == precision}
    for row in rows:
        median = row["seconds"]["median"]
        row["speedup_of_own"] = median / own[row["launch"]] if row["launch"] in own else None
        row["speedup_of_best_own"] = median / min(own.values()) if own else None


def _identity(contender: DeviceContender) -> Mapping[str, Any]:
    return {name: getattr(contender, name) for name in ("name", "own", "precision", "launch")}


def _facts(contender: DeviceContender, supply: Supply) -> dict[str, Any]:
    """Memory of a step above parameters, gradients, Adam's state and the batch; Triton launches of m3oe_fast."""
    batch = (supply.ordered if contender.takes_ordered else supply.drawn).batch
    if isinstance(contender, Graphed):
        return {"step_extra_bytes": contender.step_bytes}
    launches = {}
    for what, call in {"forward": torch.no_grad()(contender.forward), "step": contender.step}.items():
        call(batch)  # packs weights, makes Adam's state
        before = kernels.launches()
        with device.PeakMemory(batch.dense.device) as memory:
            call(batch)
        launches[f"triton_launches_{what}"] = kernels.launches() - before
    contender.notes |= launches if contender.own else {}
    return {"step_extra_bytes": memory.extra}


def _graphed(forward_of: DeviceContender, step_of: DeviceContender, supply: Supply) -> Graphed:
    feeds = supply.ordered_feeds if forward_of.takes_ordered else supply.feeds
    return Graphed(forward_of, step_of, feeds[0])


def _feed_seconds(supply: Supply, rounds: int, target: torch.device) -> float:
    """What feeding a graph takes by itself; it is part of every replay's time."""
    static, feeds = supply.feeds[0].clone(), supply.feeds
    timed = clock.interleave({"": lambda i: static.buffer.copy_(feeds[i % len(feeds)].buffer)}, rounds, target)
    return timed[""].quartiles()["median"]


def _line(error: BaseException) -> str:
    """The kind of an exception and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300]}" if text else type(error).__name__
