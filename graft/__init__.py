"""Socket grafting: containers at the host's network speed, without the host's network.

Python programs use graft.socket(), graft.bind(), graft.create_server(), graft.connect(), and graft.asyncio (see
graft.api).
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from graft.api import (
        AddressInUse,
        GraftOSError,
        NotAllowed,
        Socket,
        Unavailable,
        UnknownEndpoint,
        bind,
        connect,
        create_server,
        socket,
    )

__all__ = [
    "AddressInUse",
    "GraftOSError",
    "NotAllowed",
    "Socket",
    "Unavailable",
    "UnknownEndpoint",
    "__version__",
    "bind",
    "connect",
    "create_server",
    "socket",
]


def __getattr__(name: str) -> Any:
    """Import the API on first use: the commands import this package as well, and must start fast."""
    if name == "asyncio":
        import importlib

        return importlib.import_module("graft.asyncio")
    if name in __all__:
        from graft import api

        return getattr(api, name)
    raise AttributeError(f"module 'graft' has no attribute '{name}'")
