"""Optimizers for large embedding tables, and gradient clipping that knows sparse gradients.

`RowAdagrad` and `LazyAdam` are ordinary ``torch.optim.Optimizer``: parameter groups, closures, schedulers, hooks and
``state_dict`` work as they do there. They are made for tables of millions of rows whose gradient names the few rows
that a batch touched, as ``torch.nn.functional.embedding(..., sparse=True)`` gives it: a sparse COO tensor with
indices [1, U] and values [U, N] for a table [V, N].

What both do with a gradient:

- Sparse: a step reads and writes the U touched rows of table and state and nothing else, in O(U N) time and memory.
  A row that occurs more than once counts once, with the sum of its gradients, and rows may come in any order: that
  is what gradient accumulation leaves. Gradients whose rows are strictly increasing are taken as they are; others
  are coalesced first, which costs about as much as the step. Whether a gradient calls itself coalesced is not asked.
- Dense: the same arithmetic on every row, also on rows whose gradient is zero.
- Sparse and without rows (U = 0): no row moves.
- None: the parameter is skipped.

A gradient that cannot be used is refused before anything has moved, and no step writes to a gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.adam import adam

from m3oe_fast.errors import ConfigError


class _TableOptimizer(Optimizer, ABC):
    """Gathers the touched rows of table and state, lets the subclass update them as if they were all, puts them back.

    A subclass says what it keeps per row (`_tensors`) and how rows are updated (`_update`).
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of tables with options of their own; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            ConfigError: an option is out of its range.
            ValueError: a parameter is no dense float32 or float64 tensor.
        """
        super().add_param_group(param_group)
        try:
            self._check_options(param_group)
            for position, parameter in enumerate(param_group["params"]):
                self._check_parameter(_name(len(self.param_groups) - 1, position), parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; called once, with gradients enabled.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: a gradient is sparse in another way than by the rows of a 2-D table. Nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for position, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    _check_gradient(_name(number, position), parameter.grad)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_table(group, parameter)
        return loss

    def _step_table(self, group: dict[str, Any], table: Tensor) -> None:
        state = self.state[table]
        tensors = (table, *self._tensors(group, state, table))
        if not table.grad.is_sparse:
            self._update(group, state, table.grad, *tensors)
            return
        grad = _coalesced(table.grad)
        rows, values = grad._indices()[0], grad._values()
        touched = [tensor.index_select(0, rows) for tensor in tensors]
        self._update(group, state, values, *touched)
        for tensor, updated in zip(tensors, touched, strict=True):
            tensor.index_copy_(0, rows, updated)

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        if parameter.layout != torch.strided:
            raise ValueError(f"{name} is a sparse tensor; {type(self).__name__} takes dense ones with sparse gradients")
        # load_state_dict casts the state to the parameter's dtype: that of a bfloat16 table would not survive a resume.
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}; {type(self).__name__} takes float32 and float64: keep a master copy"
            )

    @abstractmethod
    def _check_options(self, group: dict[str, Any]) -> None:
        """Raise ConfigError if an option of ``group`` is out of its range."""

    @abstractmethod
    def _tensors(self, group: dict[str, Any], state: dict[str, Any], table: Tensor) -> tuple[Tensor, ...]:
        """The tensors of ``state`` with one entry per row, made at the first call; called once per step."""

    @abstractmethod
    def _update(
        self, group: dict[str, Any], state: dict[str, Any], grad: Tensor, table: Tensor, *tensors: Tensor
    ) -> None:
        """Update ``table`` and ``tensors`` in place; all of them, and ``grad``, have the same rows."""


class RowAdagrad(_TableOptimizer):
    """Adagrad with one accumulator per row of a table.

    For a row w with gradient g, both [N]::

        g   <- g + weight_decay * w
        acc <- acc + mean(g ** 2)
        w   <- w - lr * g / (sqrt(acc) + eps)

    A row that is not touched keeps its weight and its accumulator, and is not decayed; with a dense gradient every
    row is touched. A row whose gradient is zero moves only by decay, so dense and sparse gradients train alike if
    there is none. A sparse step gathers and scatters table and accumulator once, and makes three passes over
    [U, N]: square, mean, update. Its largest temporaries are two of [U, N].

    State: ``accumulator`` [V] in the table's dtype, so a float32 table of width N costs 1/N of itself.

    Args:
        params: 2-D tables [V, N], float32 or float64, or parameter groups of them.
        lr: at least 0.
        eps: above 0.
        initial_accumulator: what every accumulator starts from, at least 0.
        weight_decay: L2 penalty, at least 0.

    Raises:
        ConfigError: an option is out of its range.
        ValueError: a parameter is not 2-D, not dense, or neither float32 nor float64.

    Source: EXACT_ROWWISE_ADAGRAD of FBGEMM (``rowwise_adagrad`` in fbgemm_gpu/codegen/genscript/optimizers.py, weight
    decay mode L2); Duchi, Hazan and Singer, JMLR 12 (2011).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        eps: float = 1e-8,
        initial_accumulator: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "initial_accumulator": initial_accumulator, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("lr", "initial_accumulator", "weight_decay"):
            _check_at_least_0(name, group[name])
        _check_above_0("eps", group["eps"])

    def _check_parameter(self, name: str, parameter: Tensor) -> None:
        super()._check_parameter(name, parameter)
        if parameter.ndim != 2:
            raise ValueError(
                f"{name} is {parameter.ndim}-D; RowAdagrad keeps one accumulator per row of a 2-D table: "
                "give other parameters to torch.optim.Adagrad"
            )

    def _tensors(self, group: dict[str, Any], state: dict[str, Any], table: Tensor) -> tuple[Tensor, ...]:
        if not state:
            state["accumulator"] = table.new_full((len(table),), group["initial_accumulator"])
        return (state["accumulator"],)

    def _update(
        self, group: dict[str, Any], state: dict[str, Any], grad: Tensor, table: Tensor, *tensors: Tensor
    ) -> None:
        (accumulator,) = tensors
        if group["weight_decay"]:
            grad = grad.add(table, alpha=group["weight_decay"])
        accumulator.add_(grad.square().mean(dim=1))
        table.addcdiv_(grad, accumulator.sqrt().add_(group["eps"]).unsqueeze(1), value=-group["lr"])


