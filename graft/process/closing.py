"""Descriptors that peers sent: received whole, and closed without a wait of the loop's.

Theory of operation

Goal: whatever a peer sends, or leaves unread, the loop goes on.

Facts: the last close of a TCP socket waits for as long as its SO_LINGER says (socket(7)), in the thread that drops
the last reference: also where that is in a message, which recvmsg(2) cuts off (MSG_CTRUNC), or which is in the queue
of a unix socket that is closed. A signal ends the wait, and as long as it is pending every further one. Each close(2)
of a file asks its file system (flush), which may be a program of the peer's (FUSE) and never answer.

Solution: a message is received with room for all that one can have. What is to be closed is gathered, and one thread
puts it into the queue of a unix socket that it then closes, so that one signal, half a second later, ends the wait of
all of it. A connection that has something unread is closed in this way as well. Files wait in threads of their own.

What still fails: 32 files whose file systems do not answer keep those threads; further files stay open then. Where
the table of descriptors is full, the kernel drops the rest of a message in the loop.
"""

import array
import contextlib
import fcntl
import os
import socket
import struct
import termios
import threading
from collections.abc import Callable
from functools import partial

from graft.kernel.foreign import watched_close
from graft.process.workers import Workers

LISTENER = "anon_inode:seccomp notify"
WITHOUT_FLUSH = ("socket:", "anon_inode:", "pipe:")
MOST = 253  # SCM_MAX_FD: of a message

_files = Workers(32)  # and for sockets that no queue takes
_closer = Workers(1)
_lock = threading.Lock()
_pile: list[int] = []  # what is to be closed next
_busy = False  # does a thread close what was there before?


def is_listener(fd: int) -> bool:
    """Is @fd a seccomp listener? Reads it from procfs, because its sender may lie. Raises OSError if it is closed."""
    return os.readlink(f"/proc/self/fd/{fd}") == LISTENER


def close_foreign(*fds: int) -> None:
    """Close descriptors that a peer sent. Never blocks: all but seccomp listeners are closed in another thread."""
    global _busy
    for fd in fds:
        kind = _kind(fd)
        if kind == LISTENER:
            os.close(fd)
        elif kind.startswith(WITHOUT_FLUSH):
            with _lock:
                _pile.append(fd)
                begins, _busy = not _busy, True
            if begins:
                _run(_closer, _close_pile)
        else:
            _run(_files, partial(_close, fd))


def _kind(fd: int) -> str:
    """What procfs shows @fd as. Of a file that is too deep in its directories it shows nothing (ENAMETOOLONG)."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def take_out_of_band(sock: socket.socket) -> None:
    """Have a byte that a peer sends with MSG_OOB received as the others are: else the kernel drops what it brings.

    For a unix socket, as soon as it is accepted.
    """
    with contextlib.suppress(OSError):  # before Linux 5.15 there is no such byte
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def end(sock: socket.socket) -> None:
    """Close a connection of a peer's, a unix socket, in whose queue there may be descriptors. Never blocks."""
    if sock.fileno() < 0:
        return
    with contextlib.suppress(OSError):  # ENOTCONN
        sock.shutdown(socket.SHUT_RDWR)  # nothing is added from here on
    if sock.type == socket.SOCK_STREAM and not _unread(sock):
        sock.close()
    else:
        close_foreign(sock.detach())


def receive_fds(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """Receive up to 64 KiB with descriptors, which are close-on-exec: data, descriptors, msg_flags (recvmsg(2)).

    socket.recv_fds() is no use here: it ignores its flags (CPython 3.11). Raises OSError.
    """
    fds = array.array("i")
    room = socket.CMSG_LEN(MOST * fds.itemsize)
    data, ancillary, flags, _ = sock.recvmsg(65536, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return data, list(fds), flags


def receive(sock: socket.socket) -> bytes:
    """Receive up to 64 KiB from a peer that has no descriptors to send. Raises OSError."""
    data, fds, _ = receive_fds(sock)
    close_foreign(*fds)
    return data


def _unread(sock: socket.socket) -> int:
    """The bytes in the queue of a stream socket (unix(7), SIOCINQ). A message with descriptors has one at least."""
    return int(struct.unpack("=i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


def _run(workers: Workers, job: Callable[[], None]) -> None:
    try:
        workers.run(job)
    except RuntimeError:  # no thread can be made: blocking is better than a leak
        job()


def _close(fd: int) -> None:
    with contextlib.suppress(OSError), watched_close():
        os.close(fd)


def _close_pile() -> None:
    global _busy
    while True:
        with _lock:
            fds = list(_pile)
            _pile.clear()
            _busy = bool(fds)
        if not fds:
            return
        with contextlib.suppress(Exception):  # or nobody would close anything any more
            while len(fds) > 1:
                fds = [fd for at in range(0, len(fds), MOST) for fd in _in_a_queue(fds[at : at + MOST])]
            for fd in fds:
                _close(fd)


def _in_a_queue(fds: list[int]) -> list[int]:
    """A unix socket in whose queue @fds are, and nowhere else any more; none if each had to be closed by itself."""
    try:
        sending, queue = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with sending, queue:
            socket.send_fds(sending, [b"x"], fds)
            for fd in fds:
                os.close(fd)  # never waits: this is not the last reference
            return [queue.detach()]
    except OSError:  # EMFILE; ETOOMANYREFS: of unix sockets in queues of unix sockets there are four levels
        half = len(fds) // 2
        if half:
            return [fd for part in (fds[:half], fds[half:]) for fd in _in_a_queue(part)]
        _run(_files, partial(_close, fds[0]))
        return []
