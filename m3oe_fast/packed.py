"""Folded and packed weights, kept from one prediction to the next while the parameters stay the same.

What a prediction needs of the parameters (folding the star layer, packing for the kernels) costs as much as some 400
rows. The cache must never serve old weights, and no single sign tells that a parameter changed: fused optimizers and
writes through `.data` leave `Tensor._version` alone. So it is used in `eval()` mode only, and an entry holds for the
very same parameter objects, storage and versions (it keeps the storage alive, so that its address cannot come back
with other values), for the same count of optimizer steps in the process, and until the model drops it: at every
forward pass or loss with gradients, `load_state_dict`, `train()` and `eval()`. Not seen is a write through `.data`,
or from outside torch, between two predictions in `eval()` mode: call `M3oE.drop_packed_weights()` after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_optimizer_steps = 0


def _count_step(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class PackedWeights(NamedTuple):
    """The op's weights in schema order, of which it reads the shapes, and their packed form
    (`m3oe_fast::network_pack`)."""

    weights: list[Tensor]
    packed: Tensor


class _Entry(NamedTuple):
    signs: tuple[Any, ...]
    kept: list[Tensor]  # the parameters and aliases of their storage: neither identity nor address can be reused
    value: PackedWeights


class PackedCache:
    """At most one entry. Copies and pickles of it are empty, so it never travels with a model."""

    def __init__(self) -> None:
        self._entry: _Entry | None = None
        self._dropped = 0

    def get(self, parameters: Sequence[Tensor], precision: str, make: Callable[[], PackedWeights]) -> PackedWeights:
        """The weights of these parameters at this precision, made anew if any of the signs says so."""
        try:
            of_each = [(id(p), p.data_ptr(), p._version, p.is_contiguous()) for p in parameters]
        except RuntimeError:  # inference tensors have no version: nothing tells whether they changed
            return make()
        signs = (precision, self._dropped, _optimizer_steps, of_each)
        entry = self._entry
        if entry is not None and entry.signs == signs:
            return entry.value
        value = make()
        # One assignment, for threads that share a model.
        self._entry = _Entry(signs, [*parameters, *(p.detach() for p in parameters)], value)
        return value

    def drop(self) -> None:
        """Forget the weights, those too that another thread is just making."""
        self._dropped += 1
        self._entry = None

    def __deepcopy__(self, _: dict[int, Any]) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple[type[PackedCache], tuple[()]]:
        return PackedCache, ()
