"""Read and change what belongs to a target: its descriptors and credentials. Its memory: graft/trap/caller.py.

A target is hostile. Its threads may change its memory and its descriptors at any moment. So all that is decided on is
read once, into memory of ours, and is carried out on our own duplicates. Reading may block (graft/trap/listeners.py),
so worker threads call this module. A PID is that of a thread unless a docstring says otherwise.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from graft.kernel import linux
from graft.rules.address import MAPPED, Address

T = TypeVar("T")

PIDFD_THREAD = os.O_EXCL
NS_GET_PARENT = 0xB702  # linux/nsfs.h
SOCKADDR_MAX = 128  # struct sockaddr_storage


class Name(NamedTuple):
    """A socket address as the target wrote it: address and port in host order, or for AF_GRAFT the endpoint."""

    family: int
    address: Address | None = None
    port: int = 0
    endpoint: str = ""  # AF_GRAFT


def signed(argument: int) -> int:
    """The low 32 bits of a call's argument as a signed int, as the kernel takes them for an int parameter."""
    value: int = struct.unpack("i", struct.pack("I", argument & 0xFFFFFFFF))[0]
    return value


def thread_group(pid: int) -> int:
    """The PID of a thread's process (proc(5), Tgid). Raises ProcessLookupError or FileNotFoundError if it is gone."""
    return int(_status(pid, b"Tgid:")[0])


def threads(pid: int) -> int:
    """How many threads a thread's process has (proc(5), Threads). Raises OSError if it is gone."""
    return int(_status(pid, b"Threads:")[0])


def _status(pid: int, field: bytes) -> list[bytes]:
    with open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(field):
                return line.split()[1:]
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def administers_network(pid: int) -> bool:
    """Has a thread CAP_NET_ADMIN in graftd's user namespace, or in one above that? Raises OSError.

    What it has in a user namespace below counts for nothing over the host's netns (user_namespaces(7)).
    """
    with open(f"/proc/{pid}/ns/user", "rb") as user:
        if os.fstat(user.fileno()).st_ino != os.stat("/proc/self/ns/user").st_ino:
            try:
                os.close(fcntl.ioctl(user, NS_GET_PARENT))
            except PermissionError:  # it is not below ours
                return True
            return False
    return bool(int(_status(pid, b"CapEff:")[0], 16) & 1 << linux.CAP_NET_ADMIN)


def capabilities_over(pid: int, owner: int) -> int:
    """The capabilities that a thread has over what belongs to the user namespace with the descriptor @owner, as bits.

    Those of its own user namespace hold there and in those below it (user_namespaces(7)). Raises OSError.
    """
    own = os.stat(f"/proc/{pid}/ns/user").st_ino
    at = os.dup(owner)
    try:
        while os.fstat(at).st_ino != own:
            try:
                above = fcntl.ioctl(at, NS_GET_PARENT)
            except PermissionError:  # there is none above, or none that this process may see
                return 0
            os.close(at)
            at = above
    finally:
        os.close(at)
    return int(_status(pid, b"CapEff:")[0], 16)


def groups(pid: int) -> list[int]:
    """The effective gid and the supplementary groups of a thread. Raises OSError if it is gone."""
    return [int(_status(pid, b"Gid:")[1]), *map(int, _status(pid, b"Groups:"))]


def file_owner(pid: int) -> "Owner":
    """The uid and gid that own what a thread makes (its file system uid, proc(5)). Raises OSError if it is gone."""
    return Owner(int(_status(pid, b"Uid:")[3]), int(_status(pid, b"Gid:")[3]))


def link(pid: int, number: int) -> str:
    """What a thread's descriptor leads to (/proc/PID/fd); "" if there is none."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""


def borrow_fd(pid: int, number: int) -> int:
    """A duplicate of a thread's descriptor (pidfd_getfd(2)), which the caller closes.

    Raises OSError: EBADF if the thread has no such descriptor, ESRCH; EPERM on kernels before 6.9, if the thread
    has a descriptor table of its own.
    """
    try:
        pidfd = os.pidfd_open(pid, PIDFD_THREAD)
    except OSError:  # before Linux 6.9 only the leader's table, unless the thread's is another one
        leader = thread_group(pid)
        if leader != pid and link(leader, number) != link(pid, number):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
        pidfd = os.pidfd_open(leader)
    try:
        return linux.pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)


def parse_name(raw: bytes) -> Name | None:
    """Parse a sockaddr_in, sockaddr_in6 or sockaddr_gr; None if it is too short or of another family."""
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
    """The bytes of a struct sockaddr_in or sockaddr_in6 (ip(7), ipv6(7)), by the family of @address."""
    if address.v4:
        return struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + address.raw[12:] + bytes(8)
    return struct.pack("=H", socket.AF_INET6) + port.to_bytes(2, "big") + bytes(4) + address.raw + bytes(4)


def host_address(address: Address, port: int) -> tuple[str, int]:
    """The address as Python's socket module takes it: (text, port)."""
    return str(address), port


def descriptors(pid: int, inode: int) -> list[tuple[int, bool]]:
    """The (number, close-on-exec) of all descriptors by which a thread has the socket with this inode."""
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


def apart(work: Callable[[], T]) -> T:
    """Run @work in a new thread, wait for it, and return its result or raise its exception.

    What @work changes of its thread ends with the thread: after unshare(2) umask or descriptors.
    """
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
    """A uid and a gid, read once: a thread may execute a set-user-ID program meanwhile."""

    uid: int
    gid: int


def owner(pid: int) -> Owner:
    """The effective uid and gid of a thread, as graftd's user namespace sees them.

    Raises ProcessLookupError or FileNotFoundError if the thread is gone.
    """
    return Owner(int(_status(pid, b"Uid:")[1]), int(_status(pid, b"Gid:")[1]))
