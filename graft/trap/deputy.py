"""connect(2) and sendto(2) on unix sockets as a target's user, by a process of its own (csrc/deputy.c).

A unix socket tells its peer who connected (unix(7), SO_PEERCRED), and that must not be graftd's root. But whoever has
a thread's uid may stop it, lower its limits and trace it, so no thread of graftd takes another's uid. The process
shares nothing with graftd.

It lives for one call, about a millisecond. graftd kills it when it has answered or when its time is up, and does not
wait for one that is stuck in the kernel: that is reaped later.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import threading
from pathlib import Path

from graft.log import log
from graft.process.title import DEPUTY
from graft.trap.target import Owner

PROGRAM = Path(__file__).parents[1] / "graft-deputy"
# csrc/deputy.h
DEPUTY_CONNECT, DEPUTY_SENDTO = 1, 2
DEPUTY_PATH = 108
ORDER = struct.Struct(f"=IIIiII{DEPUTY_PATH}s")
ANSWER = struct.Struct("=qi4x")
PATIENCE = 5.0  # seconds; the calls do not block, but a busy machine may be slow to start it
REAP = 0.1  # seconds that a killed one has to end

_killed: set[int] = set()
_lock = threading.Lock()


def connect(who: Owner, sock: socket.socket, path: str) -> None:
    """connect(2) a non-blocking unix socket to @path as @who. Raises OSError: ETIMEDOUT after PATIENCE."""
    _call(who, sock, DEPUTY_CONNECT, path)


def sendto(who: Owner, sock: socket.socket, data: bytes, flags: int, path: str) -> int:
    """sendto(2) a unix socket at @path as @who; @flags has MSG_DONTWAIT. Returns the bytes sent. As connect()."""
    return _call(who, sock, DEPUTY_SENDTO, path, flags, data)


def _call(who: Owner, sock: socket.socket, call: int, path: str, flags: int = 0, data: bytes = b"") -> int:
    raw = os.fsencode(path)
    if len(raw) >= DEPUTY_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            ours.send(ORDER.pack(who.uid, who.gid, call, flags, len(raw), len(data), raw) + data)
            pid = _start(sock, theirs)
        try:
            poll = select.poll()
            poll.register(ours, select.POLLIN)
            if not poll.poll(PATIENCE * 1000):
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            answer = ours.recv(ANSWER.size)
        finally:
            _end(pid)
    if len(answer) != ANSWER.size:  # it has failed before it knew what to do, or somebody has killed it
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    value, error = ANSWER.unpack(answer)
    if error:
        raise OSError(error, os.strerror(error))
    return int(value)


def _start(sock: socket.socket, channel: socket.socket) -> int:
    """Start a deputy with two descriptors; graftd's others are close-on-exec. Returns its PID. Raises OSError."""
    actions = [
        (os.POSIX_SPAWN_DUP2, sock.fileno(), 0),
        (os.POSIX_SPAWN_DUP2, channel.fileno(), 1),
        (os.POSIX_SPAWN_CLOSE, 2),
    ]
    try:
        return os.posix_spawn(PROGRAM, [DEPUTY], {}, file_actions=actions, setsigmask=[])
    except OSError as error:
        log.error("cannot start %s: %s; the target's call is refused", PROGRAM, error.strerror)
        raise


def _end(pid: int) -> None:
    """Kill a deputy and reap it, and earlier ones that were stuck."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(REAP * 1000)
    finally:
        os.close(pidfd)
    with _lock:
        _killed.add(pid)
        for ended in list(_killed):
            with contextlib.suppress(ChildProcessError):
                if not os.waitpid(ended, os.WNOHANG)[0]:
                    continue
            _killed.discard(ended)
