"""Sockets by endpoint name, for Python programs. They need no wrapper and no container of graft, and no call is
trapped.

    import graft

    server = graft.socket()
    server.bind("ep-http")
    server.listen()

    client = graft.connect("ep-db")

The program asks graftd over the agent socket, /run/graft/agent.sock; a container has to mount it. Any user may use
the endpoints of the program's own network namespace. The result is a socket of the host's network stack. This module
imports the standard library alone, so that a container image needs nothing but this package.

include/graft.h is the same for C. Source: AF_GRAFT (ANCS 2018), docs/af_graft.md.
"""

import errno
import os
import socket as _socket
from typing import TYPE_CHECKING, Any, TypeAlias

from graft import client
from graft.errors import Failure, GraftError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    Address: TypeAlias = tuple[Any, ...] | str | ReadableBuffer
else:
    Address = tuple | str | bytes


class GraftOSError(OSError):
    """graftd refused the request: `errno` says why, and `strerror` is graftd's message."""


class UnknownEndpoint(GraftOSError, FileNotFoundError):
    """The program's network namespace has no endpoint of this name (ENOENT). Add it with `graft endpoint add`."""


class AddressInUse(GraftOSError):
    """Another socket is bound to the endpoint's address (EADDRINUSE)."""


class NotAllowed(GraftOSError, PermissionError):
    """The container's policy forbids it, or the caller lacks the privilege (EACCES, EPERM)."""


class Unavailable(GraftOSError, ConnectionRefusedError):
    """graftd does not run, or its agent socket is not mounted in this container (ECONNREFUSED)."""


DEFAULT_SOURCE = "default-source"
_KINDS: dict[int, type[GraftOSError]] = {
    errno.ENOENT: UnknownEndpoint,
    errno.EADDRINUSE: AddressInUse,
    errno.EPERM: NotAllowed,
    errno.EACCES: NotAllowed,
}


def _error(error: GraftError) -> GraftOSError:
    number = getattr(errno, error.code, errno.EIO) if error.code else errno.EIO
    if isinstance(error, Failure) and number == errno.ECONNREFUSED:
        return Unavailable(number, error.message)
    return _KINDS.get(number, GraftOSError)(number, error.message)


def _ask(document: dict[str, Any], fds: tuple[int, ...] = ()) -> tuple[dict[str, Any], int]:
    """Send one request to graftd. Returns its answer, and the descriptor that came with it or -1.

    Raises GraftOSError.
    """
    received: list[int] = []
    try:
        with client.connect_agent(start=False) as sock:
            answer = client.converse(sock, document, fds, received)
    except GraftError as error:
        raise _error(error) from None
    return answer, received[0] if received else -1


