"""Sockets that a direct container's programs make themselves, and those that look like them: accepted, passed, of elsewhere.

What accept() gives has no stamp, as a TCP socket has none before its first call of note. It is told apart by a field
that the kernel writes (csrc/made.bpf.h).
"""

import contextlib
import ctypes
import itertools
import os
import socket
import struct
import threading
from pathlib import Path

from .common import CLIENT, HOST, HOST6, TCP, UDP, V4, V6, accepted, attack, disconnect, libc
from .netns import CLONE_NEWNET, CLONE_NEWUSER, call, cookie, in_a_child, outcome, unshare, wrong

TCP_FASTOPEN, TCP_FASTOPEN_CONNECT, MSG_FASTOPEN = 23, 30, 0x20000000
# what could change the field, or put another socket in the place of the program's: (level, option, value)
CHANGES = [
    (0, 32, struct.pack("=4s4si", bytes(4), bytes(4), 0)), (0, 32, bytes(4)), (0, 32, struct.pack("=4s4si", bytes(4), bytes(4), 1)),
    (0, 32, socket.inet_aton("127.0.0.1")), (0, 50, bytes(4)), (41, 17, struct.pack("=i", 0)), (41, 17, struct.pack("=i", 1)),
    (41, 76, bytes(4)), (41, 1, struct.pack("=i", 2)), (41, 50, bytes(20)), (1, 25, b""), (1, 62, bytes(4)), (0, 33, b"\1"), (41, 18, struct.pack("=i", 1)),
    (41, 24, struct.pack("=i", 0)), (6, TCP_FASTOPEN, struct.pack("=i", 5)), (6, TCP_FASTOPEN_CONNECT, struct.pack("=i", 1)), (6, 31, b"tls"),
]  # fmt: skip


def server(family, *, fast=False):
    listener = socket.socket(family, TCP)
    for level, name, value in CHANGES:  # an accepted socket has much from its listener
        with contextlib.suppress(OSError):
            listener.setsockopt(level, name, value)
    if fast:
        listener.setsockopt(6, TCP_FASTOPEN, 5)
    listener.bind(("127.0.0.1", 0) if family == V4 else ("::", 0))
    listener.listen()
    return listener


def client(listener, address, *, fast=False):
    c = socket.socket(V6 if ":" in address else V4, TCP)
    to = (address, listener.getsockname()[1])
    if fast:
        c.sendto(b"x", MSG_FASTOPEN, to)
    else:
        c.connect(to)
    return c


WAYS = [(V4, "127.0.0.1", False), (V4, "127.0.0.1", True), (V6, "::1", False), (V6, "::1", True), (V6, "127.0.0.1", False), (V6, "::ffff:127.0.0.1", False)]


def of_every_accepted(use, *right):
    """What comes of a use of sockets that were accepted in every way, disconnected or not; @right is expected of all."""

    def tries():
        told = {}
        for (family, address, fast), cut in itertools.product(WAYS, (False, True)):
            with server(family, fast=fast) as listener, client(listener, address, fast=fast) as peer:
                sock, _ = listener.accept()
                with sock:
                    if cut:
                        disconnect(sock)
                    for level, name, value in CHANGES:
                        with contextlib.suppress(OSError):
                            sock.setsockopt(level, name, value)
                    told[f"{family.name}-{address}-{fast:d}-{cut:d}"] = outcome(use, sock, cut)
                    peer.close()
        return wrong(told, *right) or "REFUSED"

    return tries


def address_for(sock, address, port):
    return (address, port) if sock.family == V4 else (f"::ffff:{address}", port)


REFUSALS = ("EINVAL", "EPERM", "EADDRNOTAVAIL", "EISCONN", "ENETUNREACH", "EACCES", "EALREADY", "ECONNREFUSED")


@attack
def accepted_in_every_way_binds():
    return of_every_accepted(lambda sock, _: sock.bind(address_for(sock, "0.0.0.0", 22) if sock.family == V4 else ("::", 22)), *REFUSALS)()


@attack
def accepted_in_every_way_connects():
    return of_every_accepted(lambda sock, _: sock.connect(address_for(sock, HOST, 9100)), *REFUSALS)()


@attack
def accepted_in_every_way_listens():
    return of_every_accepted(lambda sock, _: sock.listen(), *REFUSALS)()