class LazyAdam(_TableOptimizer):
    """Adam that leaves alone what a sparse gradient does not touch.

    For a touched row w with gradient g, both [N], in step t of its table::

        g <- g + weight_decay * w
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g ** 2
        w <- w - lr * (m / (1 - beta1 ** t)) / (sqrt(v / (1 - beta2 ** t)) + eps)

    The moments of a row that is not touched do not decay, and neither does its weight. t counts the steps in which
    the table had a gradient, an empty one included, not those that touched the row.

    Differences to ``torch.optim.SparseAdam``, with which it shares all of the above but ``weight_decay``:

    - ``eps`` is added after the bias correction, as ``torch.optim.Adam`` does. SparseAdam adds it before, which is
      an eps of ``eps / sqrt(1 - beta2 ** t)`` here: 32 times as much in the first step.
    - It has L2 weight decay, of touched rows only.
    - It takes dense gradients of any shape and is ``torch.optim.Adam`` then: every row is touched, and one whose
      gradient is zero still moves by its momentum.
    - It gathers the touched rows, runs torch's fused Adam on them and scatters them: three gathers, one pass over
      [U, N], three scatters. SparseAdam adds sparse tensors to dense ones.

    State: ``exp_avg`` and ``exp_avg_sq``, both dense and like the table, and the int ``step``. The largest temporaries
    of a sparse step are three of [U, N].

    Args:
        params: tensors of float32 or float64, or parameter groups of them; 2-D where the gradient is sparse.
        lr: at least 0.
        betas: decay of the two moments, each at least 0 and below 1.
        eps: above 0.
        weight_decay: L2 penalty, at least 0.

    Raises:
        ConfigError: an option is out of its range.
        ValueError: a parameter is not dense, or neither float32 nor float64.

    Source: Kingma and Ba, ICLR 2015; ``torch.optim.Adam``; LazyAdam of TensorFlow Addons.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _check_options(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay"):
            _check_at_least_0(name, group[name])
        _check_above_0("eps", group["eps"])
        betas = group["betas"]
        is_pair = isinstance(betas, (tuple, list)) and len(betas) == 2
        if not is_pair or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas must be two numbers of at least 0 and below 1, got {betas!r}")

    def _tensors(self, group: dict[str, Any], state: dict[str, Any], table: Tensor) -> tuple[Tensor, ...]:
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(table)
            state["exp_avg_sq"] = torch.zeros_like(table)
        state["step"] += 1
        return state["exp_avg"], state["exp_avg_sq"]

    def _update(
        self, group: dict[str, Any], state: dict[str, Any], grad: Tensor, table: Tensor, *tensors: Tensor
    ) -> None:
        exp_avg, exp_avg_sq = tensors
        beta1, beta2 = group["betas"]
        adam(
            [table],
            [grad],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.full((), state["step"] - 1.0, dtype=torch.float32, device=table.device)],
            # The fused CPU kernel of torch 2.13 reads all four as flat memory whatever their strides are.
            fused=all(tensor.is_contiguous() for tensor in (table, grad, exp_avg, exp_avg_sq)),
            foreach=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


@torch.no_grad()
def clip_grad_norm(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most ``max_norm``; dense and sparse ones may be mixed.

    The same as ``torch.nn.utils.clip_grad_norm_``, which fails on sparse gradients (torch 2.13 has no vector norm for
    them). Gradients are multiplied by ``min(max_norm / (norm + 1e-6), 1)`` in place, except that a sparse gradient
    with repeated or unordered rows is replaced by its coalesced form: the norm is that of the sums. A norm that is not
    finite makes the gradients useless, as it does in torch.

    Args:
        parameters: those without a gradient are skipped.
        max_norm: the largest norm to leave alone.

    Returns:
        The norm before clipping, a scalar; 0 if there is no gradient.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        if parameter.grad.is_sparse:
            parameter.grad = _coalesced(parameter.grad)
    gradients = [parameter.grad for parameter in parameters]
    norm = get_total_norm([grad._values() if grad.is_sparse else grad for grad in gradients])
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _coalesced(grad: Tensor) -> Tensor:
    """The sparse ``grad`` with every coordinate once; ``grad`` itself if its rows are strictly increasing.

    The flag of ``grad`` is not to be trusted. Autograd drops it when it stores a gradient, and to sort what is sorted
    is wasted time. And a sum of two gradients that were flagged but not sorted is flagged, with rows twice.
    """
    indices = grad._indices()
    if bool((indices[0, 1:] > indices[0, :-1]).all()):
        return grad
    unflagged = torch.sparse_coo_tensor(indices, grad._values(), grad.shape, is_coalesced=False, check_invariants=False)
    return unflagged.coalesce()


def _name(group: int, position: int) -> str:
    return f"param_groups[{group}]['params'][{position}]"


def _check_gradient(name: str, grad: Tensor) -> None:
    # Autograd gives a dense parameter no other layout than strided and COO.
    if grad.is_sparse and (grad.sparse_dim(), grad.dense_dim()) != (1, 1):
        raise ValueError(
            f"the gradient of {name} has {grad.sparse_dim()} sparse and {grad.dense_dim()} dense dimensions; only the "
            "rows of a 2-D table may be sparse (one and one): make it dense with .to_dense()"
        )


def _check_at_least_0(name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 <= value < math.inf:
        raise ConfigError(f"{name} must be a finite number of at least 0, got {value!r}")


def _check_above_0(name: str, value: object) -> None:
    if not isinstance(value, Real) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")