class Socket(_socket.socket):
    """A socket that gets its family (IPv4, IPv6 or unix) from the endpoint that it is bound or connected to.

    Until bind() or connect() it is a stand-in: options that are set on it are kept, and set on the real socket then,
    as with GRAFT_SO_DELAYED. Afterwards it is a socket like any other, with the same descriptor number.

    Raises OSError (ESOCKTNOSUPPORT) unless @type is SOCK_STREAM or SOCK_DGRAM.
    """

    def __init__(self, type: int = _socket.SOCK_STREAM) -> None:  # noqa: A002 - socket.socket's own name
        if type not in (_socket.SOCK_STREAM, _socket.SOCK_DGRAM):
            raise OSError(errno.ESOCKTNOSUPPORT, os.strerror(errno.ESOCKTNOSUPPORT))
        super().__init__(_socket.AF_UNIX, type)  # internet sockets are trapped in containers of graft's
        self.endpoint: str | None = None
        self._waiting: list[tuple[int, int, bytes]] = []

    def setsockopt(self, level: int, optname: int, value: Any, *length: Any) -> None:
        """As socket.setsockopt(). Before bind() or connect() the option is kept, and an error comes from those."""
        if self.endpoint is not None:
            super().setsockopt(level, optname, value, *length)
            return
        if value is None:
            raw = bytes(*length)
        else:
            raw = value.to_bytes(4, "little", signed=True) if isinstance(value, int) else bytes(value)
        self._waiting.append((level, optname, raw))

    def bind(self, address: Address) -> None:
        """Bind to the endpoint of this name.

        Raises UnknownEndpoint, AddressInUse, NotAllowed, Unavailable, and OSError: EINVAL if the socket is bound
        already, EAFNOSUPPORT if @address is not a string.
        """
        if not isinstance(address, str):
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        if self.endpoint is not None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._open(bind=address)
        self.endpoint = address

    def connect(self, address: Address) -> None:
        """Connect to the endpoint of this name, or to an internet address, from the endpoint that it is bound to.

        An unbound socket connects from the endpoint `default-source`. Raises UnknownEndpoint, NotAllowed,
        Unavailable, and the errors of connect(2).
        """
        target = self._target(address)
        if target is not None:
            super().connect(target)

    def connect_ex(self, address: Address) -> int:
        """As connect(), but returns the errno, 0 for success."""
        try:
            target = self._target(address)
        except GraftOSError as error:
            return error.errno or errno.EIO
        return 0 if target is None else super().connect_ex(target)

    def _target(self, address: Address) -> Address | None:
        if isinstance(address, str):
            return self.permit(address)
        if not isinstance(address, tuple):
            raise TypeError("an endpoint's name, or an address")
        if self.endpoint is None:
            self.bind(DEFAULT_SOURCE)
        return address

    def permit(self, name: str) -> tuple[Any, ...] | None:
        """Get graftd's permission to reach the endpoint @name. Returns its address, for connect() or sendto().

        None means that the endpoint is of type unix, and that this socket is connected to it now. An unbound socket
        sends from the endpoint `default-source`, if there is one. Raises UnknownEndpoint, NotAllowed, Unavailable.
        """
        if self.endpoint is not None:
            answer, _ = _ask({"op": "permit", "name": name}, (self.fileno(),))
        else:
            answer = self._open(connect=name)
            self.endpoint = name
        return tuple(answer["address"]) if "address" in answer else None

    def _open(self, **what: str) -> dict[str, Any]:
        options = [{"level": level, "name": name, "value": raw.hex()} for level, name, raw in self._waiting]
        answer, fd = _ask({"op": "open", "type": int(self.type), "options": options, **what})
        try:
            os.dup2(fd, self.fileno(), inheritable=self.get_inheritable())
        finally:
            os.close(fd)
        timeout, number, kind = self.gettimeout(), self.detach(), self.type
        super().__init__(answer["family"], kind, 0, number)
        self.settimeout(timeout)
        self._waiting.clear()
        return answer


def socket(type: int = _socket.SOCK_STREAM) -> Socket:  # noqa: A002
    """A new Socket, to be bound or connected to an endpoint by name; @type is SOCK_STREAM or SOCK_DGRAM."""
    return Socket(type)


def bind(name: str, type: int = _socket.SOCK_STREAM, *, reuse_address: bool = True) -> Socket:  # noqa: A002
    """A socket that is bound to the endpoint @name. @reuse_address sets SO_REUSEADDR (stream sockets only).

    Raises GraftOSError, and OSError as Socket does.
    """
    sock = Socket(type)
    try:
        if reuse_address and type == _socket.SOCK_STREAM:
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_REUSEADDR, 1)
        sock.bind(name)
    except BaseException:
        sock.close()
        raise
    return sock


def create_server(name: str, *, backlog: int = 128) -> Socket:
    """A listening stream socket at the endpoint @name. Raises GraftOSError."""
    sock = bind(name)
    try:
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(name: str, *, source: str | None = None, timeout: float | None = None) -> Socket:
    """A stream socket that is connected to the endpoint @name, from the endpoint @source if given.

    @timeout is in seconds, as for socket.settimeout(). Raises GraftOSError, and the errors of connect(2).
    """
    sock = Socket()
    try:
        sock.settimeout(timeout)
        if source is not None:
            sock.bind(source)
        sock.connect(name)
    except BaseException:
        sock.close()
        raise
    return sock
