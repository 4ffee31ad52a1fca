"""Network namespaces: entered, named, known again, and who lives in them."""

import contextlib
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from graft.errors import Failure, Refused
from graft.kernel import foreign, linux

CLAIM = "graftd"
NS_GET_USERNS, NS_GET_OWNER_UID = 0xB701, 0xB704  # linux/nsfs.h


def enter_initial() -> None:
    """Join the network and mount namespaces of process 1, if this process is in others.

    /proc/1/ns may be unreadable, because process 1 has a capability that this root lacks (ptrace(2), access mode
    checking). Then join those of the oldest ancestor that can be read. Raises OSError if setns(2) fails.
    """
    for pid in (1, *reversed(_ancestors())):
        try:
            opened = [
                (os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), name) for name in ("net", "mnt")
            ]
        except OSError:
            continue
        for fd, name in opened:
            if os.fstat(fd).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
                linux.setns(fd)
            os.close(fd)
        return


def _ancestors() -> list[int]:
    """The PIDs of this process's ancestors, its parent first, without process 1."""
    found = []
    pid = os.getppid()
    while pid > 1:
        found.append(pid)
        try:
            pid = linux.parent(pid)
        except OSError:
            break
    return found


def netns_cookie() -> int:
    """SO_NETNS_COOKIE of the current netns (socket(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, linux.SO_NETNS_COOKIE, 8), "little")


def netns_cookie_of(fd: int) -> int:
    """SO_NETNS_COOKIE of the netns @fd. The kernel never reuses a cookie, but it reuses inodes. Raises OSError."""
    with linux.inside_netns(fd):
        return netns_cookie()


def belongs_here(fd: int) -> bool:
    """Does the netns @fd belong to this process's user namespace (ioctl_ns(2), NS_GET_USERNS)? Raises OSError.

    The owner of another one is root in the netns, whoever that is outside.
    """
    try:
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
    except PermissionError:  # it belongs to one that is not below this process's
        return False
    try:
        return os.fstat(owner).st_ino == os.stat("/proc/self/ns/user").st_ino
    finally:
        os.close(owner)


def netns_owner(fd: int) -> int:
    """The uid of who has made the user namespace that the netns @fd belongs to (ioctl_ns(2)). Raises OSError."""
    space = fcntl.ioctl(fd, NS_GET_USERNS)
    try:
        return int.from_bytes(fcntl.ioctl(space, NS_GET_OWNER_UID, bytes(4)), sys.byteorder)
    finally:
        os.close(space)


def make_netns() -> int:
    """A descriptor of a new netns, in which lo is up. Only the calling thread moves there and back.

    Raises OSError.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.unshare(linux.CLONE_NEWNET)
        try:
            linux.loopback_up()
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            linux.setns(home, linux.CLONE_NEWNET)
    finally:
        os.close(home)


def claim_netns() -> socket.socket | None:
    """Claim the current netns by the abstract name CLAIM, which each netns has once, whatever its mounts are.

    Returns the socket that holds it: it is bound, and listens to nobody. None if a process that is not root's has
    taken the name, which says nothing. Raises Failure if root's has.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(f"\0{CLAIM}")
    except OSError:
        sock.close()
        holder = netns_claimant()
        if holder:
            raise Failure(
                f"another graftd (pid {holder}) supervises this network namespace",
                hint="GRAFT_RUN_DIR names it; "
                f"if its /run is another one, nsenter --target {holder} --mount leads there",
            ) from None
        return None
    return sock


def netns_claimant() -> int:
    """The PID of root's process that has claimed the current netns; 0 if there is none."""
    for line in Path("/proc/net/unix").read_text(errors="replace").splitlines():
        words = line.split()
        if words[7:] == [f"@{CLAIM}"]:
            wanted = f"socket:[{words[6]}]"
            return next((pid for pid in _processes_of_root() if _has_open(pid, wanted)), 0)
    return 0


def _processes_of_root() -> Iterator[int]:
    """The PIDs of processes whose four uids are root's; a set-user-ID program that a user has started is not one."""
    for entry in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and b"\nUid:\t0\t0\t0\t0\n" in Path(entry.path, "status").read_bytes():
                yield int(entry.name)


def _has_open(pid: int, wanted: str) -> bool:
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == wanted:
                    return True
    return False


def processes_by_netns() -> dict[int, list[int]]:
    """The PIDs of all processes, by the inode of their netns."""
    found: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found.setdefault(linux.netns_inode(entry.name), []).append(int(entry.name))
    return found


def processes_in_netns(netns: int) -> list[int]:
    """The PIDs of all processes in the netns with this inode."""
    return processes_by_netns().get(netns, [])


def is_pid(text: str) -> bool:
    """Is @text, which names a netns, the PID of a process that may live?"""
    return text.isascii() and text.isdigit()


def open_netns(text: str) -> tuple[int, str]:
    """Open the netns that @text names by a PID, a name (ip-netns(8)) or a path.

    Returns the descriptor, which the caller closes, and the path. Raises Refused if there is no such netns.
    """
    if "/" in text:
        path = text
    elif is_pid(text):
        path = f"/proc/{text}/ns/net"
    else:
        path = f"/run/netns/{text}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # it may be a FIFO
    except ValueError:
        raise Refused("the name of a network namespace contains a NUL byte", code="EINVAL") from None
    except OSError as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        if isinstance(error, ProcessLookupError):
            reason = "does not exist"
        raise Refused(
            f"network namespace '{text}' {reason}",
            hint="'ip netns list' shows named ones, 'graft ps' containers",
            code="ENOENT",
        ) from None
    try:
        foreign.check_netns(fd)
    except OSError:
        os.close(fd)
        raise Refused(
            f"'{text}' is not a network namespace", hint="give a PID, a name or a path", code="EINVAL"
        ) from None
    return fd, path


def netns_alive(netns: int, path: str) -> bool:
    """Does the netns with this inode still exist: at @path, at another mount, or because a process is in it?"""
    try:
        if os.stat(path).st_ino == netns:
            return True
    except OSError:
        pass
    return f" net:[{netns}] " in Path("/proc/self/mountinfo").read_text() or bool(processes_in_netns(netns))
