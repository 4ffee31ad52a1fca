"""ioctl(2) on network devices: answered from the container's netns, carried out, or refused (netdevice(7)).

Theory of operation

Goal: no request reaches the devices of the host, or of another container.

Facts: the kernel acts in the netns of the socket, not in that of the caller. A stamp tells a socket that graft made,
but many sockets without a stamp are in the host's netns all the same: what accept() returns, also on a unix socket to
which a program of the host connects, and what others passed in. A socket stays in its netns for life. SIOCGSKNS on
our duplicate tells it; SO_NETNS_COOKIE would not, because graft's own hook answers that question. And the target may
put another socket at the number while a call proceeds.

Solution: a socket is the container's own only if its netns is: the container's, or the calling thread's own, if that
is neither graftd's nor one in which grafted sockets are made (a sandbox inside the container).

    own socket      Questions are asked on our duplicate. Other requests proceed, if nothing that the caller could put
                    in the socket's place would obey it. A caller with CAP_NET_ADMIN over the host's netns could
                    change the host that way. So its plain requests are carried out on our duplicate, and those with
                    pointers inside are refused.
    any other       Questions are asked in the container's netns. All other requests are refused.
    no socket       The kernel has none of these requests, except on a tap device's descriptor. All are refused.
    a tunnel        Devices that would be of the caller's netns, by a descriptor that is no socket: refused.
    at home         A wrapper's program in graftd's own netns may see the host. Only grafted sockets are special.

Questions are asked without capabilities, because with it the kernel loads a module for a name that no device has.

What still fails: a request that proceeds and only reads (ethtool's long answers, wireless ones) may be answered for a
device of the host, if the caller wins the race.
"""

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable

from graft.kernel import linux, traps
from graft.kernel.architecture import HERE
from graft.kernel.nowhere import LO
from graft.kernel.stamps import OWN_TENANT
from graft.trap import target
from graft.trap.actions import PROCEED, Action, Answer
from graft.trap.caller import Caller
from graft.trap.sockets import Stamps, TenantView

# linux/sockios.h, netdevice(7). QUESTIONS and CHANGES take a struct ifreq; SIOCGIFCONF takes a pointer to more.
SIOCADDRT, SIOCDELRT = 0x890B, 0x890C
SIOCGIFNAME = 0x8910
SIOCGIFCONF = 0x8912
SIOCSIFADDR, SIOCSIFDSTADDR, SIOCDIFADDR = 0x8916, 0x8918, 0x8936
SIOCETHTOOL = 0x8946
SIOCOUTQNSD = 0x894B
SIOCGMIIPHY, SIOCGMIIREG = 0x8947, 0x8948
SIOCDARP, SIOCGARP, SIOCSARP = 0x8953, 0x8954, 0x8955
SIOCGIFMAP = 0x8970
SIOCGIFVLAN, SIOCSIFVLAN = 0x8982, 0x8983
SIOCBRADDBR, SIOCBRDELBR = 0x89A0, 0x89A1
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
        0x8935,  # SIOCGIFPFLAGS
        0x8938,  # SIOCGIFCOUNT
        0x8942,  # SIOCGIFTXQLEN
        SIOCGIFMAP,
    )
)
CHANGES = frozenset(
    (
        0x8914,  # SIOCSIFFLAGS
        SIOCSIFADDR,
        SIOCSIFDSTADDR,
        0x891A,  # SIOCSIFBRDADDR
        0x891C,  # SIOCSIFNETMASK
        0x891E,  # SIOCSIFMETRIC
        0x8922,  # SIOCSIFMTU
        0x8923,  # SIOCSIFNAME
        0x8924,  # SIOCSIFHWADDR
        0x8931,  # SIOCADDMULTI
        0x8932,  # SIOCDELMULTI
        0x8934,  # SIOCSIFPFLAGS
        SIOCDIFADDR,
        0x8937,  # SIOCSIFHWBROADCAST
        0x8943,  # SIOCSIFTXQLEN
        SIOCGMIIPHY,
        SIOCGMIIREG,
        0x8949,  # SIOCSMIIREG
        0x8990,  # SIOCBONDENSLAVE
        0x8991,  # SIOCBONDRELEASE
        0x8992,  # SIOCBONDSETHWADDR
        0x8995,  # SIOCBONDCHANGEACTIVE
        0x89A2,  # SIOCBRADDIF
        0x89A3,  # SIOCBRDELIF
    )
)
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET)
# whose answer the kernel has for a socket of a family; all others ask the device layer alone, as a unix one does
PROBES = {
    socket.AF_INET: socket.AF_INET,
    socket.AF_PACKET: socket.AF_INET,
    socket.AF_INET6: socket.AF_INET6,
}
IFREQ_SIZE, IFREQ_SIZE_32 = 40, 32
IN6_IFREQ_SIZE = 24  # linux/ipv6.h
ARPREQ_SIZE = 68  # arp(7)
RTENTRY_SIZE = 120  # linux/route.h
RT_DEV, RT_DEV_SIZE = 88, 15  # the offset of rt_dev in it, and how many bytes the kernel reads there
IN6_RTMSG_SIZE = 80  # linux/ipv6_route.h
VLAN_SIZE = 56  # linux/if_vlan.h, struct vlan_ioctl_args
NAME_SIZE = 16  # IFNAMSIZ
IFCONF_MAX = 64 * IFREQ_SIZE
# ethtool's questions whose answer has a fixed size in bytes (linux/ethtool.h)
ETHTOOL = {0x01: 44, 0x03: 196, 0x0E: 92, 0x10: 36, 0x12: 16, 0x41: 44} | dict.fromkeys(
    (0x07, 0x0A, 0x14, 0x16, 0x18, 0x1E, 0x21, 0x23, 0x25, 0x27, 0x2B), 8
)

