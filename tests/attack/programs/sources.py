"""Sources that are not the container's."""

import contextlib
import socket
import struct

from .common import HOST, HOST6, LO, SECOND, TCP, UDP, V4, V6, attack


def pktinfo(source, device=0):
    return [(socket.IPPROTO_IP, 8, struct.pack("=i4s4s", device, socket.inet_aton(source), bytes(4)))]


@attack
def source_by_pktinfo():
    s = socket.socket(V4, UDP)
    s.sendmsg([b"spoofed"], pktinfo("127.0.0.1"), 0, (HOST, 9102))


@attack
def source_by_pktinfo_connected():
    s = socket.socket(V4, UDP)
    s.connect((HOST, 9102))
    s.sendmsg([b"spoofed"], pktinfo(SECOND))


@attack
def source_after_the_loopback():
    """Autobound, connected to its own loopback, then to the host: the kernel has kept 127.0.0.1."""
    s = socket.socket(V4, UDP)
    with contextlib.suppress(OSError):
        s.sendto(b"", LO)
    with contextlib.suppress(OSError):
        s.connect(LO)
    with socket.socket(V4, UDP) as server:
        server.bind(LO)
        s.connect(LO)
    s.connect((HOST, 9102))
    s.send(b"spoofed")


@attack
def source_by_bind():
    s = socket.socket(V4, UDP)
    s.bind(("127.0.0.1", 0))
    s.sendto(b"spoofed", (HOST, 9102))


@attack
def source_by_bind_no_port():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.IPPROTO_IP, 24, 1)
    s.bind((SECOND, 0))
    s.connect((HOST, 9100))


@attack
def source_by_bind_to_an_address_of_the_hosts():
    s = socket.socket(V4, UDP)
    s.bind((SECOND, 0))
    s.sendto(b"spoofed", (HOST, 9102))


@attack
def source_by_bind_to_a_port_there():
    s = socket.socket(V4, UDP)
    s.bind((SECOND, 5353))
    s.connect((HOST, 9102))
    s.send(b"spoofed")


@attack
def source_by_freebind():
    s = socket.socket(V4, UDP)
    s.setsockopt(socket.IPPROTO_IP, 15, 1)
    s.bind(("198.51.100.7", 0))


@attack
def source_by_sticky_pktinfo():
    s = socket.socket(V6, UDP)
    s.setsockopt(socket.IPPROTO_IPV6, 50, socket.inet_pton(V6, "2001:db8::bad") + struct.pack("=i", 0))


@attack
def source_route():
    """The message is taken, the packet is not."""
    s = socket.socket(V4, UDP)
    route = bytes([131, 7, 4]) + socket.inet_aton(HOST) + b"\0"
    s.sendmsg([b"spoofed"], [(socket.IPPROTO_IP, 7, route)], 0, (HOST, 9102))
    return "DROPPED"


@attack
def extension_header():
    s = socket.socket(V6, UDP)
    s.sendmsg([b"spoofed"], [(socket.IPPROTO_IPV6, 59, bytes([17, 0, 1, 4, 0, 0, 0, 0]))], 0, (HOST6, 9102))
    return "DROPPED"
