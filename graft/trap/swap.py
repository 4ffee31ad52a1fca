"""Replace the socket that socket() gave by another one.

Theory of operation

Goal: a program that asks for an internet address reaches an endpoint of type unix, or one in another netns.

Facts: a socket's family and netns are fixed when it is made. But at socket() nobody knows yet where the program will
bind or connect it.

Solution: the right socket is made at bind() or connect(). It gets the old one's options, and replaces it at every
descriptor of the calling process and in the process's epoll instances.

An internet socket of another netns is put in place unbound, with the number of its place in the stamp, and the call
then proceeds: the bind or connect hook decides on it as on any other. A unix socket is bound or connected here, since
graft has no hook for it.

What still fails: copies of the descriptor that other processes inherited before keep the old socket.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable

from graft.kernel import linux
from graft.rules.endpoint import Endpoint
from graft.trap import deputy, target

CLONE_FS = 0x00000200
UNIX_UMASK = 0o111  # all may connect: permissions are those of the socket's directory
CONNECT_PATIENCE = 5.0  # seconds that a blocking connect waits for a full backlog
PAUSE, PAUSE_MAX = 0.02, 0.2  # seconds between two attempts; it doubles

# (level, option, size of its value in bytes): the options of socket(7), tcp(7), ip(7), ipv6(7) that are carried over
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
    """Set on @new the options and file status flags that a program has set on @old. Raises OSError.

    An option at its default is not carried over, because the default of @new may be another.
    """
    with socket.socket(old.family, old.type) as fresh:
        default = {option: fresh.getsockopt(socket.SOL_SOCKET, option, 4) for option in BUFFERS}
    for level, option, size in OPTIONS:
        with contextlib.suppress(OSError):  # one of the two sockets does not have this option
            value = old.getsockopt(level, option, size)
            if value == new.getsockopt(level, option, size):
                continue
            if level == socket.SOL_SOCKET and option in BUFFERS:  # the kernel returns the double (socket(7))
                if value == default[option]:
                    continue  # TCP's default is small and grows; a unix socket's buffer does not grow
                value = (int.from_bytes(value, "little") // 2).to_bytes(4, "little")
            new.setsockopt(level, option, value)
    flags = fcntl.fcntl(old, fcntl.F_GETFL)
    fcntl.fcntl(new, fcntl.F_SETFL, flags & (os.O_NONBLOCK | os.O_ASYNC))


def bind_unix(sock: socket.socket, endpoint: Endpoint, who: target.Owner) -> os.stat_result:
    """Bind @sock to an endpoint's path, and give the file to the user @who. Returns what fstat(2) says of the file.

    Root has the rights to the path that root has named, and @who to one that a user without root has.

    The directory may be one that the target writes to. So it is opened once, without following a link, and the file
    is given away by itself, not by its name. The socket's own address becomes the name in its directory.

    A socket file at @path whose server has ended is replaced, because a TCP port would be free again as well. Raises
    OSError: EADDRINUSE if a server still listens, or if @path is no socket; ELOOP.
    """
    directory, name = os.path.split(endpoint.path)

    def work() -> os.stat_result:
        if not endpoint.by_user:
            return bind()
        linux.clear_groups()
        with linux.with_file_ids(*who):
            return bind()

    def bind() -> os.stat_result:
        linux.unshare(CLONE_FS)
        os.umask(UNIX_UMASK)
        place = linux.open_directory(directory)
        try:
            os.fchdir(place)
            try:
                sock.bind(name)
            except OSError as error:
                if error.errno != errno.EADDRINUSE or not _stale(name, sock.type):
                    raise
                os.unlink(name)
                sock.bind(name)
        finally:
            os.close(place)
        file = linux.bound_file(sock)
        try:
            os.chown(f"/proc/self/fd/{file}", *who)
            return os.fstat(file)
        finally:
            os.close(file)

    return target.apart(work)


def _stale(name: str, kind: int) -> bool:
    """Is @name in the working directory a socket whose server has ended?"""
    try:
        file = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not stat.S_ISSOCK(os.fstat(file).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, kind) as probe:
            probe.setblocking(False)
            probe.connect(f"/proc/self/fd/{file}")
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    finally:
        os.close(file)
    return False


def connect_unix(sock: socket.socket, path: str, who: target.Owner, waiting: Callable[[], bool]) -> int:
    """Connect @sock to @path as the user @who. Returns an errno, or 0.

    A blocking socket waits up to CONNECT_PATIENCE seconds for room in the server's backlog, and as long as @waiting()
    says that the target still waits.
    """
    blocking = not fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK
    sock.setblocking(False)
    deadline = time.monotonic() + CONNECT_PATIENCE
    pause = PAUSE
    try:
        while True:
            try:
                deputy.connect(who, sock, path)
                return 0
            except FileNotFoundError:
                return errno.ECONNREFUSED  # as for a TCP port without a server
            except BlockingIOError:
                if not blocking or time.monotonic() > deadline or not waiting():
                    return errno.EAGAIN
                time.sleep(pause)
                pause = min(2 * pause, PAUSE_MAX)
            except OSError as error:
                return error.errno or errno.EIO
    finally:
        sock.setblocking(blocking)
