"""asyncio streams by endpoint name. graft.api has plain sockets.

server = await graft.asyncio.start_server(handle, "ep-http")
reader, writer = await graft.asyncio.open_connection("ep-db")
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from graft import api

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


async def start_server(handler: Handler, name: str, **options: Any) -> asyncio.Server:
    """As asyncio.start_server(), at the endpoint @name, which may be of any type. @options are asyncio's.

    Raises graft.UnknownEndpoint, graft.AddressInUse, graft.NotAllowed, graft.Unavailable.
    """
    sock = await asyncio.to_thread(api.bind, name)
    sock.setblocking(False)
    try:
        if sock.family == socket.AF_UNIX:
            return await asyncio.start_unix_server(handler, sock=sock, **options)
        return await asyncio.start_server(handler, sock=sock, **options)
    except BaseException:
        sock.close()
        raise


async def open_connection(
    name: str, *, source: str | None = None, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """As asyncio.open_connection(), to the endpoint @name, from the endpoint @source if given.

    @options are asyncio's. Raises graft.UnknownEndpoint, graft.NotAllowed, graft.Unavailable, and the errors of
    connect(2).
    """
    sock = api.socket()
    try:
        if source is not None:
            await asyncio.to_thread(sock.bind, source)
        address = await asyncio.to_thread(sock.permit, name)
        sock.setblocking(False)
        if address is not None:
            await asyncio.get_running_loop().sock_connect(sock, address)
        if sock.family == socket.AF_UNIX:
            return await asyncio.open_unix_connection(sock=sock, **options)
        return await asyncio.open_connection(sock=sock, **options)
    except BaseException:
        sock.close()
        raise
