"""Close descriptors that peers sent in a worker thread, because close(2) may block and the loop must not.

The last close of a TCP socket blocks for as long as its SO_LINGER says (socket(7)), at most for foreign.CLOSE_SECONDS
here. The last close of a file blocks until its file system answers, which may be a program of the peer's (FUSE).
"""

import array
import contextlib
import os
import socket
from functools import partial

from graft import protocol
from graft.kernel.foreign import watched_close
from graft.process.workers import Workers

LISTENER = "anon_inode:seccomp notify"

_closers = Workers(32)


def is_listener(fd: int) -> bool:
    """Is @fd a seccomp listener? Reads it from procfs, because its sender may lie. Raises OSError if it is closed."""
    return os.readlink(f"/proc/self/fd/{fd}") == LISTENER


def close_foreign(fd: int) -> None:
    """Close a descriptor that a peer sent. Never blocks: all but seccomp listeners are closed in another thread."""
    if is_listener(fd):
        os.close(fd)
        return
    try:
        _closers.run(partial(_close, fd))
    except RuntimeError:  # no thread can be made: blocking is better than a leak
        _close(fd)


def _close(fd: int) -> None:
    with contextlib.suppress(OSError), watched_close():
        os.close(fd)


def receive_fds(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """Receive up to 64 KiB with descriptors, which are close-on-exec: data, descriptors, msg_flags (recvmsg(2)).

    socket.recv_fds() is no use here: it ignores its flags (CPython 3.11). Raises OSError.
    """
    fds = array.array("i")
    room = socket.CMSG_LEN(protocol.DESCRIPTORS_MAX * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), flags
