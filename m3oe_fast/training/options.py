"""How to train: the options that the command line and Python share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from m3oe_fast.data.options import option
from m3oe_fast.errors import ConfigError
from m3oe_fast.training.loggers import parse_names

Optimizer = Literal["adam", "adamw"]
EmbeddingOptimizer = Literal["same", "lazy_adam", "row_adagrad"]
Decay = Literal["all", "matrices"]
Schedule = Literal["constant", "linear", "cosine", "step"]
Weighting = Literal["sum", "rows", "given", "uncertainty"]
Bilevel = Literal["off", "joint", "published", "alternating", "first_order", "unrolled", "implicit"]
CudaGraph = Literal["auto", "on", "off"]

HELD_OUT_MODES = ("alternating", "first_order", "unrolled", "implicit")
"""Modes of ``bilevel`` whose outer steps use rows that no inner step sees."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the same for the command line and for Python.

    Raises:
        ConfigError: a field is out of range, or two contradict each other; the message names them.
    """

    epochs: int = option(10, "Passes over the training rows, at most.")
    batch_size: int = option(4096, "Rows per batch.")
    accumulate: int = option(
        1,
        "Batches per step. The step is that of one large batch: the mean of each (domain, task) pair is taken over "
        "the labelled rows of all its batches.",
    )
    lr: float = option(1e-3, "Learning rate of the network.")
    schedule: Schedule = option(
        "constant",
        "How the learning rate goes on after the warm-up: constant; linear or cosine (down to 0 at the last of "
        "--epochs); step (times --schedule_gamma every --schedule_step epochs). The fusion weights keep theirs.",
    )
    warmup: int = option(0, "Steps in which the learning rate grows linearly to its value.")
    schedule_step: int = option(1, "step: epochs between two cuts of the learning rate.")
    schedule_gamma: float = option(0.5, "step: factor of each cut.")
    optimizer: Optimizer = option("adam", "adam (weight decay as an L2 term) or adamw (decoupled).")
    weight_decay: float = option(
        1e-5,
        "Weight decay of the network; the fusion weights have none. lazy_adam and row_adagrad decay, as an L2 term, "
        "only the rows in the batch.",
    )
    decay: Decay = option(
        "all", "What weight decay holds for: all (published code), or matrices (not biases and LayerNorm)."
    )
    clip_norm: float | None = option(
        None, "Scale the network's gradient so that its norm is at most this (default: leave it)."
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
    loss_weighting: Weighting = option(
        "sum",
        "How the mean losses of the (domain, task) pairs are summed: sum (each counts 1, paper); rows (every labelled "
        "row counts the same); given (--pair_weights); uncertainty (learned, Kendall et al. 2018).",
    )
    pair_weights: str | None = option(
        None,
        "given: weights of pairs, of a task in all domains, or of a domain in all tasks, the last that fits counts and "
        "others are 1; for example like=0.5,home/like=2,live/*=3.",
    )
    patience: int = option(3, "Stop after this many epochs without a better mean validation AUC; 0 never stops early.")
    bilevel: Bilevel = option(
        "alternating",
        "How the fusion weights (alpha, beta) are trained: off (they stay as they start); joint (with the network, on "
        "the same batches); published (one step an epoch, on a training batch); and on training rows that the network "
        "never sees, every --outer_every steps: alternating, first_order, unrolled (both as in DARTS) or implicit "
        "(Neumann series). docs/bilevel.md compares them.",
    )
    fusion_lr: float = option(1e-3, "Learning rate of the fusion weights.")
    outer_every: int = option(20, "Steps of the network to one step of the fusion weights, where they have their own.")
    outer_fraction: float = option(
        0.05, "Share of the training rows held out for the steps of the fusion weights, at most a million rows."
    )
    neumann_terms: int = option(5, "implicit: terms of the Neumann series.")
    unroll_rate: float | None = option(
        None,
        "unrolled, implicit: rate of the network's virtual steps (default: implicit the learning rate, unrolled a "
        "tenth of it, which is what Adam's next step makes of a gradient).",
    )
    cuda_graph: CudaGraph = option(
        "auto",
        "On a GPU, steps are captured once as a CUDA graph and replayed: auto (where possible), on (or an error that "
        "says why not) or off.",
    )
    shuffle_window: int = option(
        0,
        "Rows shuffled together. 0: all, for logs of up to 8 million training rows; larger ones are read from disk "
        "block by block through a window of about a million rows, so that memory stays bounded.",
    )
    prefetch: int = option(2, "Batches read ahead in the background; 0 reads them when they are needed.")
    checkpoint_every: int = option(
        1000, "Steps between two checkpoints inside an epoch; 0 writes one at the end of each epoch only."
    )
    keep_last: int = option(
        1, "With 2 or more, checkpoints/epoch-N is kept of so many of the newest epochs, besides last and best."
    )
    logger: str = option(
        "", "Where else the numbers go, beside CSV and JSON lines: tensorboard, wandb, tensorboard,wandb, or none."
    )
    profile: bool = option(False, "Measure where the time goes and write profile.json.")
    seed: int = option(2022, "Seed of the first weights and of the order of the rows.")

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_numbers()
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not isinstance(self.profile, bool):
            raise ConfigError(f"profile must be true or false, got {self.profile!r}")
        for name in ("logger", "pair_weights"):
            if not isinstance(getattr(self, name), str | type(None)):
                raise ConfigError(f"{name} must be text, got {getattr(self, name)!r}")
        parse_names(self.logger)
        self._check_together()

    def _check_integers(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")

    def _check_numbers(self) -> None:
        for name in (*_ABOVE_0, "weight_decay", "outer_fraction"):
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ConfigError(f"{name} must be a finite number, got {value!r}")
            if name in _ABOVE_0 and value <= 0:
                raise ConfigError(f"{name} must be above 0, got {value!r}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if not 0 < self.outer_fraction < 1:
            raise ConfigError(f"outer_fraction must be between 0 and 1, got {self.outer_fraction!r}")

    def _check_together(self) -> None:
        if self.embedding_optimizer == "same" and self.embedding_lr is not None:
            raise ConfigError(
                f"embedding_lr must be left out with embedding_optimizer same, got {self.embedding_lr!r}: that trains "
                "the table with lr; choose lazy_adam or row_adagrad"
            )
        if (self.loss_weighting == "given") != (self.pair_weights is not None):
            raise ConfigError(
                "loss_weighting given and pair_weights go together: name weights such as like=0.5, or drop both"
            )
        if self.bilevel in ("unrolled", "implicit") and self.embedding_optimizer != "same":
            raise ConfigError(
                f"bilevel {self.bilevel} needs embedding_optimizer same, got {self.embedding_optimizer}: its virtual "
                "steps move the whole table; choose same, or bilevel alternating"
            )

    @property
    def table_lr(self) -> float:
        """Learning rate of the embedding table."""
        return self.lr if self.embedding_lr is None else self.embedding_lr

    @property
    def holds_out(self) -> bool:
        """Whether some training rows are kept for the fusion weights alone."""
        return self.bilevel in HELD_OUT_MODES


_LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "accumulate": 1,
    "warmup": 0,
    "schedule_step": 1,
    "patience": 0,
    "outer_every": 1,
    "neumann_terms": 0,
    "shuffle_window": 0,
    "prefetch": 0,
    "checkpoint_every": 0,
    "keep_last": 1,
    "seed": 0,
}
_ABOVE_0 = ("lr", "fusion_lr", "schedule_gamma", "clip_norm", "embedding_lr", "unroll_rate")
_OPTIONAL = ("clip_norm", "embedding_lr", "unroll_rate")
_CHOICES: dict[str, Any] = {
    "optimizer": Optimizer,
    "embedding_optimizer": EmbeddingOptimizer,
    "decay": Decay,
    "schedule": Schedule,
    "loss_weighting": Weighting,
    "bilevel": Bilevel,
    "cuda_graph": CudaGraph,
}