@attack
def accepted_in_every_way_opens_fast():
    return of_every_accepted(lambda sock, cut: sock.sendto(b"x", MSG_FASTOPEN, address_for(sock, HOST, 9100)) if cut else sock.bind(("", 0)), *REFUSALS)()


@attack
def accepted_in_every_way_has_a_stamp():
    """SO_REUSEADDR and the like stamp a socket that a program has made; one that was accepted stays what it is."""

    def use(sock, cut):
        for level, name in ((1, 2), (1, 15), (1, 6), (0, 24)):
            sock.setsockopt(level, name, 1)
        with contextlib.suppress(OSError):
            sock.getsockopt(254, 1, 8)
        if cut:
            sock.connect(address_for(sock, HOST, 9100))
        return "EPERM" if not any(cookie(sock)) else "STAMPED"

    return of_every_accepted(use, *REFUSALS)()


@attack
def fast_open_to_the_host():
    """A connection without connect()."""

    def begin(one, to):
        one.connect(to)
        one.send(b"x")

    told = {}
    port = 9101
    for family, address in ((V4, HOST), (V4, "127.0.0.1"), (V6, HOST6), (V6, "::1"), (V6, "::ffff:127.0.0.1")):
        for how in ("flag", "option"):
            with socket.socket(family, TCP) as s:
                s.settimeout(2)
                if how == "flag":
                    told[f"{address}-{how}"] = outcome(s.sendto, b"x", MSG_FASTOPEN, (address, port))
                else:
                    s.setsockopt(6, TCP_FASTOPEN_CONNECT, 1)
                    told[f"{address}-{how}"] = outcome(begin, s, (address, port))
    return wrong(told, *REFUSALS) or "REFUSED"


@attack
def first_calls_race():
    """Two threads make the first call on a socket, one of which stamps it; neither sees it between."""
    over = False
    won = []

    def note():
        while not over:
            with contextlib.suppress(OSError):
                kept[0].setsockopt(1, 2, 1)

    kept = [socket.socket(V4, TCP)]
    thread = threading.Thread(target=note)
    thread.start()
    try:
        for _ in range(3000):
            with socket.socket(V4, TCP) as s:
                kept[0] = s
                with contextlib.suppress(OSError):
                    s.setblocking(False)
                    s.connect(("127.0.0.1", 9101))
                with contextlib.suppress(OSError):
                    if s.getpeername():
                        won.append(s)
    finally:
        over = True
        thread.join()
    return "WON" if won else "HELD"


@attack
def first_calls_race_with_disconnects():
    """connect() to one that is permitted, and to AF_UNSPEC, beside a bind: what stays bound is decided."""
    over = False
    s = socket.socket(V4, TCP)
    s.setblocking(False)

    def cut():
        while not over:
            with contextlib.suppress(OSError):
                disconnect(s)

    thread = threading.Thread(target=cut)
    thread.start()
    told = set()
    try:
        for port in range(22, 500):
            with contextlib.suppress(OSError):
                s.connect((CLIENT, 9))
            with contextlib.suppress(OSError):
                s.bind(("0.0.0.0", port))
                told.add(s.getsockname()[0])
    finally:
        over = True
        thread.join()
    return "HELD"


# -- netns of one's own --


