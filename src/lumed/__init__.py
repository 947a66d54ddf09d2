"""lumed: the Lume API for Linux hosts, on QEMU.

`from lumed import Client` for programs; see `lumed.client.client`. Errors are in `lumed.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lumed.client.async_client import AsyncClient as AsyncClient
    from lumed.client.client import Client as Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]
_MODULES = {"AsyncClient": "lumed.client.async_client", "Client": "lumed.client.client"}


def __getattr__(name: str) -> object:
    # Only who wants a client pays for HTTP, and only AsyncClient takes a library for it.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
