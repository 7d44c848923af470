"""M3oE as an nn.Module: embeddings, the stacked parameters, the choice of backend, loss, prediction and files.

Parameters are stacked over experts, domains and tasks (see `reference.py` for every shape), so the kernels take
them as they are and a checkpoint does not depend on the backend.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3oe_fast import _extension, backends, checkpoint, folded, kernels, reference
from m3oe_fast.bags import Bags, pool
from m3oe_fast.config import FUSION_NAMES, M3oEConfig
from m3oe_fast.errors import CheckpointError, ConfigError
from m3oe_fast.packed import PackedCache, PackedWeights

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from m3oe_fast.data import Encoder
    from m3oe_fast.ops import Lookup

SCORED_AT_ONCE = 65_536
"""Rows of a frame that `score` embeds at once: 30 MB at the published sizes."""

BagFields = Sequence[tuple[Tensor, Tensor]]
"""For each bag (values [n], offsets [B+1]), as in `Bags.fields`; `m3oe_fast.data.batch.Bag` is such a pair."""


class M3oE(nn.Module):
    """Multi-domain multi-task mixture of experts (M3oE, SIGIR 2024, arXiv 2404.18465).

    Args:
        config: sizes and switches.
        backend: "auto", "cpu" (compiled), "triton" (GPU), "reference" (eager PyTorch, the oracle).
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

    def __init__(
        self, config: M3oEConfig, backend: str = "auto", precision: str = "fp32", sparse_grad: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.precision = precision
        self.sparse_grad = sparse_grad
        self._packed = PackedCache()
        self.encoder: Encoder | None = None
        self._make_parameters(config)
        self.reset_parameters()
        first_id = torch.tensor([0, *config.vocab_sizes[:-1]]).cumsum(0) if config.vocab_sizes else torch.empty(0)
        self.register_buffer("_first_row", first_id.to(torch.int64), persistent=False)
        self.register_buffer("_vocab", torch.tensor(config.vocab_sizes, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_weights_loaded)
        self._served: tuple[tuple[str, torch.device, torch.dtype, str], str] | None = None
        if not (backend == "triton" and self.embedding.device.type == "cpu"):
            self._choose_backend()  # else the first call does, as the model may be about to move to a GPU

    def _choose_backend(self) -> str:
        """Decided once per request, device and dtype: a traced graph then holds a comparison, not the decision."""
        request = (self.backend, self.embedding.device, self.embedding.dtype, self.precision)
        if self._served is None or self._served[0] != request:
            self._served = (request, backends.choose(*request))
            if self._served[1] != "reference":
                from m3oe_fast.ops import load

                load(self._served[1])
            backends.warn_if_fp32(self._served[1], self.precision)
        return self._served[1]

    def _make_parameters(self, c: M3oEConfig) -> None:
        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape))

        def normed(name: str, *shape: int) -> None:
            for part in ("bias", "gain", "offset"):
                self.register_parameter(f"{name}_{part}", parameter(*shape))

        d, t, e = c.num_domains, c.num_tasks, c.num_experts
        self.embedding = parameter(sum(c.vocab_sizes), c.embed_dim)
        if c.bag_vocab_sizes:
            self.bag_embedding = parameter(sum(c.bag_vocab_sizes), c.embed_dim)
        self.star_weight = parameter(d, c.input_dim, c.star_dim)
        self.star_bias = parameter(d, c.star_dim)
        self.star_shared_weight = parameter(c.input_dim, c.star_dim)
        self.star_shared_bias = parameter(c.star_dim)
        self.star_out_weight = parameter(c.star_dim, c.hidden_dim)
        self.star_out_bias = parameter(c.hidden_dim)
        self.star_gain = parameter(c.hidden_dim)
        self.star_offset = parameter(c.hidden_dim)
        self.skip_weight = parameter(c.input_dim, c.hidden_dim)
        normed("skip", c.hidden_dim)
        widths = [c.hidden_dim, *c.expert_dims]
        layers = list(itertools.pairwise(widths))
        self.expert_weight = nn.ParameterList([parameter(e, i, o) for i, o in layers])
        for part in ("bias", "gain", "offset"):
            setattr(self, f"expert_{part}", nn.ParameterList([parameter(e, o) for _, o in layers]))
        self.gate_weight = parameter(d, t, c.hidden_dim, c.shared_experts)
        self.gate_bias = parameter(d, t, c.shared_experts)
        self.tower_weight = parameter(d, t, c.expert_dim, c.tower_dim)
        normed("tower", d, t, c.tower_dim)
        self.head_weight = parameter(d, t, c.tower_dim)
        self.head_bias = parameter(d, t)
        for name in FUSION_NAMES:
            index = d if name.endswith("domain") else t
            shape = {"scalar": (), "per_index": (index,), "per_pair": (d, t)}[c.fusion]
            self.register_parameter(name, parameter(*shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Published initialisation: embeddings N(0, 1e-4), star matrices Xavier-uniform with zero bias, every other
        layer as torch.nn.Linear and torch.nn.LayerNorm, fusion logits `fusion_init`."""
        c = self.config
        for table in self.table_parameters():
            nn.init.normal_(table, 0.0, 1e-4)
        for weight in (self.star_shared_weight, *self.star_weight):
            nn.init.xavier_uniform_(weight)
        if c.init == "star":
            nn.init.ones_(self.star_weight)
        nn.init.zeros_(self.star_bias)
        nn.init.zeros_(self.star_shared_bias)
        linears = {"star_out": c.star_dim, "skip": c.input_dim, "gate": c.hidden_dim, "tower": c.expert_dim}
        for name, fan_in in linears.items():
            _uniform_linear(fan_in, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"))
        _uniform_linear(c.tower_dim, self.head_weight, self.head_bias)
        for fan_in, weight, bias in zip(
            [c.hidden_dim, *c.expert_dims[:-1]], self.expert_weight, self.expert_bias, strict=True
        ):
            _uniform_linear(fan_in, weight, bias)
        for gain in (self.star_gain, self.skip_gain, self.tower_gain, *self.expert_gain):
            nn.init.ones_(gain)
        for offset in (self.star_offset, self.skip_offset, self.tower_offset, *self.expert_offset):
            nn.init.zeros_(offset)
        for name in FUSION_NAMES:
            nn.init.constant_(getattr(self, name), c.fusion_init)

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
        """The fusion logits: what the outer level of the bi-level optimisation trains."""
        return [getattr(self, name) for name in FUSION_NAMES]

    def network_parameters(self) -> list[nn.Parameter]:
        """Every parameter but the fusion logits."""
        return [p for name, p in self.named_parameters() if name not in FUSION_NAMES]

    def table_parameters(self) -> list[nn.Parameter]:
        """The embedding tables [rows, N], those of `network_parameters` whose gradients `sparse_grad` makes sparse: of
        the id fields and, where there are bags, of the bags."""
        return [self.embedding, *([self.bag_embedding] if self.config.bag_vocab_sizes else [])]

    def fusion_values(self) -> dict[str, float | list[float] | list[list[float]]]:
        """The fusion weights after the sigmoid, by name: a number, one per domain or task, or [D][T]."""
        return {name: torch.sigmoid(getattr(self, name)).tolist() for name in FUSION_NAMES}

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
            return reference.forward(dict(self.named_parameters()), self.config, x, domain)

    def _differentiable_logits(self, ids: Tensor, dense: Tensor, domain: Tensor, bags: BagFields) -> Tensor:
        from m3oe_fast.ops import network  # loads the compiled module, which backend "reference" does without

        self._packed.drop()
        with _precision_of_the_model(ids.device.type), _values_as_value_error():
            weights = self._folded()
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
                star_linear=self.config.star_activation == "linear",
                precision=self.precision,
                probability=probability,
                backend=self.backend_name,
            )
        except RuntimeError as error:
            raise _as_value_error(error) from None

    def _pack(self) -> PackedWeights:
        from m3oe_fast.ops import pack

        with torch.no_grad(), _precision_of_the_model(self.embedding.device.type):
            weights = self._folded()
            star_linear = self.config.star_activation == "linear"
            packed = pack(
                weights,
                self.config.input_dim,
                star_linear=star_linear,
                precision=self.precision,
                backend=self.backend_name,
            )
        return PackedWeights(weights.flat(), packed)

    def _folded(self) -> folded.NetworkWeights:
        from m3oe_fast.ops import star_fold

        fold = functools.partial(star_fold, backend=self.backend_name)
        return folded.fold(dict(self.named_parameters()), self.config, fold)

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

    def train(self, mode: bool = True) -> M3oE:
        """As torch.nn.Module.train; also forgets the weights kept for predictions."""
        self._packed.drop()
        return super().train(mode)

    @property
    def _switches(self) -> dict[str, Any]:
        return {
            "star_linear": self.config.star_activation == "linear",
            "gate_detach": self.config.gate_detach,
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
        pair_loss = reference.pair_losses(logits, domain, label, self.config.num_domains, row_weight)
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
            weights = self._folded()
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

    def score(self, frame: pd.DataFrame) -> np.ndarray:
        """Probabilities [rows, T] of raw log rows, through the vocabularies saved with the model.

        Raises:
            ConfigError: the model has no encoder (it was never trained on prepared data).
            DataError: a column is missing or malformed.
        """
        if self.encoder is None:
            raise ConfigError("this model holds no vocabularies; set model.encoder, or load a trained run")
        batch = self.encoder.transform(frame)
        device = self.embedding.device
        starts = range(0, max(len(frame), 1), SCORED_AT_ONCE)
        chunks = (batch.rows(start, start + SCORED_AT_ONCE).map(lambda rows: rows.to(device)) for start in starts)
        parts = [self.predict(*chunk.inputs).cpu() for chunk in chunks]
        self.check_inputs()
        return torch.cat(parts).numpy()

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
    ) -> M3oE:
        """Read a model from a run folder (its best checkpoint), a checkpoint folder or a model.pt, in `eval()` mode.

        Raises:
            CheckpointError: missing, damaged, or not a checkpoint of this package.
        """
        content = checkpoint.read(path)
        try:
            config = M3oEConfig.from_dict(content["config"])
            model = cls(config, backend=backend, precision=precision, sparse_grad=sparse_grad)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{path} holds a configuration this version cannot read: {error}") from error
        model.load_weights(content["weights"], source=str(path))
        model.to(content["weights"]["embedding"].dtype)
        if content["encoder"] is not None:
            from m3oe_fast.data import Encoder

            try:
                model.encoder = Encoder.from_dict(content["encoder"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{path} holds vocabularies this version cannot read ({error!r})") from error
        return model.eval()

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Copy a state_dict into this model.

        Raises:
            CheckpointError: a name or shape differs; the message names the first one.
        """
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
        self.load_state_dict(weights)


def _weights_loaded(model: M3oE, _: object) -> None:
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


def _uniform_linear(fan_in: int, *tensors: Tensor) -> None:
    bound = 1 / math.sqrt(fan_in)
    for tensor in tensors:
        nn.init.uniform_(tensor, -bound, bound)
