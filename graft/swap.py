"""The swap: another socket in the place of the one that socket() gave.

Endpoints of type unix, or in another namespace than the one in which a tenant's sockets are made, need a
socket that cannot be made before the program says where it goes. It is made at bind() or connect(), takes the
old one's options, and takes its place at every descriptor of the calling process and in its epoll instances.
Copies that other processes inherited before keep the old socket.

An inet socket of another namespace is swapped in unbound, with its place in the stamp, and the call then
proceeds: the bind or connect hook decides it as any other. A unix socket is bound or connected here, since no
hook of ours sees it.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable

from graft import linux, target
from graft.endpoint import UNIX_PATH_MAX

CLONE_FS = 0x00000200
UNIX_UMASK = 0o111  # the socket's directory says who may connect
CONNECT_PATIENCE = 5.0  # seconds that a blocking connect waits for a full backlog
PAUSE = 0.02

# (level, option, size of its value): what a program may have set, by what it is called in ip(7), tcp(7), socket(7)
OPTIONS = tuple(
    [(socket.SOL_SOCKET, option, 4) for option in (2, 5, 6, 7, 8, 9, 10, 12, 15, 16, 18, 29, 35, 37, 40, 42, 44, 46)]
    + [(socket.SOL_SOCKET, socket.SO_LINGER, 8)]
    + [(socket.SOL_SOCKET, option, 16) for option in (20, 21)]  # SO_RCVTIMEO, SO_SNDTIMEO
    + [(socket.IPPROTO_TCP, option, 4) for option in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 18, 23, 24, 25, 30, 34, 36)]
    + [(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)]
    + [(socket.IPPROTO_IP, option, 4) for option in (1, 2, 6, 8, 10, 11, 12, 13, 20, 21, 24, 33, 34)]
    + [(socket.IPPROTO_IPV6, option, 4) for option in (16, 18, 19, 23, 25, 26, 49, 51, 56, 58, 60, 66, 67, 70, 72)]
)
BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF)


def carry_options(old: socket.socket, new: socket.socket) -> None:
    """Give @new what was set on @old; what is still at its default is left at the other's own."""
    with socket.socket(old.family, old.type) as fresh:
        default = {option: fresh.getsockopt(socket.SOL_SOCKET, option, 4) for option in BUFFERS}
    for level, option, size in OPTIONS:
        with contextlib.suppress(OSError):  # an option that one of the two does not have
            value = old.getsockopt(level, option, size)
            if value == new.getsockopt(level, option, size):
                continue
            if level == socket.SOL_SOCKET and option in BUFFERS:  # the kernel shows twice what was asked (socket(7))
                if value == default[option]:
                    continue  # TCP's is small, to grow as needed; a unix socket's does not grow
                value = (int.from_bytes(value, "little") // 2).to_bytes(4, "little")
            new.setsockopt(level, option, value)
    flags = fcntl.fcntl(old, fcntl.F_GETFL)
    fcntl.fcntl(new, fcntl.F_SETFL, flags & (os.O_NONBLOCK | os.O_ASYNC))


def bind_unix(sock: socket.socket, path: str, who: "int | target.Owner") -> None:
    """Bind to @path on the host, for a thread or a user. Raises OSError.

    A socket file that nobody listens behind, left by a server that has ended, is replaced: a TCP port would
    be free again as well.
    """
    uid, gid = target.owner(who)

    def work() -> None:
        linux.unshare(CLONE_FS)
        os.umask(UNIX_UMASK)
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _stale(path, sock.type):
                raise
            os.unlink(path)
            sock.bind(path)
        os.chown(path, uid, gid, follow_symlinks=False)

    target.apart(work)


def _stale(path: str, kind: int) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def connect_unix(sock: socket.socket, path: str, who: "int | target.Owner", waiting: Callable[[], bool]) -> int:
    """Connect to @path as a thread, or a user; an errno, 0 if connected. @waiting: does the target still?"""
    blocking = not fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK
    sock.setblocking(False)
    deadline = time.monotonic() + CONNECT_PATIENCE
    try:
        while True:
            try:
                target.as_target(who, lambda: sock.connect(path))
                return 0
            except FileNotFoundError:
                return errno.ECONNREFUSED  # what a port without a server says
            except BlockingIOError:
                if not blocking or time.monotonic() > deadline or not waiting():
                    return errno.EAGAIN
                time.sleep(PAUSE)
            except OSError as error:
                return error.errno or errno.EIO
    finally:
        sock.setblocking(blocking)


def fits(path: str) -> bool:
    """Is @path short enough, in a directory that exists?"""
    return len(os.fsencode(path)) <= UNIX_PATH_MAX and os.path.isdir(os.path.dirname(path))
