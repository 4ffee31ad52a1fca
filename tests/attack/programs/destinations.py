"""Destinations that the container may not reach."""

import contextlib
import socket

from .common import CLIENT, CLIENT6, HOST, OTHER, TCP, UDP, V4, V6, attack, disconnect


@attack
def hosts_loopback():
    socket.create_connection(("127.0.0.1", 9101), 2)


@attack
def hosts_loopback_by_wildcard():
    socket.create_connection(("0.0.0.0", 9101), 2)


@attack
def hosts_loopback_mapped():
    s = socket.socket(V6, TCP)
    s.connect(("::ffff:127.0.0.1", 9101))


@attack
def hosts_loopback_6():
    s = socket.socket(V6, TCP)
    s.connect(("::1", 9101))


@attack
def hosts_loopback_by_another_number():
    socket.create_connection(("127.1.2.3", 9100), 2)


@attack
def hosts_loopback_by_udp():
    socket.socket(V4, UDP).sendto(b"spoofed", ("127.0.0.1", 9102))


@attack
def hosts_loopback_fast_open():
    socket.socket(V4, TCP).sendto(b"x", socket.MSG_FASTOPEN, ("127.0.0.1", 9101))


@attack
def hosts_loopback_fast_open_connect():
    s = socket.socket(V4, TCP)
    s.setsockopt(socket.IPPROTO_TCP, 30, 1)
    s.connect(("127.0.0.1", 9101))
    s.send(b"x")


@attack
def hosts_abstract_socket():
    socket.socket(socket.AF_UNIX, TCP).connect("\0graft-attack-host")


@attack
def another_containers_loopback():
    socket.create_connection((OTHER.split(":")[0], int(OTHER.split(":")[1])), 2)


@attack
def another_containers_loopback_6():
    s = socket.socket(V6, TCP)
    s.connect(("fd67:7261:6674::1:0:0:1", 61445))


@attack
def reconnect_after_disconnecting():
    s = socket.socket(V4, UDP)
    with contextlib.suppress(OSError):
        s.connect((CLIENT, 9001))
    disconnect(s)
    s.connect(("127.0.0.1", 9102))
    s.send(b"spoofed")


@attack
def closed_tcp():
    socket.create_connection((CLIENT, 9000), 2)


@attack
def closed_tcp_6():
    s = socket.socket(V6, TCP)
    s.settimeout(2)
    s.connect((CLIENT6, 9000))


@attack
def closed_mapped():
    s = socket.socket(V6, TCP)
    s.settimeout(2)
    s.connect((f"::ffff:{CLIENT}", 9000))


@attack
def closed_udp():
    socket.socket(V4, UDP).sendto(b"x", (CLIENT, 9001))


@attack
def closed_udp_mapped():
    socket.socket(V6, UDP).sendto(b"x", (f"::ffff:{CLIENT}", 9001))


@attack
def closed_sendmsg():
    socket.socket(V4, UDP).sendmsg([b"x"], [], 0, (CLIENT, 9001))


@attack
def closed_fast_open():
    socket.socket(V4, TCP).sendto(b"x", socket.MSG_FASTOPEN, (CLIENT, 9000))


@attack
def closed_gso():
    s = socket.socket(V4, UDP)
    s.setsockopt(17, 103, 100)
    s.sendto(b"x" * 300, (CLIENT, 9001))


@attack
def closed_broadcast():
    s = socket.socket(V4, UDP)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    s.sendto(b"x", ("10.77.0.255", 9001))


@attack
def closed_multicast():
    socket.socket(V4, UDP).sendto(b"x", ("224.0.0.1", 9001))


@attack
def closed_to_the_host():
    socket.create_connection((HOST, 9100), 2)


# 250.64.0.0/10 and fd67:7261:6674:1::/64 stand for the names of endpoints, of which these containers have none


@attack
def an_address_of_names():
    socket.create_connection(("250.100.1.2", 80), 2)


@attack
def an_address_of_names_mapped():
    socket.socket(V6, TCP).connect(("::ffff:250.100.1.2", 80))


@attack
def an_address_of_names_6():
    socket.socket(V6, TCP).connect(("fd67:7261:6674:1::1", 80))


@attack
def an_address_of_names_fast_open():
    socket.socket(V4, TCP).sendto(b"x", socket.MSG_FASTOPEN, ("250.100.1.2", 80))


@attack
def an_address_of_names_by_udp():
    socket.socket(V4, UDP).sendto(b"spoofed", ("250.100.1.2", 9102))


@attack
def an_address_of_names_is_bound():
    socket.socket(V4, TCP).bind(("250.100.1.2", 80))


@attack
def an_address_of_names_is_bound_6():
    socket.socket(V6, UDP).bind(("fd67:7261:6674:1::1", 80))
