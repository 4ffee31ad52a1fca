"""Closing descriptors that others sent: it may wait, and must not wait in the loop.

The last close of a TCP socket waits as long as its SO_LINGER says (socket(7)), and that of a file may wait for
whoever serves its file system.
"""

import contextlib
import os
import socket
import stat
import struct
from functools import partial

from graft.workers import Workers

LISTENER = "anon_inode:seccomp notify"
DO_NOT_LINGER = struct.pack("=ii", 0, 0)

_closers = Workers(32)


def is_listener(fd: int) -> bool:
    """Is it a seccomp listener, whatever its sender says?"""
    return os.readlink(f"/proc/self/fd/{fd}") == LISTENER


def close_foreign(fd: int) -> None:
    """Close a descriptor that a peer sent; the close of anything but a listener happens in another thread."""
    if is_listener(fd):
        os.close(fd)
        return
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DO_NOT_LINGER)
    try:
        _closers.run(partial(_close, fd))
    except RuntimeError:  # no thread to be had: then here, after all
        _close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
