"""What every model is as an nn.Module: embeddings, the choice of backend, loss, prediction and files.

Parameters are stacked over experts, domains and tasks, so the kernels take them as they are and a checkpoint does not
depend on the backend. `models/` holds the kinds of models.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3oe_fast import _extension, backends, checkpoint, kernels
from m3oe_fast.bags import Bags, pool
from m3oe_fast.config import ModelConfig
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.folded import NetworkWeights, StarFold
from m3oe_fast.packed import PackedCache, PackedWeights
from m3oe_fast.reference import pair_losses

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from typing_extensions import Self

    from m3oe_fast.data import Encoder
    from m3oe_fast.ops import Lookup

SCORED_AT_ONCE = 65_536
"""Rows of a frame that `score` embeds at once: 30 MB at the published sizes."""

BagFields = Sequence[tuple[Tensor, Tensor]]
"""For each bag (values [n], offsets [B+1]), as in `Bags.fields`; `m3oe_fast.data.batch.Bag` is such a pair."""


class Scorer(nn.Module):
    """What scores raw rows: a model, or several that share the rows.

    Attributes:
        encoder: the vocabularies; None where it was never trained on prepared data.
    """

    encoder: Encoder | None = None

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return next(self.parameters()).device

    def predict(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields = ()) -> Tensor:
        """Probabilities float32 [B, T]."""
        raise NotImplementedError

    def check_inputs(self) -> None:
        """Raise for ids and domains out of range in what ran on a GPU since the last check."""
        raise NotImplementedError

    def score(self, frame: pd.DataFrame) -> np.ndarray:
        """Probabilities [rows, T] of raw log rows, through the vocabularies saved with the model.

        Raises:
            ConfigError: the model has no encoder (it was never trained on prepared data).
            DataError: a column is missing or malformed.
        """
        if self.encoder is None:
            raise ConfigError("this model holds no vocabularies; set model.encoder, or load a trained run")
        batch = self.encoder.transform(frame)
        device = self.device
        starts = range(0, max(len(frame), 1), SCORED_AT_ONCE)
        chunks = (batch.rows(start, start + SCORED_AT_ONCE).map(lambda rows: rows.to(device)) for start in starts)
        parts = [self.predict(*chunk.inputs).cpu() for chunk in chunks]
        self.check_inputs()
        return torch.cat(parts).numpy()


class RankingModel(Scorer):
    """What all models have in common: tables, the choice of backend, loss, prediction and files.

    A subclass names its configuration and gives `make_parameters`, `reset_network`, `reference` and `multiply_adds`;
    where the kernels can compute it (`ModelConfig.fused`), also `weights`.

    Args:
        config: sizes and switches.
        backend: "auto", "cpu" (compiled), "triton" (GPU), "reference" (eager PyTorch, the oracle). A model that is no
            configuration of the kernels runs in eager PyTorch.
        precision: of the products' operands: "fp32", "bf16x3" (each split into two bf16: fp32-class), "tf32" (backend
            triton only) or "bf16"; sums, LayerNorm, softmax, loss and weights are fp32 in all. It wins over autocast.
            Where the processor has no fast instructions for it, it computes in fp32 and says so once
            (`compute_precision`).
        sparse_grad: the gradients of the tables (`table_parameters`) are sparse tensors of the rows in the batch, for
            tables of millions of rows; use an optimizer of `m3oe_fast.optim` for them. That of `embedding` is
            coalesced. Not under torch.compile.

    Raises:
        ConfigError: unknown backend or precision.
        BackendError: the requested backend cannot run here; every reason is listed. Backend triton on a CPU is refused
            by the first call only, so that a model can be made and then moved: `M3oE(config, "triton").to("cuda")`.
    """

    config_type: ClassVar[type[ModelConfig]]
    reference: ClassVar[Callable[..., Tensor]]
    """(parameters by name, config, x [B, I], domain [B], matmul) to logits [B, T]: the oracle, in any dtype."""

    def __init__(
        self, config: ModelConfig, backend: str = "auto", precision: str = "fp32", sparse_grad: bool = False
    ) -> None:
        super().__init__()
        if type(config) is not self.config_type:
            raise ConfigError(f"{type(self).__name__} takes a {self.config_type.__name__}, got {type(config).__name__}")
        self.config = config
        self.backend = backend
        self.precision = precision
        self.sparse_grad = sparse_grad
        self._packed = PackedCache()
        self.embedding = nn.Parameter(torch.empty(sum(config.vocab_sizes), config.embed_dim))
        if config.bag_vocab_sizes:
            self.bag_embedding = nn.Parameter(torch.empty(sum(config.bag_vocab_sizes), config.embed_dim))
        self.make_parameters(config)
        self.reset_parameters()
        first_id = torch.tensor([0, *config.vocab_sizes[:-1]]).cumsum(0) if config.vocab_sizes else torch.empty(0)
        self.register_buffer("_first_row", first_id.to(torch.int64), persistent=False)
        self.register_buffer("_vocab", torch.tensor(config.vocab_sizes, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_weights_loaded)
        self._served: tuple[tuple[str, torch.device, torch.dtype, str], str] | None = None
        if not (backend == "triton" and config.fused and self.embedding.device.type == "cpu"):
            self._choose_backend()  # else the first call does, as the model may be about to move to a GPU

    # What a kind of model gives ------------------------------------------------------------------------------------

    def make_parameters(self, c: Any) -> None:
        """Register every parameter but the tables, empty."""
        raise NotImplementedError

    def reset_network(self) -> None:
        """First values of what `make_parameters` registered."""
        raise NotImplementedError

    def weights(self, star_fold: StarFold) -> NetworkWeights:
        """The arguments of the network op, differentiable in the parameters; of fused models only."""
        raise NotImplementedError

    def multiply_adds(self) -> int:
        """Multiply-adds of a row's forward pass behind the embedding lookup, for its own domain alone: of the products,
        the gates' and experts' weighted sums included. Without what depends on parameters only."""
        raise NotImplementedError

    @property
    def gate_mask(self) -> Tensor | None:
        """bool [D, T, G]: the experts each softmax of the op ranges over; None: all."""
        return None

    @property
    def gate_detach(self) -> bool:
        """No gradient flows from the op's gates into what they read."""
        return False

    @property
    def star_linear(self) -> bool:
        """The op's star term goes without LayerNorm and ReLU."""
        return False

    # Parameters ----------------------------------------------------------------------------------------------------

    def add_parameter(self, name: str, *shape: int) -> None:
        """Register an empty parameter."""
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def add_normed(self, name: str, *shape: int) -> None:
        """Register bias, gain and offset, all of one shape, of a layer with LayerNorm."""
        for part in ("bias", "gain", "offset"):
            self.add_parameter(f"{name}_{part}", *shape)

    def add_layers(self, name: str, count: int, widths: Sequence[int]) -> None:
        """Register `count` stacks of Linear and LayerNorm, as lists by layer: `name`_weight [count, in, out] and
        `name`_bias, `name`_gain and `name`_offset [count, out]."""
        layers = list(itertools.pairwise(widths))
        weights = [nn.Parameter(torch.empty(count, i, o)) for i, o in layers]
        setattr(self, f"{name}_weight", nn.ParameterList(weights))
        for part in ("bias", "gain", "offset"):
            vectors = [nn.Parameter(torch.empty(count, o)) for _, o in layers]
            setattr(self, f"{name}_{part}", nn.ParameterList(vectors))

    def reset_layers(self, *names: str) -> None:
        """First values of stacks that `add_layers` registered: as torch.nn.Linear and torch.nn.LayerNorm."""
        for name in names:
            for weight, bias in zip(getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), strict=True):
                uniform_linear(weight.shape[1], weight, bias)
            reset_norm(*getattr(self, f"{name}_gain"), offsets=getattr(self, f"{name}_offset"))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """First values: embeddings N(0, 1e-4) as published, then those of the kind of model."""
        for table in self.table_parameters():
            nn.init.normal_(table, 0.0, 1e-4)
        self.reset_network()

    def _choose_backend(self) -> str:
        """Decided once per request, device and dtype: a traced graph then holds a comparison, not the decision."""
        request = (self.backend, self.embedding.device, self.embedding.dtype, self.precision)
        if self._served is None or self._served[0] != request:
            if self.config.fused:
                served = backends.choose(*request)
            else:
                served = backends.choose_eager(*request, self.config.name)
            self._served = (request, served)
            if served != "reference":
                from m3oe_fast.ops import load

                load(served)
            backends.warn_if_fp32(served, self.precision)
        return self._served[1]

    # What runs ----------------------------------------------------------------------------------------------------

    @property
    def backend_name(self) -> str:
        """The backend that serves this model where it lies now."""
        return self._choose_backend()

    @property
    def isa_name(self) -> str | None:
        """Instruction set of the compiled CPU kernels, None on other backends."""
        if self.backend_name != "cpu":
            return None
        return "scalar" if self.embedding.dtype == torch.float64 else _extension.load().cpu_isa()

    @property
    def compute_precision(self) -> str:
        """What the products really compute in: `precision`, or "fp32" where the processor has nothing faster for it."""
        return backends.compute_precision(self.backend_name, self.precision)

    def fusion_parameters(self) -> list[nn.Parameter]:
        """The fusion logits: what the outer level of the bi-level optimisation trains. Empty where a model has none."""
        return []

    def network_parameters(self) -> list[nn.Parameter]:
        """Every parameter but the fusion logits."""
        fusion = {id(p) for p in self.fusion_parameters()}
        return [p for p in self.parameters() if id(p) not in fusion]

    def table_parameters(self) -> list[nn.Parameter]:
        """The embedding tables [rows, N], those of `network_parameters` whose gradients `sparse_grad` makes sparse: of
        the id fields and, where there are bags, of the bags."""
        return [self.embedding, *([self.bag_embedding] if self.config.bag_vocab_sizes else [])]

    def fusion_values(self) -> dict[str, float | list[float] | list[list[float]]]:
        """The fusion weights after the sigmoid, by name: a number, one per domain or task, or [D][T]."""
        return {}

    # Computation --------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor, dense: Tensor, bags: BagFields = ()) -> Tensor:
        """x [B, I]: the embeddings in field order, the pooled bags, then the dense columns. The kernels look the first
        up by themselves."""
        parts = [dense]
        pooled = self._bags(bags)
        if pooled is not None:
            parts.insert(0, pool(pooled, dense.shape[0]))
        if self.config.vocab_sizes:
            rows = F.embedding(ids + self._first_row, self.embedding, sparse=self.sparse_grad)
            parts.insert(0, rows.flatten(1))
        return torch.cat(parts, dim=1)

    def forward(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields = ()) -> Tensor:
        """Logits.

        Args:
            ids: int32 or int64 [B, F], each in [0, vocab_sizes[f]).
            dense: float32 [B, C].
            domain: int32 or int64 [B] in [0, D).
            bags: for each bag (values [n], offsets [B+1]), int32 or int64: row b holds
                values[offsets[b] : offsets[b + 1]], each in [0, bag_vocab_sizes[i]). A row without any pools to zeros.

        Returns:
            float32 [B, T].

        Raises:
            ValueError, TypeError: a wrong shape, dtype or id; names the argument, row and field.
        """
        self._check_inputs(ids, dense, domain, bags)
        if self.backend_name == "reference":
            return self._reference_logits(ids, dense, domain, bags)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._differentiable_logits(ids, dense, domain, bags)
        return self._infer(ids, dense, domain, bags, probability=False)

    def _reference_logits(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields) -> Tensor:
        with _precision_of_the_model(ids.device.type):
            x = self.embed(ids, dense.to(self.embedding.dtype), bags)
            return type(self).reference(dict(self.named_parameters()), self.config, x, domain)

    def _differentiable_logits(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields) -> Tensor:
        from m3oe_fast.ops import network  # loads the compiled module, which backend "reference" does without

        self._packed.drop()
        with _precision_of_the_model(ids.device.type), _values_as_value_error():
            weights = self._op_weights()
            dense = dense.to(self.embedding.dtype)
            parts = {"lookup": self._lookup(ids), "bags": self._bags(bags)}
            return network(dense, domain, weights, **parts, backend=self.backend_name, **self._switches)

    def _infer(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields, probability: bool) -> Tensor:
        """Without gradients and from cached weights. Everything here is paid per call, also for one row."""
        from m3oe_fast.ops import infer

        if self.training:
            weights, packed = self._pack()
        else:
            weights, packed = self._packed.get(self._all_parameters(), self.precision, self._pack)
        try:
            return infer(
                dense.to(packed.dtype),
                domain,
                weights,
                packed,
                lookup=self._lookup(ids),
                bags=self._bags(bags),
                gate_mask=self.gate_mask,
                star_linear=self.star_linear,
                precision=self.precision,
                probability=probability,
                backend=self.backend_name,
            )
        except RuntimeError as error:
            raise _as_value_error(error) from None

    def _pack(self) -> PackedWeights:
        from m3oe_fast.ops import pack

        with torch.no_grad(), _precision_of_the_model(self.embedding.device.type):
            weights = self._op_weights()
            packed = pack(
                weights,
                self.config.input_dim,
                gate_mask=self.gate_mask,
                star_linear=self.star_linear,
                precision=self.precision,
                backend=self.backend_name,
            )
        return PackedWeights(weights.flat(), packed)

    def _op_weights(self) -> NetworkWeights:
        from m3oe_fast.ops import star_fold

        return self.weights(functools.partial(star_fold, backend=self.backend_name))

    def _all_parameters(self) -> list[Tensor]:
        """Every parameter; `parameters()` walks the modules, which takes longer than scoring a row."""
        lists = [p for module in self._modules.values() for p in module._parameters.values()]
        return [*self._parameters.values(), *lists]

    def _lookup(self, ids: Tensor) -> Lookup | None:
        from m3oe_fast.ops import Lookup

        vocab = self.config.vocab_sizes
        return Lookup(ids, self.embedding, vocab, self.sparse_grad) if vocab else None

    def _bags(self, fields: BagFields) -> Bags | None:
        c = self.config
        if not c.bag_vocab_sizes:
            return None
        return Bags(fields, self.bag_embedding, c.bag_vocab_sizes, c.bag_pooling, self.sparse_grad)

    def drop_packed_weights(self) -> None:
        """Forget the weights kept between predictions in `eval()` mode. Needed only after a write through `.data`, or
        from outside torch, to a model that made predictions before and stayed in that mode; every other change is
        noticed (see `packed.py`).
        """
        self._packed.drop()

    def train(self, mode: bool = True) -> Self:
        """As torch.nn.Module.train; also forgets the weights kept for predictions."""
        self._packed.drop()
        return super().train(mode)

    @property
    def _switches(self) -> dict[str, Any]:
        return {
            "gate_mask": self.gate_mask,
            "star_linear": self.star_linear,
            "gate_detach": self.gate_detach,
            "precision": self.precision,
        }

    def loss(
        self,
        ids: Tensor,
        dense: Tensor,
        domain: Tensor,
        label: Tensor,
        row_weight: Tensor | None = None,
        bags: BagFields = (),
        pair_weight: Tensor | None = None,
    ) -> Tensor:
        """Sum over (domain, task) of the mean binary cross-entropy over the pair's labelled rows (paper, eq. 12).

        Args:
            ids, dense, domain, bags: as for `forward`.
            label: float32 [B, T] in [0, 1]; NaN = not observed.
            row_weight: optional floating point [B]; weighs a row's loss, not the count it is divided by.
            pair_weight: optional floating point [D, T]; what each pair's mean is multiplied with in the sum.
                Differentiable.

        Returns:
            A differentiable scalar; a pair without a labelled row adds nothing.
        """
        return self.losses(ids, dense, domain, label, row_weight, bags, pair_weight)[0]

    def losses(
        self,
        ids: Tensor,
        dense: Tensor,
        domain: Tensor,
        label: Tensor,
        row_weight: Tensor | None = None,
        bags: BagFields = (),
        pair_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`loss`, and the mean of every pair that it sums: [D, T] before `pair_weight`, without gradient, 0 for a pair
        without a labelled row. Arguments as for `loss`."""
        self._check_inputs(ids, dense, domain, bags)
        self._check_targets(ids.shape[0], label, row_weight, pair_weight)
        one_pass = torch.is_grad_enabled() and self.backend_name != "reference"
        if one_pass and not (row_weight is not None and row_weight.requires_grad):
            return self._one_pass_losses(ids, dense, domain, label, row_weight, bags, pair_weight)
        logits = self.forward(ids, dense, domain, bags)
        label = label.to(logits.dtype)
        pair_loss = pair_losses(logits, domain, label, self.config.num_domains, row_weight)
        weighted = pair_loss if pair_weight is None else pair_loss * pair_weight.to(logits.dtype)
        return weighted.sum(), pair_loss.detach()

    def _one_pass_losses(
        self,
        ids: Tensor,
        dense: Tensor,
        domain: Tensor,
        label: Tensor,
        row_weight: Tensor | None,
        bags: BagFields,
        pair_weight: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        from m3oe_fast.ops import network_loss

        self._packed.drop()
        dtype = self.embedding.dtype
        with _precision_of_the_model(ids.device.type), _values_as_value_error():
            weights = self._op_weights()
            return network_loss(
                dense.to(dtype),
                domain,
                label.to(dtype),
                weights,
                lookup=self._lookup(ids),
                bags=self._bags(bags),
                row_weight=None if row_weight is None else row_weight.to(dtype),
                pair_weight=None if pair_weight is None else pair_weight.to(dtype),
                backend=self.backend_name,
                **self._switches,
            )

    @torch.no_grad()
    def predict(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields = ()) -> Tensor:
        """Probabilities float32 [B, T], without gradients. Arguments as for `forward`.

        In `eval()` mode, which `M3oE.load` returns, the folded and packed weights are kept from one call to the next; a
        batch of one row is then many times faster.
        """
        if self.backend_name == "reference" or torch.compiler.is_compiling():
            return torch.sigmoid(self.forward(ids, dense, domain, bags))
        self._check_inputs(ids, dense, domain, bags)
        return self._infer(ids, dense, domain, bags, probability=True)

    def check_inputs(self) -> None:
        """Raise for ids and domains out of range in what ran on this model's GPU since the last check.

        A step on a GPU cannot stop to raise, so it uses the nearest id or domain instead and remembers. `score` and
        training call this; it waits for the device. On a CPU every call raises by itself.

        Raises:
            ValueError: names row and field.
        """
        if self.embedding.device.type == "cuda":
            kernels.check_inputs(self.embedding.device)

    def _check_inputs(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields) -> None:
        c = self.config
        if ids.ndim != 2 or ids.shape[1] != len(c.vocab_sizes):
            raise ValueError(f"ids must be [B, F] with F = {len(c.vocab_sizes)}, got {list(ids.shape)}")
        if dense.shape != (ids.shape[0], c.num_dense):
            raise ValueError(f"dense must be [B, C] = [{ids.shape[0]}, {c.num_dense}], got {list(dense.shape)}")
        if domain.shape != ids.shape[:1]:
            raise ValueError(f"domain must be [B] = [{ids.shape[0]}], got {list(domain.shape)}")
        if len(bags) != len(c.bag_vocab_sizes):
            raise ValueError(f"bags must hold {len(c.bag_vocab_sizes)} pairs (values, offsets), got {len(bags)}")
        for name, tensor in (("ids", ids), ("domain", domain)):
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
        if not dense.dtype.is_floating_point:
            raise TypeError(f"dense must be floating point, got {dense.dtype}")
        if ids.device.type != "cpu" or self.backend_name == "cpu":
            return  # reading values would stall the GPU (see `check_inputs`); the compiled op checks them itself
        if torch.compiler.is_compiling():
            # A graph cannot branch on values, but it can stop: an id past its field is a row of the next one.
            torch._assert_async(((ids >= 0) & (ids < self._vocab)).all(), "an id is beyond the vocabulary of its field")
            known = (domain >= 0) & (domain < c.num_domains)  # -1 would be the last one
            torch._assert_async(known.all(), "a domain is none of the model's")
        else:
            self._check_values(ids, domain)

    def _check_values(self, ids: Tensor, domain: Tensor) -> None:
        wrong = (ids < 0) | (ids >= self._vocab)
        if wrong.any():
            row, field = wrong.nonzero()[0].tolist()
            size = self.config.vocab_sizes[field]
            raise ValueError(f"ids[{row}, {field}] is {ids[row, field].item()}, field {field} has {size} rows")
        wrong = (domain < 0) | (domain >= self.config.num_domains)
        if wrong.any():
            row = wrong.nonzero()[0].item()
            raise ValueError(f"domain[{row}] is {domain[row].item()}, the model has {self.config.num_domains} domains")

    def _check_targets(self, rows: int, label: Tensor, row_weight: Tensor | None, pair_weight: Tensor | None) -> None:
        c = self.config
        if row_weight is not None and (row_weight.shape != (rows,) or not row_weight.dtype.is_floating_point):
            raise ValueError(f"row_weight must be floating point [B] = [{rows}], got {list(row_weight.shape)}")
        pairs = (c.num_domains, c.num_tasks)
        if pair_weight is not None and (pair_weight.shape != pairs or not pair_weight.dtype.is_floating_point):
            raise ValueError(
                f"pair_weight must be floating point [D, T] = {list(pairs)}, got "
                f"{pair_weight.dtype} {list(pair_weight.shape)}"
            )
        if label.shape != (rows, c.num_tasks):
            raise ValueError(f"label must be [B, T] = [{rows}, {c.num_tasks}], got {list(label.shape)}")
        if label.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_label(label)

    @staticmethod
    def _check_label(label: Tensor) -> None:
        wrong = (label < 0) | (label > 1)  # false for NaN
        if wrong.any():
            row, task = wrong.nonzero()[0].tolist()
            raise ValueError(f"label[{row}, {task}] is {label[row, task].item()}, expected 0 to 1 or NaN")

    # Files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str], trainer_state: dict[str, Any] | None = None) -> None:
        """Write `folder`/model.pt: weights, configuration, vocabularies; enough to score raw rows.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        content = {
            "model": self.config.name,
            "config": self.config.to_dict(),
            "weights": self.state_dict(),
            "encoder": None if self.encoder is None else self.encoder.to_dict(),
            "trainer": trainer_state,
        }
        checkpoint.write(Path(folder) / checkpoint.FILE_NAME, content)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        precision: str = "fp32",
        sparse_grad: bool = False,
    ) -> Self:
        """Read a model from a run folder (its best checkpoint), a checkpoint folder or a model.pt, in `eval()` mode.

        Raises:
            CheckpointError: missing, damaged, not a checkpoint of this package, or of another kind of model.
        """
        content = checkpoint.read(path)
        kind = checkpoint.model_name(content)
        if kind != cls.config_type.name:
            raise CheckpointError(f"{path} holds a model {kind}, not {cls.config_type.name}; m3oe_fast.load reads any")
        if "members" in content["config"]:
            raise CheckpointError(f"{path} holds the models of a form, not one; m3oe_fast.load reads them")
        return cls.from_checkpoint(content, path, backend=backend, precision=precision, sparse_grad=sparse_grad)

    @classmethod
    def from_checkpoint(
        cls,
        content: Mapping[str, Any],
        path: str | os.PathLike[str],
        *,
        backend: str,
        precision: str,
        sparse_grad: bool,
    ) -> Self:
        """The model in what `checkpoint.read(path)` gave, in `eval()` mode.

        Raises:
            CheckpointError: a configuration, weights or vocabularies that do not fit this version.
        """
        config = cls.config_in(content, path)
        model = cls(config, backend=backend, precision=precision, sparse_grad=sparse_grad)
        weights = content["weights"]
        model.check_weights(weights, source=str(path))
        model.to(weights["embedding"].dtype).load_state_dict(weights)  # in this order: float64 would lose its digits
        model.encoder = checkpoint.encoder_of(content, path)
        return model.eval()

    @classmethod
    def config_in(cls, content: Mapping[str, Any], path: str | os.PathLike[str]) -> ModelConfig:
        """The configuration in what `checkpoint.read(path)` gave.

        Raises:
            CheckpointError: it does not fit this version.
        """
        try:
            return cls.config_type.from_dict(content["config"])
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{path} holds a configuration this version cannot read: {error}") from error

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Copy a state_dict into this model.

        Raises:
            CheckpointError: a name or shape differs; the message names the first one.
        """
        self.check_weights(weights, source)
        self.load_state_dict(weights)

    def check_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Raise CheckpointError where a state_dict does not fit this model; the message names the first difference."""
        own = self.state_dict()
        if not isinstance(weights, Mapping) or not all(isinstance(w, Tensor) for w in weights.values()):
            raise CheckpointError(f"{source} holds no weights by name: it is damaged, use another one")
        for name in sorted(set(own) ^ set(weights)):
            where = "lacks" if name in own else "has an unknown"
            raise CheckpointError(f"{source} {where} weight {name!r}: it belongs to another configuration")
        for name, tensor in weights.items():
            if tensor.shape != own[name].shape:
                raise CheckpointError(
                    f"{source}: weight {name!r} is {list(tensor.shape)}, this model needs {list(own[name].shape)}"
                )


