"""System calls that Python does not wrap: constants, structures, and one thin function for each call.

`graft run` pays for every import before its command starts, so this module imports little of the standard library
and nothing else. Names are the kernel's. Every wrapper raises OSError with the name of the call; none interprets an
errno.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Iterable, Iterator

from graft.kernel.architecture import HERE

AF_GRAFT = 4  # AF_IPX's number, as AF_GRAFT's own header has it
AF_ISDN, AF_SMC = 34, 43  # linux/socket.h; Python has no names for them
CLONE_FILES = 0x00000400
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWNET = 0x40000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNS = 0x00020000
IFF_UP = 1
IPPROTO_GRAFT = 254
IPPROTO_SMC = 256
IPPROTO_MPTCP = 262
IP_FREEBIND = 15
IPV6_FREEBIND = 78
MS_BIND = 4096
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOSUID = 2
MS_RDONLY = 1
MS_REMOUNT = 32
MS_REC = 16384
MS_RELATIME = 1 << 21
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
PR_SET_DUMPABLE = 4
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38
PR_SET_TIMERSLACK = 29
SECCOMP_ADDFD_FLAG_SETFD = 1
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 32
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1
PROCMAP_QUERY = 0xC0686611  # linux/fs.h: _IOWR('f', 17, struct procmap_query)
PROCMAP_QUERY_SIZE = 104
PROCMAP_QUERY_VMA_WRITABLE = 2
SIOCGIFFLAGS = 0x8913
SIOCGSKNS = 0x894C
SIOCUNIXFILE = 0x89E0
RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 2, 4
SIOCSIFFLAGS = 0x8914
SO_PEERPIDFD = 77
SO_NETNS_COOKIE = 71

# linux/seccomp.h: _IOWR('!', n, ...)
SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102
SECCOMP_IOCTL_NOTIF_ADDFD = 0x40182103
SECCOMP_IOCTL_NOTIF_SET_FLAGS = 0x40082104

# The numbers of this machine's architecture
NUMBERS = HERE.numbers
NR_BPF = NUMBERS["bpf"]
NR_IOCTL = NUMBERS["ioctl"]
NR_SOCKET, NR_SOCKETPAIR = NUMBERS["socket"], NUMBERS["socketpair"]
NR_BIND, NR_CONNECT, NR_LISTEN = NUMBERS["bind"], NUMBERS["connect"], NUMBERS["listen"]
NR_SENDTO = NUMBERS["sendto"]
NR_GETSOCKNAME, NR_GETPEERNAME = NUMBERS["getsockname"], NUMBERS["getpeername"]
NR_SETSOCKOPT, NR_GETSOCKOPT = NUMBERS["setsockopt"], NUMBERS["getsockopt"]
NR_SETRESUID, NR_SETRESGID = NUMBERS["setresuid"], NUMBERS["setresgid"]
NR_SETGROUPS = NUMBERS["setgroups"]
NR_SETFSUID, NR_SETFSGID = NUMBERS["setfsuid"], NUMBERS["setfsgid"]
NR_CAPGET, NR_CAPSET = NUMBERS["capget"], NUMBERS["capset"]
NR_SECCOMP = NUMBERS["seccomp"]
NR_IO_URING_SETUP = NUMBERS["io_uring_setup"]
NR_OPEN_TREE, NR_MOVE_MOUNT = NUMBERS["open_tree"], NUMBERS["move_mount"]
NR_OPENAT2 = NUMBERS["openat2"]
NR_PIDFD_GETFD = NUMBERS["pidfd_getfd"]

CAPABILITY_VERSION_3 = 0x20080522
CAP_NET_ADMIN = 12
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
SECCOMP_FILTER_FLAG_TSYNC = 1

libc = ctypes.CDLL(None, use_errno=True)
libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)
libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
libc.syscall.restype = ctypes.c_long
libc.unshare.argtypes = (ctypes.c_int,)


class sock_fprog(ctypes.Structure):  # noqa: N801 - the kernel's name
    """A classic BPF program (linux/filter.h)."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


class iovec(ctypes.Structure):  # noqa: N801
    """One buffer of process_vm_readv(2) (sys/uio.h)."""

    _fields_ = (("iov_base", ctypes.c_void_p), ("iov_len", ctypes.c_size_t))


def oserror(call: str, path: str | None = None) -> OSError:
    """The OSError for the errno that the last call of libc left; @call is its name, @path the file it was about."""
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}", path)


def unshare(flags: int) -> None:
    """Move the calling thread into new namespaces, or give it its own table, by CLONE_* flags (unshare(2))."""
    if libc.unshare(flags) < 0:
        raise oserror("unshare")


