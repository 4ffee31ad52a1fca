"""Socket options and devices of the host's."""

import array
import contextlib
import ctypes
import errno
import fcntl
import socket
import struct
from functools import partial

from .common import (
    ATTACKS,
    HOST,
    HOST6,
    TCP,
    UDP,
    V4,
    V6,
    accepted,
    attack,
    libc,
    option,
)

ATTACKS |= {
    "so_bindtodevice": option(1, 25, b"veth0\0"),
    "so_bindtoifindex": option(1, 62, 2),
    "so_mark": option(1, 36, 7),
    "so_debug": option(1, 1, 1),
    "so_rcvbufforce": option(1, 33, 1 << 20),
    "so_priority": option(1, 12, 7),
    "ip_transparent": option(0, 19, 1),
    "ip_freebind": option(0, 15, 1),
    "ip_options": option(0, 4, bytes([131, 7, 4, 10, 0, 0, 1, 0])),
    "ip_unicast_if": option(0, 50, struct.pack(">i", 2)),
    "ip_multicast_if": option(0, 32, socket.inet_aton(HOST)),
    "ip_add_membership": option(0, 35, socket.inet_aton("239.1.2.3") + socket.inet_aton(HOST)),
    "mcast_join_group": option(0, 42, struct.pack("=i4xHH4s120x", 2, 2, 0, socket.inet_aton("239.1.2.3"))),
    "ip_local_port_range": option(0, 51, 22 << 16 | 22),
    "iptables_replace": option(0, 64, bytes(64)),
    "ipvs_flush": option(0, 1157, bytes(64)),
    "multicast_routing": option(0, 200, 1),
}
for name, tried in {
    "ipv6_transparent": option(41, 75, 1),
    "ipv6_freebind": option(41, 78, 1),
    "ipv6_freebind_off": option(41, 78, 0),
    "ipv6_join_group": option(41, 20, socket.inet_pton(V6, "ff02::1234") + struct.pack("=i", 2)),
    "ipv6_rthdr": option(41, 57, bytes([0, 2, 4, 1, 0, 0, 0, 0]) + bytes(16)),
    "ipv6_addrform": option(41, 1, V4),
    "ipv6_flowlabel_lease": option(41, 32, bytes(16) + struct.pack(">I", 0x1234) + bytes([0, 1, 1, 0, 6, 0, 6, 0]) + bytes(4)),
    "ipv6_join_anycast": option(41, 27, socket.inet_pton(V6, HOST6) + struct.pack("=i", 2)),
}.items():
    ATTACKS[name] = partial(tried, family=V6)
for name, tried in {"tcp_repair": option(6, 19, 1), "tcp_ulp_smc": option(6, 31, b"smc")}.items():
    ATTACKS[name] = partial(tried, kind=TCP)


@attack
def device_of_a_link_local_destination():
    """A connection to a link-local address names a device, and ties the socket to it."""
    told = b""
    for index in (1, 2):
        with socket.socket(V6, TCP) as s:
            s.setblocking(False)
            with contextlib.suppress(OSError):
                s.connect(("fe80::99", 9, 0, index))
            told += s.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).strip(b"\0")
            told += s.getsockopt(socket.SOL_SOCKET, 62, 4).strip(b"\0")
    return told.decode() or "NONE"


@attack
def hardware_address_of_a_connection():
    """TCP_SAVED_SYN with the header of the link before it."""
    socket.socket(V4, TCP).setsockopt(socket.IPPROTO_TCP, 27, 2)


@attack
def option_of_an_accepted_socket():
    accepted()[0].setsockopt(1, 25, b"veth0\0")


def reading(level, name, kind=UDP, family=V4):
    """An attack that reads an option. READ: it is refused, and its value is in the program's memory all the same."""

    def tries():
        before = b"filter".ljust(84, b"\xaa")
        text, size = ctypes.create_string_buffer(before, len(before)), ctypes.c_uint32(len(before))
        s = accepted()[0] if kind == TCP else socket.socket(family, kind)
        if libc.getsockopt(s.fileno(), level, name, text, ctypes.byref(size)):
            return "READ" if text.raw != before else errno.errorcode[ctypes.get_errno()]
        return "OK"

    return tries


ATTACKS |= {
    "firewall_by_getsockopt": reading(0, 64),
    "firewall_of_ipv6_by_getsockopt": reading(41, 65, family=V6),
    "real_address_by_conntrack": reading(0, 80, kind=TCP),
}


@attack
def netns_cookie():
    """The container's own, not the host's."""
    here = socket.socket(socket.AF_UNIX, UDP).getsockopt(1, 71, 8)
    return "OWN" if socket.socket(V4, UDP).getsockopt(1, 71, 8) == here else "OK"

def device(request):
    def tries():
        with socket.socket(V4, UDP) as s:
            fcntl.ioctl(s.fileno(), request, struct.pack("16s240x", b"veth0"))

    return tries


DEVICE_REQUESTS = {
    "read_the_address": 0x8915,
    "read_the_hardware_address": 0x8927,
    "read_the_flags": 0x8913,
    "change_the_address": 0x8916,
    "change_the_flags": 0x8914,
    "change_the_mtu": 0x8922,
    "rename_the_device": 0x8923,
    "add_a_route": 0x890B,
    "change_arp": 0x8955,
    "add_a_bridge": 0x89A0,
    "ethtool": 0x8946,
    "wireless": 0x8B01,
    "bonding": 0x8990,
    "tunnel": 0x89F1,
    "hardware_time_stamps": 0x89B0,
}
ATTACKS |= {name: device(request) for name, request in DEVICE_REQUESTS.items()}


@attack
def hosts_namespace_by_ioctl():
    with socket.socket(V4, UDP) as s:
        fcntl.ioctl(s.fileno(), 0x894C)


@attack
def list_the_devices():
    buffer = array.array("B", bytes(4000))
    with socket.socket(V4, UDP) as s:
        told = fcntl.ioctl(s.fileno(), 0x8912, struct.pack("=i4xQ", len(buffer), buffer.buffer_info()[0]))
    count = struct.unpack_from("=i", told)[0] // 40
    names = (buffer.tobytes()[n * 40 : n * 40 + 16].split(b"\0")[0].decode() for n in range(count))
    return ",".join(dict.fromkeys(names))  # a device has a line for each of its addresses


@attack
def tenants_number():
    """GRAFT_PROBE, which graftd asks before it gives a socket away."""
    return ",".join(str(socket.socket(f, k).getsockopt(254, 1, 8)) for f in (V4, V6) for k in (TCP, UDP))
