"""Which ops serve a backend: the compiled ones of `m3oe_fast`, or Triton's of `m3oe_fast_triton`, schema for schema."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from m3oe_fast import _extension
from m3oe_fast.errors import BackendError

_NAMES = ("network_pack", "network_fwd", "network_bwd", "network_loss", "star_fold", "star_fold_bwd")
_NAMESPACES = {"cpu": "m3oe_fast", "triton": "m3oe_fast_triton"}
_lock = threading.Lock()
_loaded: dict[str, SimpleNamespace] = {}
_fakes: dict[str, Any] = {}


def fake(name: str) -> Callable[[Any], Any]:
    """Decorator: the function returns the shapes and dtypes that op `name` returns, on every backend."""

    def register(function: Any) -> Any:
        _fakes[name] = function
        for backend in _loaded:
            torch.library.register_fake(f"{_NAMESPACES[backend]}::{name}", function)
        return function

    return register


def backend_of(device: torch.device) -> str:
    """The backend for tensors of a device where nobody asked for one."""
    return "cpu" if device.type == "cpu" else "triton"


def ops(backend: str) -> SimpleNamespace:
    """The raw ops of a backend by name.

    Raises:
        BackendError: the backend has none, or they cannot be loaded.
    """
    if backend not in _loaded:
        load(backend)
    return _loaded[backend]


def load(backend: str) -> None:
    """Load the ops of a backend, so that a traced graph only finds them."""
    if backend not in _NAMESPACES:
        raise BackendError(f"backend {backend!r} has no ops; those of {', '.join(_NAMESPACES)} exist")
    with _lock:
        if backend not in _loaded:
            _register(backend)


def _register(backend: str) -> None:
    _extension.load()
    if backend == "triton":
        import m3oe_fast.kernels.ops  # noqa: F401  (registers them)
    found = getattr(torch.ops, _NAMESPACES[backend])
    _loaded[backend] = SimpleNamespace(**{name: getattr(found, name).default for name in _NAMES})
    for name, function in _fakes.items():
        torch.library.register_fake(f"{_NAMESPACES[backend]}::{name}", function)


load("cpu")
