"""The list of contenders, weakest first; the last one is m3oe_fast."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from bench.autocast import AutocastContender
from bench.compiled import CompiledContender
from bench.contender import Contender
from bench.eager import FoldedContender, OwnContender, PublishedContender
from bench.workload import Workload

COMPILE_MODES = ("default", "max-autotune")
OWN = "m3oe_fast"
BUILDERS: dict[str, Callable[..., Contender]] = {
    "published": PublishedContender,
    "folded": FoldedContender,
    "compiled": lambda workload: CompiledContender(workload, "default"),
    "compiled-max-autotune": lambda workload: CompiledContender(workload, "max-autotune"),
    OWN: OwnContender,
}


def keys(compile_modes: Sequence[str]) -> list[str]:
    """The contenders of a run with these torch.compile modes; no mode leaves torch.compile out."""
    left_out = {_key(mode) for mode in COMPILE_MODES} - {_key(mode) for mode in compile_modes}
    return [key for key in BUILDERS if key not in left_out]


def build(key: str, workload: Workload, precision: str = "fp32") -> Contender:
    """A contender of a section: m3oe_fast at its precision, against bf16 what PyTorch has for it, else fp32.

    The published style stays in fp32 in every section: it is the opponent of record.
    """
    if key == OWN:
        return BUILDERS[key](workload, precision)
    contender = BUILDERS[key](workload)
    if precision != "bf16":
        return contender
    if key != "published":
        return AutocastContender(contender)
    contender.name += ", fp32"
    return contender


def add_compile_mode(parser: argparse.ArgumentParser) -> None:
    """The option that says which torch.compile contenders take part."""
    parser.add_argument(
        "--compile-mode",
        nargs="*",
        choices=COMPILE_MODES,
        default=["default"],
        help="torch.compile modes, one contender each; none leaves torch.compile out",
    )


def _key(mode: str) -> str:
    return "compiled" if mode == "default" else f"compiled-{mode}"