def passed(make, use):
    """A child in a netns of its own makes sockets, and this process uses them; or the other way round."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, TCP)
    child = os.fork()
    if not child:
        try:
            unshare(CLONE_NEWUSER | CLONE_NEWNET)
            made = make()
            socket.send_fds(theirs, [b"x"], [s.fileno() for s in made])
        except OSError:
            theirs.close()
        os._exit(0)
    theirs.close()
    told, fds, _, _ = socket.recv_fds(ours, 9, 8)
    os.waitpid(child, 0)
    if not told:
        raise PermissionError(1, "unshare")
    return use([socket.socket(fileno=fd) for fd in fds])


@attack
def sockets_of_ones_own_netns_reach_nothing():
    """Their sockets are exempt from the policy, because their netns leads nowhere."""

    def make():
        return [socket.socket(family, kind) for family, kind in itertools.product((V4, V6), (TCP, UDP))]

    def use(socks):
        told = {}
        for s in socks:
            s.settimeout(2)
            for address in (HOST, "127.0.0.1", CLIENT):
                told[f"{s.family.name}-{s.type.name}-{address}"] = outcome(s.connect, address_for(s, address, 9101 if s.type == TCP else 9102))
            with contextlib.suppress(OSError):  # the kernel lets it be bound to anything where there is no address at all
                s.bind(address_for(s, HOST, 22))
                s.listen()
        return wrong(told, "ENETUNREACH", "EADDRNOTAVAIL", "EINVAL", "ECONNREFUSED", "EACCES", "EPERM") or "REFUSED"

    return passed(make, use)


@attack
def raw_sockets_of_ones_own_netns_reach_nothing():
    def make():
        return [socket.socket(V4, socket.SOCK_RAW, socket.IPPROTO_ICMP), socket.socket(socket.AF_PACKET, socket.SOCK_RAW)]

    def use(socks):
        told = {"raw": outcome(socks[0].sendto, b"\x08\0" + bytes(6), (CLIENT, 0)), "packet": outcome(socks[1].bind, ("veth0", 0))}
        return wrong(told, "ENETUNREACH", "ENODEV", "EPERM") or "REFUSED"

    return passed(make, use)


@attack
def sockets_of_the_hosts_in_ones_own_netns():
    """Made before, used by a process that has gone to a netns of its own, whose calls are not trapped there."""
    socks = [socket.socket(family, kind) for family, kind in itertools.product((V4, V6), (TCP, UDP))]

    def tries():
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        told = {}
        for s in socks:
            s.settimeout(2)
            told[f"{s.family.name}-{s.type.name}-bind"] = outcome(s.bind, ("0.0.0.0", 22) if s.family == V4 else ("::", 22))
            told[f"{s.family.name}-{s.type.name}"] = outcome(s.connect, address_for(s, "127.0.0.1", 9101))
            if s.type == TCP:
                told[f"{s.family.name}-listen"] = outcome(s.listen)
        reached = {what: one for what, one in told.items() if one == "OK" and "TCP" in what and "bind" not in what}
        return wrong(reached) or "REFUSED"

    return in_a_child(tries)


@attack
def unix_sockets_of_ones_own_netns():
    """Its abstract names are its own, and so are the pairs that it makes."""

    def tries():
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        with socket.socket(socket.AF_UNIX, TCP) as s:
            s.bind("\0graft-attack-host")
        a, _b = socket.socketpair()
        return "OWN" if cookie(a) == cookie(socket.socket(socket.AF_UNIX)) else "HOSTS"

    return in_a_child(tries)


@attack
def listener_in_ones_own_netns_of_a_socket_of_the_hosts():
    """listen() is not trapped for who is elsewhere: the kernel would choose a port of the host's."""
    s = socket.socket(V4, TCP)

    def tries():
        unshare(CLONE_NEWUSER | CLONE_NEWNET)
        s.listen()

    def open_ports():
        return {line.split()[1] for line in Path("/proc/self/net/tcp").read_text().splitlines() if line.split()[3] == "0A"}

    before = open_ports()
    told = in_a_child(tries)
    return told if {port for port in open_ports() - before if port.startswith("00000000")} == set() else "PORT"


@attack
def options_over_a_page():
    """The hook sees a page of a longer value; what decides must be in it."""
    told = {}
    for level, name, value in ((1, 25, b"veth0"), (1, 36, struct.pack("=i", 7)), (0, 19, struct.pack("=i", 1)), (41, 75, struct.pack("=i", 1))):
        with socket.socket(V6 if level == 41 else V4, TCP) as s:
            long = ctypes.create_string_buffer(value + bytes(9000))
            told[f"{level}-{name}"] = "OK" if not libc.setsockopt(s.fileno(), level, name, long, 9000) else os.strerror(ctypes.get_errno())
    return wrong(told, "Operation not permitted", "Invalid argument", "Protocol not available") or "REFUSED"


@attack
def mptcp_of_every_form():
    """MPTCP's further subflows run no hook: what one gets is TCP, or nothing."""
    told = {}
    for family, kind in itertools.product((V4, V6), (1, 1 | 0x80000, 1 | 0x800)):
        told[f"{family}-{kind}"] = outcome(lambda f, k: socket.socket(fileno=call(41, f, k, 262)).getsockopt(1, 38), family, kind)
    return wrong(told, "6", "EPROTONOSUPPORT") or "REFUSED"


@attack
def accepted_and_made_are_told_apart_by_nobody_else():
    """An accepted socket shows no cookie, neither that of the host's netns."""
    sock, peer = accepted()
    with sock, peer:
        return "HOSTS" if any(cookie(sock)) else "OWN"
