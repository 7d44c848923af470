"""PLE: progressive layered extraction (Tang et al., RecSys 2020).

Every (domain, task) pair gates the shared experts and its own; see `specific.py`. One level is the paper's customized
gate control (CGC) and runs through the kernels, more levels are PLE proper and run in eager PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from m3oe_fast.models.specific import SpecificConfig, SpecificModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLEConfig(SpecificConfig):
    """Sizes of one PLE model.

    Attributes:
        shared_experts: K >= 0 experts of all pairs.
    """

    name: ClassVar[str] = "ple"
    minima: ClassVar[Mapping[str, int]] = {**SpecificConfig.minima, "shared_experts": 0}

    shared_experts: int = 4

    @property
    def num_shared(self) -> int:
        """K."""
        return self.shared_experts

    def gated_by(self, d: int, t: int) -> list[int]:
        """The shared experts and the pair's own."""
        return [*range(self.shared_experts), *self.own_experts(d, t)]


class PLE(SpecificModel):
    """Progressive layered extraction. Arguments: `RankingModel`."""

    config_type = PLEConfig
