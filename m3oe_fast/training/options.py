"""How to train: the options that the command line and Python share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from m3oe_fast.data.options import option
from m3oe_fast.errors import ConfigError

Optimizer = Literal["adam", "adamw"]
EmbeddingOptimizer = Literal["same", "lazy_adam", "row_adagrad"]
Bilevel = Literal["off", "published", "alternating"]
CudaGraph = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the same for the command line and for Python.

    Raises:
        ConfigError: a field is out of range; the message names it.
    """

    epochs: int = option(10, "Passes over the training rows, at most.")
    batch_size: int = option(4096, "Rows per step.")
    lr: float = option(1e-3, "Learning rate of the network.")
    fusion_lr: float = option(1e-3, "Learning rate of the fusion weights (alpha and beta).")
    optimizer: Optimizer = option("adam", "adam (weight decay as an L2 term) or adamw (decoupled).")
    weight_decay: float = option(
        1e-5,
        "Weight decay of the network; the fusion weights have none. lazy_adam and row_adagrad decay, as an L2 term, "
        "only the rows in the batch.",
    )
    embedding_optimizer: EmbeddingOptimizer = option(
        "same",
        "What trains the embedding table: same (the network's optimizer, every row in every step, as in the published "
        "code), lazy_adam or row_adagrad (only the rows in the batch, for large tables).",
    )
    embedding_lr: float | None = option(
        None,
        "lazy_adam, row_adagrad: learning rate of the embedding table (default: --lr); 1e-2 is usual for row_adagrad.",
    )
    patience: int = option(3, "Stop after this many epochs without a better mean validation AUC; 0 never stops early.")
    bilevel: Bilevel = option(
        "alternating",
        "Outer steps, which train the fusion weights: alternating (every --outer_every steps, on "
        "training rows that the network never sees), published (once an epoch, on one training "
        "batch) or off (they stay as they start).",
    )
    outer_every: int = option(50, "alternating: steps of the network between two outer steps.")
    outer_fraction: float = option(0.05, "alternating: share of the training rows held out for the outer steps.")
    cuda_graph: CudaGraph = option(
        "auto",
        "On a GPU, steps are captured once as a CUDA graph and replayed: auto (where possible), on (or an error that "
        "says why not) or off.",
    )
    seed: int = option(2022, "Seed of the first weights and of the order of the rows.")

    def __post_init__(self) -> None:
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("patience", 0),
            ("outer_every", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        rates = ["lr", "fusion_lr", *([] if self.embedding_lr is None else ["embedding_lr"])]
        for name in (*rates, "weight_decay", "outer_fraction"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, got {value!r}")
        for name in rates:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if not 0 < self.outer_fraction < 1:
            raise ConfigError(f"outer_fraction must be between 0 and 1, got {self.outer_fraction!r}")
        for name, choices in (
            ("optimizer", get_args(Optimizer)),
            ("embedding_optimizer", get_args(EmbeddingOptimizer)),
            ("bilevel", get_args(Bilevel)),
            ("cuda_graph", get_args(CudaGraph)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.embedding_optimizer == "same" and self.embedding_lr is not None:
            raise ConfigError(
                f"embedding_lr must be left out with embedding_optimizer same, got {self.embedding_lr!r}: that trains "
                "the table with lr; choose lazy_adam or row_adagrad"
            )

    @property
    def table_lr(self) -> float:
        """Learning rate of the embedding table."""
        return self.lr if self.embedding_lr is None else self.embedding_lr