def _weights_loaded(model: RankingModel, _: object) -> None:
    # Not a lambda: a model must pickle, hooks included.
    model.drop_packed_weights()


@contextlib.contextmanager
def _range_errors() -> Iterator[None]:
    """The op's complaint about an id or domain out of range, as the ValueError that `forward` promises."""
    try:
        yield
    except RuntimeError as error:
        raise _as_value_error(error) from None


def _as_value_error(error: RuntimeError) -> Exception:
    complaint = re.search(r"(ids|domain)\[.* has \d+ \w+", str(error))  # behind the place in the C++ source
    return error if complaint is None else ValueError(complaint[0])


def _values_as_value_error() -> contextlib.AbstractContextManager:
    # A traced graph raises at run time, where no Python of ours is left.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _range_errors()


def _precision_of_the_model(device: str) -> contextlib.AbstractContextManager:
    """Switches autocast off where it is on: the model's own precision wins."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def uniform_linear(fan_in: int, *tensors: Tensor) -> None:
    """First values of a Linear's weight and bias, as torch.nn.Linear has them."""
    bound = 1 / math.sqrt(fan_in)
    for tensor in tensors:
        nn.init.uniform_(tensor, -bound, bound)


def multiply_adds_of(widths: Sequence[int]) -> int:
    """Multiply-adds of a row in a stack of Linears of these widths."""
    return sum(i * o for i, o in itertools.pairwise(widths))


def reset_norm(*gains: Tensor, offsets: Iterable[Tensor]) -> None:
    """First values of LayerNorms: gains one, offsets zero."""
    for gain in gains:
        nn.init.ones_(gain)
    for offset in offsets:
        nn.init.zeros_(offset)
