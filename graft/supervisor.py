"""One trapped call → one action.

Theory of operation

A target runs under the filter of graft/filter.py; its trapped calls stop in the kernel until somebody who
holds the notification descriptor answers. Receiving is the loop's business (graft/daemon.py); here is the
decision, one function a call, which returns an action that the loop then carries out:

    Proceed     the call runs in the target as it stands. Safe only where the arguments are registers, or
                where what runs cannot touch the host: the target may change its memory, and what a
                descriptor number means, at any time.
    Answer      the call is over: a value, or an errno.
    Inject      the call returns a new descriptor of the target, a copy of ours.

socket()    a socket of the host's netns, stamped before the target sees it. Its three arguments are
            registers. MPTCP (Go's listeners ask for it) becomes TCP: the extra subflows that an MPTCP
            connection opens choose their own addresses and run no connect hook of ours. A target that has
            moved to another netns than its tenant's gets its own, ungrafted socket.
listen()    done here, on our duplicate of the socket: what was never bound is bound first, to the tenant's
            private loopback, so no port of the host opens without a rule. Descriptors that are no grafted
            sockets proceed; should the target swap in a grafted one meanwhile, the sockops backstop of
            graft.bpf.c puts that listener out of reach.
ioctl()     on network devices. On a grafted socket, questions (SIOCGIF*) are answered from the
            container's own netns and everything else is refused; on other sockets it proceeds, in the
            container's netns by nature. The swap of a descriptor under a proceeding call is the one race
            that remains: it needs CAP_NET_ADMIN in the host's user namespace to change anything, which
            is outside the boundary (docs/security.md).

Nothing here trusts the target: a pid may be gone (`valid` is asked before a decision that a recycled pid
could falsify), memory may be unmapped, numbers may be anything.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from typing import NamedTuple, Protocol

from graft import linux
from graft.bpf import STAMP_V6ONLY
from graft.notify import Notification


class Proceed(NamedTuple):
    """Let the call run in the target."""


class Answer(NamedTuple):
    """Return a value, or fail with an errno."""

    value: int = 0
    error: int = 0


class Inject(NamedTuple):
    """Return a new descriptor: ours is closed by the loop."""

    fd: int
    cloexec: bool


Action = Proceed | Answer | Inject
PROCEED = Proceed()


class Tenant(Protocol):
    """What the supervisor needs to know of a tenant."""

    id: int
    netns: int

    @property
    def owner(self) -> int:
        """The uid that its sockets belong to."""

    def probe(self, family: int) -> socket.socket:
        """A datagram socket in the tenant's own netns, to ask about its devices."""


SOCK_TYPE_MASK = 0xF
PROTOCOLS: dict[int, dict[int, int]] = {
    socket.SOCK_STREAM: {0: 0, socket.IPPROTO_TCP: 0, linux.IPPROTO_MPTCP: 0},
    socket.SOCK_DGRAM: {0: 0, socket.IPPROTO_UDP: 0},
}

PIDFD_THREAD = os.O_EXCL

# linux/sockios.h. Questions about one device by struct ifreq, 40 bytes; SIOCGIFCONF has a pointer inside.
SIOCGIFCONF = 0x8912
SIOCGIFNAME = 0x8910
IFREQ_SIZE = 40
QUESTIONS = frozenset(
    (
        SIOCGIFNAME,
        0x8913,  # SIOCGIFFLAGS
        0x8915,  # SIOCGIFADDR
        0x8917,  # SIOCGIFDSTADDR
        0x8919,  # SIOCGIFBRDADDR
        0x891B,  # SIOCGIFNETMASK
        0x891D,  # SIOCGIFMETRIC
        0x8921,  # SIOCGIFMTU
        0x8927,  # SIOCGIFHWADDR
        0x8933,  # SIOCGIFINDEX
        0x8938,  # SIOCGIFPFLAGS
        0x8942,  # SIOCGIFTXQLEN
        0x8970,  # SIOCGIFMAP
    )
)
IFCONF_MAX = 64 * IFREQ_SIZE


def host_v6only() -> bool:
    """The default of IPV6_V6ONLY in this netns (net.ipv6.bindv6only)."""
    try:
        with open("/proc/sys/net/ipv6/bindv6only") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


class Stamps(Protocol):
    """The kernel's socket storage, as graft.bpf.Stamper has it."""

    def stamp(self, fd: int, tenant: int, flags: int) -> None:
        """Give a socket its tenant."""

    def tenant_of(self, fd: int) -> int | None:
        """The tenant of a socket, None if it is not grafted."""


