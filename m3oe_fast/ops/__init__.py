"""Public functions over the compiled and the Triton ops: checks, autograd, fakes. One file per op."""

from m3oe_fast.bags import Bags
from m3oe_fast.ops.fold import star_fold
from m3oe_fast.ops.namespace import load
from m3oe_fast.ops.network import Lookup, infer, network, network_loss, pack

__all__ = ["Bags", "Lookup", "infer", "load", "network", "network_loss", "pack", "star_fold"]
