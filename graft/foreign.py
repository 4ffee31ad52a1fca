"""Close descriptors that peers sent in a worker thread, because close(2) may block and the loop must not.

The last close of a TCP socket blocks for as long as its SO_LINGER says (socket(7)). The last close of a file blocks
until its file system answers, which may be a program of the peer's (FUSE).
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
    """Is @fd a seccomp listener? Reads it from procfs, because its sender may lie. Raises OSError if it is closed."""
    return os.readlink(f"/proc/self/fd/{fd}") == LISTENER


def close_foreign(fd: int) -> None:
    """Close a descriptor that a peer sent. Never blocks: all but seccomp listeners are closed in another thread."""
    if is_listener(fd):
        os.close(fd)
        return
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            with socket.socket(fileno=os.dup(fd)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, DO_NOT_LINGER)
    try:
        _closers.run(partial(_close, fd))
    except RuntimeError:  # no thread can be made: blocking is better than a leak
        _close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)