# Is the netns with this inode graftd's own, or one in which grafted sockets are made?
IsHosts = Callable[[int], bool]


def decide(caller: Caller, tenant: TenantView, stamps: Stamps, is_hosts: IsHosts) -> Action:
    """ioctl(2) on network devices (netdevice(7)). Raises OSError."""
    request = caller.args[1] & 0xFFFFFFFF
    known = any(first <= request <= last for first, last in traps.DEVICES)  # with other bits set, no request is
    at_home = tenant.netns == linux.netns_inode("thread-self")
    if request in traps.TUNNELS:
        return Answer(error=errno.EPERM)
    sock = caller.borrow()
    if sock is None:
        if at_home or not known:
            return PROCEED
        there = os.path.lexists(f"/proc/{caller.pid}/fd/{caller.number(0)}")
        return Answer(error=errno.ENOTTY if there else errno.EBADF)
    with sock:
        if request == SIOCOUTQNSD and sock.family in (
            socket.AF_INET,
            socket.AF_INET6,
        ):  # of the socket alone (tcp(7))
            unsent = bytearray(4)
            _question(sock, request, unsent)
            caller.write((caller.args[2], bytes(unsent)))
            return Answer()
        if not is_own(caller, tenant, stamps, sock, is_hosts):
            family = PROBES.get(sock.family, socket.AF_UNIX)
            device = tenant.device or LO
            return _ask(caller, request, tenant.probe(family), device) or Answer(error=errno.EPERM)
        if at_home or not known:
            return PROCEED
        return _ask(caller, request, sock) or _carry_out(caller, request, sock)


def is_own(caller: Caller, tenant: TenantView, stamps: Stamps, sock: socket.socket, is_hosts: IsHosts) -> bool:
    """Is the socket the container's own: not grafted, and in its netns or in the calling thread's? Raises OSError."""
    if sock.family != socket.AF_UNIX and stamps.tenant_of(sock.fileno()) not in (None, OWN_TENANT):
        return False
    netns = linux.socket_netns(sock)
    if netns == tenant.netns:
        return True
    own = netns == linux.netns_inode(caller.pid)
    caller.check()
    return own and not is_hosts(netns)


def _is_compat(caller: Caller) -> bool:
    return caller.call.arch == HERE.compat.audit


def _ask(caller: Caller, request: int, sock: socket.socket, stand_in: str = "") -> Action | None:
    """Answer a question on @sock. None if @request is no question. Raises OSError.

    @stand_in: the name for a device that the container does not have, if the question is not about its own socket.
    """
    address = caller.args[2]
    if request == SIOCGIFCONF:
        return _interfaces(caller, address, sock)
    if request in QUESTIONS and not (_is_compat(caller) and request == SIOCGIFMAP):
        size = IFREQ_SIZE_32 if _is_compat(caller) else IFREQ_SIZE
        ifreq = bytearray(caller.read(address, size).ljust(IFREQ_SIZE, b"\0"))
        try:
            _question(sock, request, ifreq)
        except OSError as error:
            if not stand_in or request != SIOCGIFNAME or error.errno != errno.ENODEV:
                raise
            # IP_PKTINFO gives the program the index of a device of the host; dnsmasq needs a name for it
            ifreq[:NAME_SIZE] = stand_in.encode().ljust(NAME_SIZE, b"\0")
        caller.write((address, bytes(ifreq[:size])))
        return Answer()
    if stand_in or _is_compat(caller):
        return None
    if request == SIOCGARP:
        entry = bytearray(caller.read(address, ARPREQ_SIZE))
        _question(sock, request, entry)
        caller.write((address, bytes(entry)))
        return Answer()
    return _ethtool(caller, address, sock) if request == SIOCETHTOOL else None


def _question(sock: socket.socket, request: int, argument: bytearray) -> None:
    """Ask the kernel, which writes its answer into @argument. Raises OSError."""
    with linux.with_capabilities(0):
        fcntl.ioctl(sock, request, argument)


