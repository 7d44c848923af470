"""AdaTT and AdaTT-sp: adaptive task-to-task fusion (Li et al., KDD 2023).

Every (domain, task) pair gates the experts of all pairs (AllExpertGF) and adds its own, linearly weighted
(NativeExpertLF); see `specific.py`. AdaTT has shared experts beside them, AdaTT-sp has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from m3oe_fast.folded import NetworkWeights, StarFold
from m3oe_fast.models.specific import SpecificConfig, SpecificModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaTTSpConfig(SpecificConfig):
    """Sizes of one AdaTT-sp model."""

    name: ClassVar[str] = "adatt_sp"

    def gated_by(self, d: int, t: int) -> list[int]:
        """All."""
        return list(range(self.num_experts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaTTConfig(AdaTTSpConfig):
    """Sizes of one AdaTT model.

    Attributes:
        shared_experts: K >= 0 experts of all pairs.
    """

    name: ClassVar[str] = "adatt"
    minima: ClassVar[Mapping[str, int]] = {**SpecificConfig.minima, "shared_experts": 0}

    shared_experts: int = 4

    @property
    def num_shared(self) -> int:
        """K."""
        return self.shared_experts


class AdaTTSp(SpecificModel):
    """Adaptive task-to-task fusion without shared experts. Arguments: `RankingModel`."""

    config_type: ClassVar[type[SpecificConfig]] = AdaTTSpConfig

    def make_parameters(self, c: SpecificConfig) -> None:
        """See `specific.py`."""
        super().make_parameters(c)
        self.add_parameter("native_weight", c.levels, c.num_domains, c.num_tasks, c.specific_experts)
        own = [[c.own_experts(d, t) for t in range(c.num_tasks)] for d in range(c.num_domains)]
        self.register_buffer("_own", torch.tensor(own, dtype=torch.int64), persistent=False)

    def reset_network(self) -> None:
        """As the others; a pair starts with the mean of its own experts."""
        super().reset_network()
        nn.init.constant_(self.native_weight, 1 / self.config.specific_experts)

    def weights(self, star_fold: StarFold) -> NetworkWeights:
        """The arguments of the network op; the native weights are its coefficient table."""
        return super().weights(star_fold)._replace(table=self.table.scatter(2, self._own, self.native_weight[0]))

    def multiply_adds(self) -> int:
        """As in `RankingModel`; what a pair takes of its own experts beside its gate adds nothing on one level."""
        c = self.config
        native = c.num_pairs * c.specific_experts * c.expert_dim * c.levels
        return super().multiply_adds() + (native if c.levels > 1 else 0)


class AdaTT(AdaTTSp):
    """Adaptive task-to-task fusion with shared experts. Arguments: `RankingModel`."""

    config_type = AdaTTConfig
