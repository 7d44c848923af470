"""m3oe_fast: trains and serves M3oE (multi-domain multi-task mixture of experts) through its own kernels.

from m3oe_fast import M3oE, M3oEConfig
"""

__version__ = "0.1.0"

from m3oe_fast import _threads

_threads.wait_asleep()  # before anything imports torch

from m3oe_fast import _extension  # noqa: E402

_extension.find_kernels()  # before anything imports m3oe_fast.kernels

from m3oe_fast import interop  # noqa: E402
from m3oe_fast.config import M3oEConfig  # noqa: E402
from m3oe_fast.models import M3oE, load  # noqa: E402

__all__ = ["M3oE", "M3oEConfig", "__version__", "interop", "load"]