def _interfaces(caller: Caller, address: int, sock: socket.socket) -> Action:
    """SIOCGIFCONF: fill the target's struct ifconf { int len; struct ifreq *req; } (netdevice(7)). Raises OSError."""
    (form, entry) = ("=iI", IFREQ_SIZE_32) if _is_compat(caller) else ("=i4xQ", IFREQ_SIZE)
    (size, where) = struct.unpack(form, caller.read(address, struct.calcsize(form)))
    if where and size < 0:  # without a buffer the call asks for the size needed, and ignores the length
        return Answer(error=errno.EINVAL)
    count = size // entry if where else IFCONF_MAX
    room = array.array("B", bytes(min(count * IFREQ_SIZE, IFCONF_MAX)))
    ifconf = bytearray(struct.pack("=i4xQ", len(room), room.buffer_info()[0]))
    _question(sock, SIOCGIFCONF, ifconf)
    (used,) = struct.unpack_from("=i", ifconf)
    entries = [room.tobytes()[at : at + entry] for at in range(0, used, IFREQ_SIZE)]
    caller.write((where, b"".join(entries) if where else b""), (address, struct.pack("=i", len(entries) * entry)))
    return Answer()


def _ethtool(caller: Caller, address: int, sock: socket.socket) -> Action | None:
    """SIOCETHTOOL: a struct ifreq with a pointer to a question. None if its answer's size is not known here."""
    ifreq = caller.read(address, IFREQ_SIZE)
    (where,) = struct.unpack_from("=Q", ifreq, NAME_SIZE)
    size = ETHTOOL.get(int.from_bytes(caller.read(where, 4), "little"))
    if size is None:
        return None
    question = ctypes.create_string_buffer(caller.read(where, size), size)
    if int.from_bytes(question.raw[:4], "little") not in ETHTOOL or size != ETHTOOL[question.raw[0]]:
        return Answer(error=errno.EAGAIN)  # another thread has changed it between the two reads
    ours = ifreq[:NAME_SIZE] + struct.pack("=Q16x", ctypes.addressof(question))
    _question(sock, SIOCETHTOOL, bytearray(ours))
    caller.write((where, question.raw))
    return Answer()


def _exchange(caller: Caller, request: int, sock: socket.socket, size: int, *, back: bool) -> Action:
    """Carry out a request with an argument of @size bytes, no pointer among them. @back: it has an answer."""
    value = bytearray(caller.read(caller.args[2], size))
    fcntl.ioctl(sock, request, value)
    if back:
        caller.write((caller.args[2], bytes(value)))
    return Answer()


def _carry_out(caller: Caller, request: int, sock: socket.socket) -> Action:
    """A request that is no question, on the container's own socket. Raises OSError.

    It proceeds, unless the caller could change the host by a socket that it puts in the place of this one. Whoever
    has CAP_NET_ADMIN over the host's netns has it over the container's, too, so what is carried out here is allowed.
    """
    powerful = target.administers_network(caller.pid)
    caller.check()
    if not powerful:
        return PROCEED
    if _is_compat(caller) or sock.family not in FAMILIES:
        return Answer(error=errno.EPERM)
    six = sock.family == socket.AF_INET6
    if request in (SIOCADDRT, SIOCDELRT):
        return _exchange(caller, request, sock, IN6_RTMSG_SIZE, back=False) if six else _route(caller, request, sock)
    if request in CHANGES:
        in6 = six and request in (SIOCSIFADDR, SIOCSIFDSTADDR, SIOCDIFADDR)
        size = IN6_IFREQ_SIZE if in6 else IFREQ_SIZE
        return _exchange(caller, request, sock, size, back=request in (SIOCGMIIPHY, SIOCGMIIREG))
    sizes = {SIOCDARP: ARPREQ_SIZE, SIOCSARP: ARPREQ_SIZE, SIOCGIFVLAN: VLAN_SIZE, SIOCSIFVLAN: VLAN_SIZE}
    sizes |= {SIOCBRADDBR: NAME_SIZE, SIOCBRDELBR: NAME_SIZE}
    if request in sizes:
        return _exchange(caller, request, sock, sizes[request], back=request == SIOCGIFVLAN)
    return Answer(error=errno.EPERM)  # it has pointers inside, or gives a descriptor away


def _route(caller: Caller, request: int, sock: socket.socket) -> Action:
    """SIOCADDRT or SIOCDELRT with a struct rtentry, whose rt_dev is a pointer to a device's name. Raises OSError."""
    entry = bytearray(caller.read(caller.args[2], RTENTRY_SIZE))
    (where,) = struct.unpack_from("=Q", entry, RT_DEV)
    name = ctypes.create_string_buffer(caller.read(where, RT_DEV_SIZE) if where else b"", NAME_SIZE)
    struct.pack_into("=Q", entry, RT_DEV, ctypes.addressof(name) if where else 0)
    fcntl.ioctl(sock, request, entry)
    return Answer()
