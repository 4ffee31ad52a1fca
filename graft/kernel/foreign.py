"""Sockets that a process of somebody else's has, too.

Theory of operation

Goal: whatever that process does with the socket, graftd goes on.

Facts: the kernel has a lock for each socket, and most calls wait for it (lock_sock(), net/core/sock.c). Who sends
from memory that a file system of its own has to give (FUSE, userfaultfd(2)) keeps it for as long as it likes.
CPython's getsockopt(), setsockopt() and constructor wait with the interpreter's lock, so that no other thread runs
meanwhile. The last close(2) of a TCP socket waits for as long as SO_LINGER says (socket(7)), which its other owner
sets; that wait ends with a signal, and the other one does not.

Solution: these calls are made through ctypes, which gives the interpreter's lock away. Who calls them is a thread
that may wait, and never the loop's. Closes are watched, and the loop's tick ends those that take long.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import overload

from graft.kernel.linux import CLONE_NEWNET, libc, oserror

CLOSE_SECONDS = 0.5
NS_GET_NSTYPE = 0xB703
AT_EMPTY_PATH, AT_STATX_DONT_SYNC = 0x1000, 0x4000
STATX_DEVICE = struct.Struct("=II")
WAKE = signal.SIGURG  # what ends the wait of a close(2); ignored by default

_closing: dict[int, float] = {}  # threads in close(2), and since when
_lock = threading.Lock()


@functools.cache
def _template() -> int:
    return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()


def _option(fd: int, level: int, name: int, size: int) -> bytes:
    value, length = ctypes.create_string_buffer(max(size, 1)), ctypes.c_uint32(size)
    if libc.getsockopt(fd, level, name, value, ctypes.byref(length)):
        raise oserror("getsockopt")
    return value.raw[: length.value]


class ForeignSocket(socket.socket):
    """A socket that another process has as well. Any method but fileno() and detach() may block.

    The methods are those of socket.socket.
    """

    @classmethod
    def adopt(cls, fd: int) -> "ForeignSocket":
        """Take over @fd. Raises OSError, and leaves @fd open, if it is no socket."""
        family, kind, protocol = (
            int.from_bytes(_option(fd, socket.SOL_SOCKET, name, 4), "little")
            for name in (socket.SO_DOMAIN, socket.SO_TYPE, socket.SO_PROTOCOL)
        )
        # socket() asks for the name of what it gets; so it gets another one first
        number = os.dup(_template())
        made = cls(family, kind, protocol, fileno=number)
        os.dup2(fd, number, inheritable=False)
        os.close(fd)
        return made

    @overload
    def getsockopt(self, level: int, name: int, /) -> int: ...

    @overload
    def getsockopt(self, level: int, name: int, size: int, /) -> bytes: ...

    def getsockopt(self, level: int, name: int, size: int = 0, /) -> int | bytes:
        """getsockopt(2): an int, or up to @size bytes. Raises OSError."""
        if size:
            return _option(self.fileno(), level, name, size)
        return int.from_bytes(_option(self.fileno(), level, name, 4), "little", signed=True)

    def setsockopt(self, level: int, name: int, value: int | bytes, /) -> None:  # type: ignore[override]
        """setsockopt(2), of an int or bytes. Raises OSError."""
        raw = value.to_bytes(4, "little", signed=True) if isinstance(value, int) else bytes(value)
        if libc.setsockopt(self.fileno(), level, name, raw, len(raw)):
            raise oserror("setsockopt")

    def close(self) -> None:
        """close(2), which end_long_closes() may cut short."""
        with watched_close():
            super().close()


def own_address(sock: socket.socket) -> str:
    """The address that a socket is bound to, as its program sees it; "" if it is not of IPv4 or IPv6.

    Raises OSError.
    """
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return ""
    return str(sock.getsockname()[0]).partition("%")[0]


@contextlib.contextmanager
def watched_close() -> Iterator[None]:
    """In the body a descriptor is closed, which may wait: at most for CLOSE_SECONDS and a tick of the loop."""
    thread = threading.get_ident()
    _closing[thread] = time.monotonic()
    try:
        yield
    finally:
        with _lock:  # so that no signal is meant for a thread that has ended
            del _closing[thread]


def watch_closes() -> None:
    """Prepare for end_long_closes(). Only in the main thread."""
    signal.signal(WAKE, lambda *_: None)


def end_long_closes() -> None:
    """End the wait of those threads that have closed a descriptor for CLOSE_SECONDS."""
    late = time.monotonic() - CLOSE_SECONDS
    with _lock:
        for thread, since in list(_closing.items()):
            if since < late:
                with contextlib.suppress(OSError):
                    signal.pthread_kill(thread, WAKE)


def check_netns(fd: int) -> None:
    """Raise OSError unless @fd, which a peer may have sent, is a netns (ioctl_ns(2), NS_GET_NSTYPE). Never waits."""
    # a file system that may not answer is not asked for what the kernel knows: all namespaces are on one device
    found = ctypes.create_string_buffer(256)  # struct statx
    if libc.statx(fd, b"", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, 0, found):
        raise oserror("statx")
    device = os.makedev(*STATX_DEVICE.unpack_from(found, 136))
    if device != os.stat("/proc/self/ns/net").st_dev or fcntl.ioctl(fd, NS_GET_NSTYPE) != CLONE_NEWNET:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
