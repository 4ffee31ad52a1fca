"""What the supervisor looks at and touches in a target: its sockets, descriptors, memory and credentials.

A target is hostile. Its threads change memory and descriptors at any moment, so everything here is read once,
into memory of ours, and what is decided from it is carried out on our own duplicates.
"""

import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from graft import linux
from graft.endpoint import MAPPED, Address
from graft.notify import Notification

T = TypeVar("T")

PIDFD_THREAD = os.O_EXCL
NR_SETGROUPS, NR_SETRESUID, NR_SETRESGID = 116, 117, 119
EPOLL_CTL_ADD = 1
SOCKADDR_MAX = 128  # struct sockaddr_storage


class Name(NamedTuple):
    """A socket address as the target wrote it: family, and the rest by family."""

    family: int
    address: Address | None = None
    port: int = 0
    endpoint: str = ""  # AF_GRAFT


class Watch(NamedTuple):
    """A registration in one of the target's epoll instances (proc(5), fdinfo): `number` is its descriptor."""

    epoll: int
    number: int
    events: int
    data: int


def signed(argument: int) -> int:
    """The low 32 bits of a call's argument as the int that the kernel takes."""
    value: int = struct.unpack("i", struct.pack("I", argument & 0xFFFFFFFF))[0]
    return value


def thread_group(pid: int) -> int:
    """The process of a thread. Raises ProcessLookupError."""
    return int(_status(pid, b"Tgid:")[0])


def _status(pid: int, field: bytes) -> list[bytes]:
    with open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(field):
                return line.split()[1:]
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def _link(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""


def borrow_fd(pid: int, number: int) -> int:
    """Our duplicate of a thread's descriptor (pidfd_getfd(2)). Raises OSError if it has none of this number."""
    try:
        pidfd = os.pidfd_open(pid, PIDFD_THREAD)
    except OSError:  # before Linux 6.9: the leader's table, unless the thread has one of its own
        leader = thread_group(pid)
        if leader != pid and _link(leader, number) != _link(pid, number):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
        pidfd = os.pidfd_open(leader)
    try:
        return linux.pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)


def borrow(call: Notification) -> socket.socket | None:
    """A duplicate of the socket that the call's first argument names, None if that is no socket.

    Raises PermissionError where the thread's own descriptors cannot be told.
    """
    try:
        fd = borrow_fd(call.pid, signed(call.args[0]))
    except PermissionError:
        raise
    except OSError:
        return None
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        return None


def read_name(pid: int, address: int, length: int) -> tuple[Name | None, bytes]:
    """The socket address at @address, and its bytes; None if it is too short for its family, or of another one.

    Raises OSError: EFAULT, or EINVAL for a length that no socket address has.
    """
    if not 0 <= length <= SOCKADDR_MAX:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    raw = linux.read_memory(pid, address, length) if length else b""
    if len(raw) < length:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    return parse_name(raw), raw


def parse_name(raw: bytes) -> Name | None:
    """sockaddr_in, sockaddr_in6 or sockaddr_gr."""
    if len(raw) < 2:
        return None
    family = int.from_bytes(raw[:2], "little")
    if family == socket.AF_INET and len(raw) >= 16:
        return Name(family, Address(MAPPED + raw[4:8]), int.from_bytes(raw[2:4], "big"))
    if family == socket.AF_INET6 and len(raw) >= 24:
        return Name(family, Address(raw[8:24]), int.from_bytes(raw[2:4], "big"))
    if family == linux.AF_GRAFT and len(raw) >= 18:
        return Name(family, endpoint=raw[2:18].split(b"\0", 1)[0].decode(errors="surrogateescape"))
    return None


def sockaddr(address: Address, port: int) -> bytes:
    """struct sockaddr_in or sockaddr_in6."""
    if address.v4:
        return struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + address.raw[12:] + bytes(8)
    return struct.pack("=H", socket.AF_INET6) + port.to_bytes(2, "big") + bytes(4) + address.raw + bytes(4)


def host_address(address: Address, port: int) -> tuple[str, int]:
    """As Python's socket module takes it."""
    return str(address), port