class Supervisor:
    """Decides trapped calls; makes sockets in the netns of the calling thread."""

    def __init__(self, stamps: Stamps) -> None:
        self.stamps = stamps
        self.v6_flags = STAMP_V6ONLY if host_v6only() else 0

    def handle(self, call: Notification, tenant: Tenant) -> Action:
        """The action for one trapped call. Never raises OSError: an errno is an answer."""
        try:
            if call.arch == linux.AUDIT_ARCH_X86_64:
                if call.nr == linux.NR_SOCKET:
                    return self.socket(call, tenant)
                if call.nr == linux.NR_LISTEN:
                    return self.listen(call)
            if call.nr in (linux.NR_IOCTL, 54):
                return self.ioctl(call, tenant)
        except OSError as error:
            return Answer(error=error.errno or errno.EIO)
        return Answer(error=errno.ENOSYS)

    @staticmethod
    def quick(call: Notification) -> bool:
        """Can `handle` not block? What takes a socket's lock or reads memory can: the target may hold the one
        in a send from a page that it never serves, and keep back the other.
        """
        return call.arch == linux.AUDIT_ARCH_X86_64 and call.nr == linux.NR_SOCKET

    def socket(self, call: Notification, tenant: Tenant) -> Action:
        """socket(2): make it here, stamp it, hand it over."""
        family = call.args[0] & 0xFFFFFFFF
        flags = call.args[1] & 0xFFFFFFFF
        kind = flags & SOCK_TYPE_MASK
        # the listener may come with any filter (agent socket): what ours would not trap is not made here
        protocols = PROTOCOLS.get(kind) if family in (socket.AF_INET, socket.AF_INET6) else None
        protocol = protocols.get(call.args[2] & 0xFFFFFFFF) if protocols else None
        if protocol is None or flags & ~(SOCK_TYPE_MASK | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC):
            return PROCEED
        try:
            if linux.netns_inode(call.pid) != tenant.netns:
                return PROCEED
        except FileNotFoundError:
            return Answer(error=errno.ESRCH)
        made = socket.socket(family, kind | flags & socket.SOCK_NONBLOCK, protocol)
        try:
            if family == socket.AF_INET6:
                # the slices are an AnyIP route; what may be bound is the bind hook's decision
                made.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_FREEBIND, 1)
            self.stamps.stamp(made.fileno(), tenant.id, self.v6_flags if family == socket.AF_INET6 else 0)
            # SO_REUSEPORT is shared by owner: no tenant may join a host's or another tenant's listener
            os.fchown(made.fileno(), tenant.owner, -1)
        except BaseException:
            made.close()
            raise
        fd = made.detach()
        return Inject(fd, bool(flags & socket.SOCK_CLOEXEC))

    def listen(self, call: Notification) -> Action:
        """listen(2): bind privately what is unbound, then listen on our duplicate."""
        backlog = struct.unpack("i", struct.pack("I", call.args[1] & 0xFFFFFFFF))[0]
        try:
            sock = _borrow(call)
        except PermissionError:
            raise
        except OSError:
            return PROCEED  # the kernel finds the same fault with the number
        with sock:
            if self.stamps.tenant_of(sock.fileno()) is None or sock.type != socket.SOCK_STREAM:
                return PROCEED
            if sock.getsockname()[1] == 0:
                any_address = "::" if sock.family == socket.AF_INET6 else "0.0.0.0"
                with contextlib.suppress(OSError):  # connected, or bound meanwhile: listen() says so
                    sock.bind((any_address, 0))
            sock.listen(backlog)
        return Answer()

    def ioctl(self, call: Notification, tenant: Tenant) -> Action:
        """ioctl(2) on network devices: answered from the container's netns, or refused."""
        request = call.args[1] & 0xFFFFFFFF
        try:
            sock = _borrow(call)
        except PermissionError:
            raise
        except OSError:
            return PROCEED
        with sock:
            family = sock.family
            if self.stamps.tenant_of(sock.fileno()) is None:
                return PROCEED
        address = call.args[2]
        if request == SIOCGIFCONF:
            return _interfaces(call.pid, address, tenant.probe(family))
        if request not in QUESTIONS:
            return Answer(error=errno.EPERM)
        ifreq = bytearray(linux.read_memory(call.pid, address, IFREQ_SIZE))
        if len(ifreq) < IFREQ_SIZE:
            return Answer(error=errno.EFAULT)
        try:
            fcntl.ioctl(tenant.probe(family), request, ifreq)
        except OSError as error:
            if request != SIOCGIFNAME or error.errno != errno.ENODEV:
                raise
            # IP_PKTINFO told the program an index of the host's; dnsmasq drops a query whose device has no name
            ifreq[:16] = b"lo".ljust(16, b"\0")
        if linux.write_memory(call.pid, address, bytes(ifreq)) < IFREQ_SIZE:
            return Answer(error=errno.EFAULT)
        return Answer()


def _thread_group(pid: int) -> int:
    with open(f"/proc/{pid}/status", "rb") as status:
        for line in status:
            if line.startswith(b"Tgid:"):
                return int(line[5:])
    raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def _descriptor(pid: int, number: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}")
    except OSError:
        return ""


def _borrow(call: Notification) -> socket.socket:
    """A duplicate of the socket that the call's first argument names. Raises OSError if it names none."""
    number = struct.unpack("i", struct.pack("I", call.args[0] & 0xFFFFFFFF))[0]
    try:
        pidfd = os.pidfd_open(call.pid, PIDFD_THREAD)
    except OSError:  # before Linux 6.9: the leader's table, unless the thread has one of its own
        leader = _thread_group(call.pid)
        if leader != call.pid and _descriptor(leader, number) != _descriptor(call.pid, number):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from None
        pidfd = os.pidfd_open(leader)
    try:
        fd = linux.pidfd_getfd(pidfd, number)
    finally:
        os.close(pidfd)
    try:
        return socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise


def _interfaces(pid: int, address: int, probe: socket.socket) -> Action:
    """SIOCGIFCONF: struct ifconf { int len; struct ifreq *req; } (netdevice(7))."""
    head = linux.read_memory(pid, address, 16)
    if len(head) < 16:
        return Answer(error=errno.EFAULT)
    (size, where) = struct.unpack("=i4xQ", head)
    if where and size < 0:  # without a buffer the call asks for the size, and the length is not read
        return Answer(error=errno.EINVAL)
    import array

    room = array.array("B", bytes(min(size, IFCONF_MAX) if where else IFCONF_MAX))
    ifconf = bytearray(struct.pack("=i4xQ", len(room), room.buffer_info()[0]))
    fcntl.ioctl(probe, SIOCGIFCONF, ifconf)
    (used,) = struct.unpack_from("=i", ifconf)
    if where and used:
        linux.write_memory(pid, where, room.tobytes()[:used])
    linux.write_memory(pid, address, struct.pack("=i", used))
    return Answer()
