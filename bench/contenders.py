"""The list of contenders, weakest first; the last one is m3oe_fast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.compiled import CompiledContender
from bench.contender import Contender
from bench.eager import FoldedContender, OwnContender, PublishedContender
from bench.workload import Workload

COMPILE_MODES = ("default", "max-autotune")
BUILDERS: dict[str, Callable[[Workload], Contender]] = {
    "published": PublishedContender,
    "folded": FoldedContender,
    "compiled": lambda workload: CompiledContender(workload, "default"),
    "compiled-max-autotune": lambda workload: CompiledContender(workload, "max-autotune"),
    "m3oe_fast": OwnContender,
}


def keys(compile_modes: Sequence[str]) -> list[str]:
    """The contenders of a run with these torch.compile modes; no mode leaves torch.compile out."""
    left_out = {_key(mode) for mode in COMPILE_MODES} - {_key(mode) for mode in compile_modes}
    return [key for key in BUILDERS if key not in left_out]


def _key(mode: str) -> str:
    return "compiled" if mode == "default" else f"compiled-{mode}"