def write_value(pid: int, address: int, length_address: int, value: bytes) -> None:
    """Give the target a value and its length, as getsockname(2) and getsockopt(2) do.

    Raises OSError: EFAULT, EINVAL for a negative length.
    """
    raw = linux.read_memory(pid, length_address, 4)
    if len(raw) < 4:
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    room = int.from_bytes(raw, "little", signed=True)
    if room < 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    part = value[:room]
    if part and linux.write_memory(pid, address, part) < len(part):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
    linux.write_memory(pid, length_address, struct.pack("=i", len(value)))


def descriptors(pid: int, inode: int) -> list[tuple[int, bool]]:
    """(number, close-on-exec) of every descriptor by which a thread has the socket with this inode."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(entry.path) == f"socket:[{inode}]":
                found.append((int(entry.name), bool(_open_flags(pid, entry.name) & os.O_CLOEXEC)))
    return found


def _open_flags(pid: int, number: str) -> int:
    with open(f"/proc/{pid}/fdinfo/{number}") as info:
        for line in info:
            if line.startswith("flags:"):
                return int(line.split()[1], 8)
    return 0


def watches(pid: int, inode: int) -> list[Watch]:
    """Where the target's epoll instances watch the socket with this inode."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if os.readlink(entry.path) != "anon_inode:[eventpoll]":
                continue
            with open(f"/proc/{pid}/fdinfo/{entry.name}") as info:
                for line in info:
                    words = line.replace(":", " ").split()
                    if words[:1] != ["tfd"]:
                        continue
                    told = dict(zip(words[::2], words[1::2], strict=False))
                    if int(told["ino"], 16) == inode:
                        watch = Watch(
                            int(entry.name), int(told["tfd"]), int(told["events"], 16), int(told["data"], 16)
                        )
                        found.append(watch)
    return found


def watch_again(pid: int, sock: socket.socket, registrations: list[Watch]) -> None:
    """Register @sock where another socket was watched, under the same number and data.

    epoll(7) knows an entry by its file and the number it had in the caller's table, so this happens in a
    thread with a table of its own, where @sock is put at that number.
    """

    def work() -> None:
        linux.unshare(linux.CLONE_FILES)
        import fcntl

        top = max(watch.number for watch in registrations) + 1
        for watch in registrations:
            epoll = borrow_fd(pid, watch.epoll)
            high = fcntl.fcntl(epoll, fcntl.F_DUPFD_CLOEXEC, top)
            mine = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, top)
            os.dup2(mine, watch.number, inheritable=False)
            event = ctypes.create_string_buffer(struct.pack("=IQ", watch.events & 0xFFFFFFFF, watch.data))
            if linux.libc.epoll_ctl(high, EPOLL_CTL_ADD, watch.number, event) < 0:
                raise linux.oserror("epoll_ctl")

    if registrations:
        apart(work)


def apart(work: Callable[[], T]) -> T:
    """Run @work in a thread that ends with it: what it changes of itself, credentials, umask, table, goes too."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


class Owner(NamedTuple):
    """A user and group by number, where no thread's are meant: a program may exec another with other ones."""

    uid: int
    gid: int


def as_target(who: "int | Owner", work: Callable[[], T]) -> T:
    """Run @work with the effective user and group of a thread, or of an Owner, and no capability.

    A unix socket tells its peer who connected (SO_PEERCRED), and graftd's own root must not be the answer.
    """
    uid, gid = owner(who)

    def body() -> T:
        for call, arguments in (
            (NR_SETGROUPS, (0, None)),
            (NR_SETRESGID, (gid, gid, gid)),
            (NR_SETRESUID, (uid, uid, uid)),
            (linux.NR_CAPSET, (struct.pack("=Ii", linux.CAPABILITY_VERSION_3, 0), bytes(24))),
        ):
            if linux.libc.syscall(call, *arguments) < 0:
                raise linux.oserror("become the target's user")
        return work()

    return apart(body)


def owner(who: "int | Owner") -> Owner:
    """Effective uid and gid of a thread, as graftd's user namespace sees them."""
    if isinstance(who, Owner):
        return who
    pid = who
    return Owner(int(_status(pid, b"Uid:")[1]), int(_status(pid, b"Gid:")[1]))