def setns(fd: int, nstype: int = 0) -> None:
    """Move the calling thread into the namespace @fd; @nstype is the expected CLONE_NEW* or 0 (setns(2))."""
    if libc.setns(fd, nstype) < 0:
        raise oserror("setns")


def mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    """Mount @source at @target with MS_* @flags and the file system's options @data (mount(2)). Raises OSError."""
    kind = fstype.encode() if fstype else None
    if libc.mount(source.encode(), os.fsencode(target), kind, flags, data.encode() or None) < 0:
        raise oserror("mount", target)


def no_new_privs() -> None:
    """Set PR_SET_NO_NEW_PRIVS (prctl(2)). An unprivileged thread needs it before it may install a seccomp filter."""
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0:
        raise oserror("prctl(PR_SET_NO_NEW_PRIVS)")


def not_dumpable() -> None:
    """PR_SET_DUMPABLE 0 (prctl(2)): only CAP_SYS_PTRACE traces this process. execve(2) resets it. Raises OSError."""
    if libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0:
        raise oserror("prctl(PR_SET_DUMPABLE)")


def set_name(name: str) -> None:
    """PR_SET_NAME (prctl(2)): of this thread, in /proc/PID/comm; 15 bytes are kept. Raises OSError."""
    text = ctypes.create_string_buffer(name.encode())
    if libc.prctl(PR_SET_NAME, ctypes.addressof(text), 0, 0, 0) < 0:
        raise oserror("prctl(PR_SET_NAME)")


def set_timer_slack(nanoseconds: int) -> None:
    """Set this thread's timer slack (prctl(2), PR_SET_TIMERSLACK). fork(2) inherits it and execve(2) keeps it."""
    if libc.prctl(PR_SET_TIMERSLACK, nanoseconds, 0, 0, 0) < 0:
        raise oserror("prctl(PR_SET_TIMERSLACK)")


def timer_slack(pid: int) -> int:
    """The timer slack of a thread in nanoseconds (proc(5), /proc/PID/timerslack_ns)."""
    with open(f"/proc/{pid}/timerslack_ns", "rb") as file:
        return int(file.read())


