"""ioctl(2) on network devices: answered from the container's netns, or refused (netdevice(7), linux/sockios.h)."""

import errno
import fcntl
import socket
import struct

from graft.trap.actions import PROCEED, Action, Answer
from graft.trap.caller import Caller
from graft.trap.sockets import Stamps, TenantView

# linux/sockios.h, netdevice(7). QUESTIONS take a struct ifreq of 40 bytes; SIOCGIFCONF takes a pointer to more.
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


def _interfaces(caller: Caller, address: int, probe: socket.socket) -> Action:
    """SIOCGIFCONF: fill the target's struct ifconf { int len; struct ifreq *req; } (netdevice(7)). Raises OSError."""
    (size, where) = struct.unpack("=i4xQ", caller.read(address, 16))
    if where and size < 0:  # without a buffer the call asks for the size needed, and ignores the length
        return Answer(error=errno.EINVAL)
    import array

    room = array.array("B", bytes(min(size, IFCONF_MAX) if where else IFCONF_MAX))
    ifconf = bytearray(struct.pack("=i4xQ", len(room), room.buffer_info()[0]))
    fcntl.ioctl(probe, SIOCGIFCONF, ifconf)
    (used,) = struct.unpack_from("=i", ifconf)
    caller.write((where, room.tobytes()[:used] if where else b""), (address, struct.pack("=i", used)))
    return Answer()


def decide(caller: Caller, tenant: TenantView, stamps: Stamps) -> Action:
    """ioctl(2) on network devices (netdevice(7)): answer from the container's netns, or refuse."""
    request = caller.args[1] & 0xFFFFFFFF
    sock = caller.borrow()
    if sock is None:
        return PROCEED
    with sock:
        family = sock.family
        if family == socket.AF_UNIX or stamps.tenant_of(sock.fileno()) is None:
            return PROCEED
    address = caller.args[2]
    if request == SIOCGIFCONF:
        return _interfaces(caller, address, tenant.probe(family))
    if request not in QUESTIONS:
        return Answer(error=errno.EPERM)
    ifreq = bytearray(caller.read(address, IFREQ_SIZE))
    try:
        fcntl.ioctl(tenant.probe(family), request, ifreq)
    except OSError as error:
        if request != SIOCGIFNAME or error.errno != errno.ENODEV:
            raise
        # IP_PKTINFO gives the program the index of a device of the host; dnsmasq needs a name for it
        ifreq[:16] = b"lo".ljust(16, b"\0")
    caller.write((address, bytes(ifreq)))
    return Answer()
