"""The reduced precisions of the kernels for any eager code: a mode that rounds what products multiply.

    with RoundedProducts("bf16"):
        logits = folded.routed(x, domain, weights)

Only the operands are rounded; sums are in the dtype of the tensors, as the kernels do it with float32. So float64
tensors show what the rounding of operands costs by itself, and float32 ones what a plain implementation of the same
precision achieves: tests allow the kernels a small multiple of that. Autocast is no substitute, it rounds results too.

Every product of two tensors counts, also the fusion of experts, which the kernels compute in fp32 throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from m3oe_fast.errors import ConfigError

PRECISIONS = ("fp32", "bf16x3", "tf32", "bf16")


class RoundedProducts(TorchFunctionMode):
    """Within it, products of floating-point tensors are computed at a precision, and so are their gradients.

    Replaced are `@`, matmul, mm, bmm and baddbmm, as functions and as methods. Their gradients are products of the same
    kind, of the upstream gradient and the saved operand, also when `backward` runs after the mode has ended.

    Args:
        precision: "bf16" rounds both operands; "bf16x3" splits each into two bf16, high and low, and sums high high,
            high low and low high; "tf32" drops the last 13 bits of both, as tensor cores do; "fp32" changes nothing.

    Raises:
        ConfigError: an unknown precision.
        NotImplementedError: a product that this mode does not know; left alone it would pass for a rounded one.
    """

    def __init__(self, precision: str) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.precision = precision

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.precision == "fp32" or not _has_floats(args):
            return func(*args, **kwargs)
        if func in _UNKNOWN:
            raise NotImplementedError(f"RoundedProducts does not know {func.__name__}: write it with matmul or bmm")
        product = matmul(self.precision)
        if func in _PRODUCTS and not kwargs:
            return product(*args)
        if func is Tensor.__rmatmul__:
            return product(*reversed(args))
        if func in _SUMS:
            base, a, b = args
            scaled = kwargs.pop("alpha", 1) * product(a, b)
            return kwargs.pop("beta", 1) * base + scaled
        return func(*args, **kwargs)


def matmul(precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of matrices [.., M, K] and [.., K, N] at a precision, as `reference.forward` takes it."""
    if precision == "fp32":
        return torch.matmul
    return {"bf16": _Rounded, "bf16x3": _Split, "tf32": _Truncated}[precision].apply


_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}
_SUMS = {torch.baddbmm, Tensor.baddbmm}
_UNKNOWN = {
    *(torch.einsum, torch.tensordot, torch.inner, torch.dot, torch.mv, torch.addmv, torch.addmm, torch.addbmm),
    *(Tensor.inner, Tensor.dot, Tensor.mv, Tensor.addmv, Tensor.addmm, Tensor.addbmm, F.linear, F.bilinear),
    F.scaled_dot_product_attention,
}


def _has_floats(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.is_floating_point() for a in args)


def _parts(a: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bf16 and the bf16 nearest to what is left, in the dtype of a."""
    high = a.bfloat16().to(a.dtype)
    return high, (a - high).bfloat16().to(a.dtype)


class _Product(torch.autograd.Function):
    """A product [.., M, K] by [.., K, N] whose gradients are products of the same kind."""

    product: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def forward(cls, ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        if a.ndim < 2 or b.ndim < 2:
            raise NotImplementedError("RoundedProducts knows products of matrices only, add an axis to the vector")
        ctx.save_for_backward(a, b)
        return cls.product(a, b)

    @classmethod
    @once_differentiable
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        d_a = cls.product(grad, b.mT).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        d_b = cls.product(a.mT, grad).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return d_a, d_b


class _Rounded(_Product):
    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.bfloat16().to(a.dtype) @ b.bfloat16().to(b.dtype)


class _Truncated(_Product):
    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        return _truncated(a) @ _truncated(b)


def _truncated(a: Tensor) -> Tensor:
    bits = a.float().view(torch.int32) & ~0x1FFF
    return bits.view(torch.float32).to(a.dtype)


class _Split(_Product):
    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        (a_high, a_low), (b_high, b_low) = _parts(a), _parts(b)
        return a_high @ b_high + (a_high @ b_low + a_low @ b_high)
