"""The hidden layer of all models, as fast as eager PyTorch computes it: relu(LN(z W + b))."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from m3oe_fast.reference import EPS, MatMul


def hidden(z: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, offset: Tensor, matmul: MatMul) -> Tensor:
    """relu(LN(z weight + bias)) [..., out] of z [..., in], weight [in, out], bias [out] or of every row [..., out],
    gain and offset [out].

    Gain and offset belong to one layer here, so that LayerNorm applies them in the pass that normalises; stacked ones
    (`reference.layer_norm`) cost two passes more, and two more again for the gradients.
    """
    normed = F.layer_norm(matmul(z, weight) + bias, gain.shape, gain, offset, EPS)
    return normed.relu_()  # in place, as nothing else needs it: one pass over new memory less


def layer_of_stack(p: Mapping[str, Tensor], name: str, layer: int, index: int, z: Tensor, matmul: MatMul) -> Tensor:
    """`hidden` of one layer of stack `index` among those that `RankingModel.add_layers` registered as `name`."""
    of_stack = (p[f"{name}_{part}.{layer}"][index] for part in ("weight", "bias", "gain", "offset"))
    return hidden(z, *of_stack, matmul)