def seccomp_listener(program: bytes, *, wait_killable: bool) -> int:
    """Install a filter on the calling thread and return its notification descriptor (seccomp(2)).

    Raises OSError: EBUSY if a filter of the thread has a listener already, EACCES without CAP_SYS_ADMIN or
    no_new_privs, EINVAL if the kernel lacks the wait-killable flag.
    """
    fprog = sock_fprog(len(program) // 8, program)
    flags = SECCOMP_FILTER_FLAG_NEW_LISTENER
    if wait_killable:
        flags |= SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    fd: int = libc.syscall(NR_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, ctypes.byref(fprog))
    if fd < 0:
        raise oserror("seccomp")
    return fd


def seccomp_filter(program: bytes) -> None:
    """Install a filter on all threads of this process (seccomp(2), TSYNC); children inherit it. Raises OSError."""
    fprog = sock_fprog(len(program) // 8, program)
    if libc.syscall(NR_SECCOMP, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(fprog)):
        raise oserror("seccomp")


def in_bounding_set(capability: int) -> bool:
    """Is the capability in the bounding set (prctl(2), PR_CAPBSET_READ)? False if this kernel does not know it."""
    return bool(libc.prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1)


def drop_from_bounding_set(capability: int) -> None:
    """Drop a capability from the bounding set (prctl(2), PR_CAPBSET_DROP). Raises OSError: EPERM without SETPCAP."""
    if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
        raise oserror("prctl")


def keep_capabilities(kept: Iterable[int]) -> None:
    """Reduce this thread's permitted and effective sets to @kept, and empty its inheritable set (capset(2)).

    A capability in @kept that the thread does not have is not added. Raises OSError.
    """
    mask = sum(1 << number for number in kept)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    had = ctypes.create_string_buffer(24)
    if libc.syscall(NR_CAPGET, header, had):
        raise oserror("capget")
    low, high = struct.unpack("=IIIIII", had.raw)[1::3]
    mask &= high << 32 | low
    low, high = mask & 0xFFFFFFFF, mask >> 32
    if libc.syscall(NR_CAPSET, header, struct.pack("=IIIIII", low, low, 0, high, high, 0)):
        raise oserror("capset")


@contextlib.contextmanager
def with_capabilities(mask: int) -> Iterator[None]:
    """Run the body with the capabilities of @mask as the effective set of this thread, as far as it has them; the
    permitted one stays (capset(2)). Raises OSError.

    Other threads keep theirs, and nobody gains a right over this one: ptrace(2) compares the permitted sets.
    """
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    had = ctypes.create_string_buffer(24)
    if libc.syscall(NR_CAPGET, header, had):
        raise oserror("capget")
    low, low_inherited, high, high_inherited = (struct.unpack("=IIIIII", had.raw)[n] for n in (1, 2, 4, 5))
    now = (mask & low, low, low_inherited, mask >> 32 & high, high, high_inherited)
    if libc.syscall(NR_CAPSET, header, struct.pack("=IIIIII", *now)):
        raise oserror("capset")
    try:
        yield
    finally:
        if libc.syscall(NR_CAPSET, header, had):
            raise oserror("capset")


@contextlib.contextmanager
def with_effective_ids(uid: int, gid: int) -> Iterator[None]:
    """Run the body with another effective uid and gid of this thread (-1: its own). Raises OSError.

    The real and the saved ids stay, so that nobody gains a right over the thread: kill(2) and ptrace(2) look at
    these. A change of the uid from 0 empties the effective capabilities, which the way back restores.
    """
    before = os.geteuid(), os.getegid()
    minus = ctypes.c_int(-1)
    if libc.syscall(NR_SETRESGID, minus, ctypes.c_int(gid), minus):
        raise oserror("setresgid")
    try:
        if libc.syscall(NR_SETRESUID, minus, ctypes.c_uint(uid & 0xFFFFFFFF), minus):
            raise oserror("setresuid")
        try:
            yield
        finally:
            if libc.syscall(NR_SETRESUID, minus, ctypes.c_uint(before[0]), minus):
                raise oserror("setresuid")
    finally:
        if libc.syscall(NR_SETRESGID, minus, ctypes.c_int(before[1]), minus):
            raise oserror("setresgid")


@contextlib.contextmanager
def with_file_ids(uid: int, gid: int) -> Iterator[None]:
    """Run the body with another uid and gid of this thread for files that it makes (setfsuid(2), setfsgid(2)).

    A change from 0 takes the capabilities for files from the effective set, which the way back restores.
    """
    libc.syscall(NR_SETFSGID, ctypes.c_uint(gid))
    libc.syscall(NR_SETFSUID, ctypes.c_uint(uid))
    try:
        yield
    finally:
        libc.syscall(NR_SETFSUID, ctypes.c_uint(0))
        libc.syscall(NR_SETFSGID, ctypes.c_uint(0))


def clear_groups() -> None:
    """Take the supplementary groups of this thread alone away (setgroups(2)). Raises OSError."""
    if libc.syscall(NR_SETGROUPS, ctypes.c_int(0), None):
        raise oserror("setgroups")


def make_socket(family: int, kind: int, protocol: int) -> int:
    """socket(2), of any family; the descriptor is closed on execve(2). Raises OSError."""
    fd: int = libc.socket(*map(ctypes.c_int, (family, kind | socket.SOCK_CLOEXEC, protocol)))
    if fd < 0:
        raise oserror("socket")
    return fd


def make_socketpair(family: int, kind: int, protocol: int) -> tuple[int, int]:
    """socketpair(2), of any family; the descriptors are closed on execve(2). Raises OSError."""
    pair = (ctypes.c_int * 2)()
    if libc.socketpair(*map(ctypes.c_int, (family, kind | socket.SOCK_CLOEXEC, protocol)), pair) < 0:
        raise oserror("socketpair")
    return pair[0], pair[1]


def open_directory(path: str) -> int:
    """Open a directory as a place (O_PATH), if no part of @path is a symbolic link (openat2(2)).

    The caller closes it. Raises OSError: ELOOP if one is.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    how = struct.pack("=QQQ", flags, 0, RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)
    at = ctypes.c_long(-100)  # AT_FDCWD
    fd: int = libc.syscall(NR_OPENAT2, at, os.fsencode(path), how, ctypes.c_size_t(len(how)))
    if fd < 0 and ctypes.get_errno() == errno.ENOSYS:  # systemd's RestrictSUIDSGID, which cannot look into @how
        return _walk_to(path)
    if fd < 0:
        raise oserror("openat2", path)
    return fd


def _walk_to(path: str) -> int:
    """As open_directory(), by one step for each part of @path."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    place = os.open("/" if path.startswith("/") else ".", flags | os.O_DIRECTORY)
    for part in filter(None, path.split("/")):
        try:
            step = os.open(part, flags, dir_fd=place)
        finally:
            os.close(place)
        place = step
        kind = os.fstat(place).st_mode
        if not stat.S_ISDIR(kind):
            os.close(place)
            number = errno.ELOOP if stat.S_ISLNK(kind) else errno.ENOTDIR
            raise OSError(number, os.strerror(number), path)
    return place


def bound_file(sock: socket.socket) -> int:
    """The file that a unix socket is bound to, as a place (SIOCUNIXFILE, unix(7)). The caller closes it.

    It is that very file, whatever its path leads to by now. Raises OSError: ENOENT if the socket is not bound.
    """
    import fcntl

    return fcntl.ioctl(sock, SIOCUNIXFILE)


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of the descriptor @fd of another process (pidfd_getfd(2)). The caller closes it."""
    copy: int = libc.syscall(NR_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        raise oserror("pidfd_getfd")
    return copy


def read_memory(pid: int, address: int, size: int) -> bytes:
    """Up to @size bytes of another process's memory (process_vm_readv(2)); fewer if a page is unmapped.

    It may block for ever on a page that another program serves (userfaultfd(2), FUSE). Raises OSError: EFAULT, ESRCH.
    """
    buffer = ctypes.create_string_buffer(size)
    local, remote = iovec(ctypes.addressof(buffer), size), iovec(address, size)
    one, flags = ctypes.c_ulong(1), ctypes.c_ulong(0)
    count: int = libc.process_vm_readv(pid, ctypes.byref(local), one, ctypes.byref(remote), one, flags)
    if count < 0:
        raise oserror("process_vm_readv")
    return buffer.raw[:count]


def writable_mapping(maps: int, address: int) -> int | None:
    """The end of the mapping at @address, if its process may write to it, else None.

    @maps: a descriptor of /proc/PID/maps. Raises OSError: ENOTTY before Linux 6.11 (linux/fs.h, PROCMAP_QUERY).
    """
    import fcntl

    query = bytearray(PROCMAP_QUERY_SIZE)
    struct.pack_into("=QQQ", query, 0, PROCMAP_QUERY_SIZE, PROCMAP_QUERY_VMA_WRITABLE, address & (1 << 64) - 1)
    try:
        fcntl.ioctl(maps, PROCMAP_QUERY, query)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):  # no such mapping, or none any more
            return None
        raise
    end: int = struct.unpack_from("=Q", query, 32)[0]
    return end


def alive(pidfd: int) -> bool:
    """Does the process of this pidfd still run? False for -1. A pidfd is readable when its process has ended."""
    if pidfd < 0:
        return False
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)


def parent(pid: int) -> int:
    """The PID of a process's parent (proc(5), /proc/PID/stat). Raises OSError if the process is gone."""
    with open(f"/proc/{pid}/stat") as stat:
        return int(stat.read().rpartition(")")[2].split()[1])


def uids(pid: int) -> set[int]:
    """The real, effective, saved and file system uid of a process (proc(5), Uid). Raises OSError if it has ended."""
    with open(f"/proc/{pid}/status") as status:
        return {int(word) for line in status if line.startswith("Uid:") for word in line.split()[1:]}


def comm(pid: int | str) -> str:
    """The name of a process, of 15 characters at the most (proc(5), /proc/PID/comm); "" if it has ended."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as name:
            return name.read().removesuffix("\n")
    except OSError:
        return ""


def netns_inode(pid: int | str = "self") -> int:
    """The inode of a process's or thread's netns (/proc/PID/ns/net), which identifies it while it lives.

    Raises OSError: ENOENT if the process is gone, EACCES.
    """
    return os.stat(f"/proc/{pid}/ns/net").st_ino


def socket_netns(sock: socket.socket) -> int:
    """The inode of the netns that a socket of any family is in (SIOCGSKNS, linux/sockios.h).

    Raises OSError: EPERM without CAP_NET_ADMIN over that netns.
    """
    import fcntl

    fd = fcntl.ioctl(sock, SIOCGSKNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


@contextlib.contextmanager
def inside_netns(fd: int) -> Iterator[None]:
    """Run the body in the netns @fd. Only the calling thread moves, and it returns afterwards. Raises OSError."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
    finally:
        os.close(home)


def loopback_up() -> None:
    """Set IFF_UP on `lo` of the current netns (netdevice(7)). Raises OSError."""
    import fcntl
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = bytearray(struct.pack("16sh22x", b"lo", 0))
        fcntl.ioctl(sock, SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("h", request, 16)
        struct.pack_into("h", request, 16, flags | IFF_UP)
        fcntl.ioctl(sock, SIOCSIFFLAGS, request)


def credentials(connection: socket.socket) -> tuple[int, int, int]:
    """The pid, uid and gid that the peer had when it connected (SO_PEERCRED, unix(7))."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return (
        int.from_bytes(raw[:4], "little", signed=True),
        int.from_bytes(raw[4:8], "little"),
        int.from_bytes(raw[8:], "little"),
    )


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """A pidfd of the process that connected a unix socket, -1 if it has ended (SO_PEERPIDFD, since Linux 6.5).

    An older kernel gives a pidfd of the process that has @pid now, which may be another one.
    """
    try:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4), "little")
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            return -1
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1
