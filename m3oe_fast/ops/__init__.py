"""Public functions over the compiled ops: checks, autograd, fakes. One file per op."""

from m3oe_fast.ops.network import network, network_loss

__all__ = ["network", "network_loss"]
