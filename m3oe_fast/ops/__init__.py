"""Public functions over the compiled ops: checks, autograd, fakes. One file per op."""

from m3oe_fast.ops.network import network

__all__ = ["network"]
