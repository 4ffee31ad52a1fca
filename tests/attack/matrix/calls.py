"""The columns of the matrix: calls on one socket, as values. Pure, and the same list inside and outside.

A cell's call is (operation, arguments...). The operations are methods of agent.Agent.
"""

import itertools
import socket
import struct
from typing import Any, NamedTuple

LENGTHS = (0, 1, 3, 4, 5, 4095, 4097, 8192)
IP, TCP, UDP, IPV6, GRAFT = 0, 6, 17, 41, 254
SOL_SOCKET = 1
# Every number of a level that has a name in socket(7), ip(7), ipv6(7), tcp(7), udp(7) or linux/*.h, and those between.
OPTIONS = {
    SOL_SOCKET: [*range(1, 86)],
    IP: [*range(1, 53), *range(64, 69), 80, 81, 83, *range(96, 100), *range(200, 213), *range(1152, 1160)],
    IPV6: [*range(1, 83), 101, 128, 129, *range(200, 213)],
    TCP: [*range(1, 48)],
    UDP: [1, 10, 11, *range(100, 106)],
    GRAFT: [*range(1, 8)],
    136: [10, 11],  # UDP-Lite
    255: [1],  # raw
    58: [1],  # ICMPv6
    263: [1, 5, 8, 18],  # packet
    273: [1],  # DCCP or RXRPC
    282: [1, 2],  # TLS
    284: [1, 2, 3],  # MPTCP
    287: [0, 6],  # vsock
}


def _pad(value: bytes, size: int) -> bytes:
    return value.ljust(size, b"\0")


def _int(value: int) -> bytes:
    return struct.pack("=i", value)


def _group(text: str, device: int) -> bytes:
    """struct group_req of linux/in.h."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    raw = socket.inet_pton(family, text)
    name = struct.pack("=HHI16sI", family, 0, 0, raw, 0) if ":" in text else struct.pack("=HH4s", family, 0, raw)
    return struct.pack("=i4x", device) + _pad(name, 128)


ROUTE4 = bytes([131, 7, 4, 10, 77, 0, 1, 0])
ROUTING = bytes([0, 2, 4, 1, 0, 0, 0, 0]) + socket.inet_pton(socket.AF_INET6, "2001:db8:77::1")
PADDING = bytes([0, 0, 1, 4, 0, 0, 0, 0])
LABEL = bytes(16) + struct.pack(">I", 0x1234) + bytes([0, 1, 1, 0, 6, 0, 6, 0]) + bytes(4)
MEMBER4 = socket.inet_aton("239.7.7.7")
MEMBER6 = socket.inet_pton(socket.AF_INET6, "ff02::7777")
HOST6 = socket.inet_pton(socket.AF_INET6, "2001:db8:77::1")
# What an option has to have to do something; each has also the int 1, with every length
VALUES: dict[tuple[int, int], tuple[bytes, ...]] = {
    (1, 12): (_int(6), _int(7), _int(0x7FFFFFFF)),
    (1, 25): (b"lo\0", b"veth0\0", b"spare0\0"),
    (1, 36): (_int(7),),
    (1, 61): (struct.pack("=Q", 1 << 62),),
    (1, 62): (_int(2), _int(3)),
    (1, 82): (_int(1),),
    (0, 4): (ROUTE4, bytes([148, 4, 0, 0])),
    (0, 1): (_int(0xFF),),
    (0, 32): (MEMBER4, socket.inet_aton("10.77.0.1"), struct.pack("=4s4si", bytes(4), bytes(4), 2)),
    (0, 35): (MEMBER4 + bytes(4), MEMBER4 + socket.inet_aton("10.77.0.1"), MEMBER4 + bytes(4) + _int(2)),
    (0, 39): (MEMBER4 + bytes(4) + socket.inet_aton("10.77.0.2"),),
    (0, 42): (_group("239.7.7.8", 2),),
    (0, 50): (struct.pack(">i", 2), struct.pack(">i", 3)),
    (0, 51): (_int(22 << 16 | 22),),
    (0, 64): (_pad(b"filter", 84),),
    (41, 1): (_int(2),),
    (41, 17): (_int(2),),
    (41, 20): (MEMBER6 + _int(2), MEMBER6 + _int(0)),
    (41, 27): (HOST6 + _int(2),),
    (41, 26): (_int(0),),
    (41, 32): (LABEL,),
    (41, 33): (_int(1),),
    (41, 42): (_group("ff02::7778", 2),),
    (41, 50): (HOST6 + _int(0), bytes(16) + _int(2)),
    (41, 54): (PADDING,),
    (41, 57): (ROUTING,),
    (41, 59): (PADDING,),
    (41, 64): (_pad(b"filter", 84),),
    (41, 76): (struct.pack(">i", 2),),
    (6, 13): (b"cubic", b"bbr"),
    (6, 14): (_pad(struct.pack("=HH4s", 2, 0, bytes([10, 77, 0, 1])), 128) + struct.pack("=BBHI", 0, 0, 4, 0) + b"abcd" + bytes(76),),
    (6, 31): (b"tls", b"smc", b"mptcp", b"espintcp"),
    (17, 100): (_int(2), _int(4)),
}  # fmt: skip
FEW = (1, 4, 4097)

# ioctl(2): every number of sockios.h and wireless.h, each with the names of two devices
QUESTIONS = (
    0x8910, 0x8912, 0x8913, 0x8915, 0x8917, 0x8919, 0x891B, 0x891D, 0x8921, 0x8927, 0x8933, 0x8938, 0x8942, 0x8970,
)  # fmt: skip
REQUESTS = (*range(0x8901, 0x8A00), *range(0x8B00, 0x8B40))
OWN = (*range(0x8901, 0x8908), 0x541B, 0x5411)  # of the socket alone
GSKNS = 0x894C
BRIDGES = (0x89A0, 0x89A1)
ADDRESS = struct.pack("=HH4s", socket.AF_INET, 0, bytes([10, 66, 6, 6]))
UNION = {0x8914: _int(0), 0x8916: ADDRESS, 0x8918: ADDRESS, 0x891A: ADDRESS, 0x891C: ADDRESS, 0x8922: _int(1400)}


def options(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[Any, ...]]:
    """Every option, set with each length, and with what it is for."""
    cells: list[tuple[Any, ...]] = []
    for level, numbers in OPTIONS.items():
        for number in numbers:
            cells += [("set", level, number, _int(1), length) for length in lengths]
            for value in VALUES.get((level, number), ()):
                cells += [("set", level, number, value, length) for length in {len(value), *lengths[-2:]}]
    return cells


def answers(lengths: tuple[int, ...] = LENGTHS) -> list[tuple[Any, ...]]:
    """Every option, got with each length."""
    return [("get", level, n, length) for level, numbers in OPTIONS.items() for n in numbers for length in (*lengths, 84)]


def requests() -> list[tuple[Any, ...]]:
    """Every ioctl."""
    cells: list[tuple[Any, ...]] = [("ioctl", request, b"") for request in (*OWN, 0x18912, 0x7FFF8927)]
    for request in REQUESTS:
        if request not in OWN:
            names: tuple[bytes, ...] = (b"lo", b"veth0") if request in QUESTIONS else (b"veth0",)
            if request in BRIDGES:  # which the container may make in its own namespace: not by the name of a host's
                names = (b"matrix0",)
            cells += [("ioctl", request, _pad(name, 16) + UNION.get(request, _int(2))) for name in names]
    return cells


class Places(NamedTuple):
    """The addresses of the laboratory."""

    host4: str
    client4: str
    second4: str
    host6: str
    client6: str
    other: str  # where another container's loopback really is
    published: int  # the container publishes this port, of its wildcard, at [::] of the host
    away: str  # leads to an endpoint in another netns
    unix: str  # leads to a unix endpoint


def name4(text: str, port: int) -> bytes:
    """sockaddr_in."""
    return struct.pack("=H", socket.AF_INET) + struct.pack(">H4s8x", port, socket.inet_aton(text))


def name6(text: str, port: int, scope: int = 0) -> bytes:
    """sockaddr_in6."""
    raw = socket.inet_pton(socket.AF_INET6, text)
    return struct.pack("=H", socket.AF_INET6) + struct.pack(">HI16s", port, 0, raw) + struct.pack("=I", scope)


def destinations(where: Places, six: bool) -> dict[str, bytes]:
    """Destinations by what they are. Ports: 9100 the host's wildcard, 9101 its loopback, 9102 UDP, 9 nobody."""
    four = {
        "own loopback": name4("127.0.0.1", 9), "hosts loopback": name4("127.0.0.1", 9101), "host": name4(where.host4, 9100),
        "hosts udp": name4(where.host4, 9102), "loopback udp": name4("127.0.0.1", 9102),
        "second": name4(where.second4, 9100), "client": name4(where.client4, 9100),
        "neighbour": name4("10.77.0.99", 9001), "beyond": name4("192.0.2.1", 9001),
        "others slice": name4(where.other, 61440 + 80), "others own": name4("10.66.0.9", 80),
        "others published": name4(where.host4, 9300), "a slice": name4("127.64.0.16", 61520),
        "loopback net": name4("127.9.9.9", 9101), "wildcard": name4("0.0.0.0", 9101), "broadcast": name4("255.255.255.255", 9102),
        "net broadcast": name4("10.77.0.255", 9102), "group": name4("224.0.0.251", 9102), "port 0": name4(where.host4, 0),
        "resolver": name4("127.0.0.11", 53),
    }  # fmt: skip
    if not six:
        return {**four, "unspec": bytes(16), "short": four["host"][:8], "long": _pad(four["host"], 128),
                "graft": struct.pack("=H16s", 4, b"ep-host"), "family of six": name6("::1", 9101)}  # fmt: skip
    mapped = {f"mapped {k}": name6("::ffff:" + socket.inet_ntoa(v[4:8]), *struct.unpack(">H", v[2:4])) for k, v in four.items()}
    return {
        **mapped, "own loopback": name6("::1", 9), "hosts loopback": name6("::1", 9101), "loopback udp": name6("::1", 9102),
        "host": name6(where.host6, 9100), "hosts udp": name6(where.host6, 9102), "client": name6(where.client6, 9100),
        "a slice": name6("fd67:7261:6674::1:1", 61520), "wildcard": name6("::", 9101), "group": name6("ff02::1", 9102, 2),
        "link": name6("fe80::1", 9102, 2), "compatible": name6("::10.77.0.1", 9100), "unspec": bytes(28),
        "short": name6(where.host6, 9100)[:20], "family of four": four["host"], "loopback of four": four["hosts loopback"],
        "beyond": name6("2001:db8:99::1", 9001), "graft": struct.pack("=H16s", 4, b"ep-host"),
    }  # fmt: skip


def _pktinfo(device: int, source: str) -> bytes:
    return struct.pack("=i4s4s", device, socket.inet_aton(source), bytes(4))


def _pktinfo6(source: str, device: int) -> bytes:
    return socket.inet_pton(socket.AF_INET6, source) + _int(device)


# sendmsg(2): (what, level, type, data)
CONTROLS: list[tuple[str, int, int, bytes]] = [
    ("device 2", IP, 8, _pktinfo(2, "0.0.0.0")), ("device 3", IP, 8, _pktinfo(3, "0.0.0.0")),
    ("source 127.0.0.1", IP, 8, _pktinfo(0, "127.0.0.1")), ("source second", IP, 8, _pktinfo(0, "10.77.0.3")),
    ("source of nobody", IP, 8, _pktinfo(0, "198.51.100.7")), ("options", IP, 7, ROUTE4), ("ttl", IP, 2, _int(64)),
    ("tos", IP, 1, _int(16)), ("protocol", IP, 52, _int(6)), ("mark", SOL_SOCKET, 36, _int(7)),
    ("time", SOL_SOCKET, 61, struct.pack("=Q", 1 << 62)), ("time stamps", SOL_SOCKET, 37, _int(1 << 4)),
    ("priority", SOL_SOCKET, 12, _int(7)), ("rights", SOL_SOCKET, 1, _int(0)), ("credentials", SOL_SOCKET, 2, bytes(12)),
    ("option id", SOL_SOCKET, 81, _int(9)), ("device memory", SOL_SOCKET, 79, bytes(16)), ("segments", UDP, 103, struct.pack("=H", 8)),
    ("six: source", IPV6, 50, _pktinfo6("2001:db8:77::1", 0)), ("six: source of nobody", IPV6, 50, _pktinfo6("2001:db8::bad", 0)),
    ("six: device 2", IPV6, 50, _pktinfo6("::", 2)), ("six: device 3", IPV6, 50, _pktinfo6("::", 3)),
    ("six: loopback source", IPV6, 50, _pktinfo6("::1", 0)), ("six: old source", IPV6, 2, _pktinfo6("2001:db8::bad", 0)),
    ("six: hops", IPV6, 52, _int(64)), ("six: class", IPV6, 67, _int(16)), ("six: routing", IPV6, 57, ROUTING),
    ("six: old routing", IPV6, 5, ROUTING), ("six: hop options", IPV6, 54, PADDING), ("six: destination options", IPV6, 59, PADDING),
    ("six: flow", IPV6, 11, struct.pack(">I", 0x1234)), ("six: no fragments", IPV6, 62, _int(1)),
]  # fmt: skip
TO = ("hosts udp", "loopback udp", "host", "client", "own loopback", "mapped hosts udp", "mapped loopback udp", "group")


def binds(where: Places, six: bool) -> dict[str, bytes]:
    """Addresses to bind to."""
    plain = {
        "port 22": name4("0.0.0.0", 22), "hosts": name4(where.host4, 8099), "hosts 22": name4(where.host4, 22),
        "second": name4(where.second4, 8081), "loopback": name4("127.0.0.1", 8098), "any": name4("0.0.0.0", 8097),
        "chosen": name4("0.0.0.0", 0), "chosen loopback": name4("127.0.0.1", 0), "chosen hosts": name4(where.host4, 0),
        "others slice": name4(where.other, 61444), "a slice": name4("127.64.0.16", 61520), "group": name4("224.0.0.251", 5353),
        "broadcast": name4("255.255.255.255", 5353), "nobodys": name4("198.51.100.7", 8096), "clients": name4(where.client4, 8095),
    }  # fmt: skip
    if not six:
        return {**plain, "unspec any": bytes(2) + plain["any"][2:], "short": plain["hosts"][:8], "six": name6("::", 8094),
                "graft": struct.pack("=H16s", 4, b"ep-out")}  # fmt: skip
    mapped = {f"mapped {k}": name6("::ffff:" + socket.inet_ntoa(v[4:8]), *struct.unpack(">H", v[2:4])) for k, v in plain.items()}
    return {
        **mapped, "port 22": name6("::", 22), "hosts": name6(where.host6, 8099), "loopback": name6("::1", 8098),
        "any": name6("::", 8097), "chosen": name6("::", 0), "chosen hosts": name6(where.host6, 0),
        "a slice": name6("fd67:7261:6674::1:1", 61520), "group": name6("ff02::fb", 5353, 2), "link": name6("fe80::1", 8096, 2),
        "nobodys": name6("2001:db8::bad", 8096), "four": plain["hosts"], "unspec": bytes(28), "short": name6("::", 8093)[:20],
    }  # fmt: skip


def noted(where: Places, kind: str) -> list[tuple[Any, ...]]:
    """An option that may be noted though the kernel refuses it, and then a bind to a published port, which is held."""
    values = itertools.product((26,), (0, 1, 1 << 31), LENGTHS)
    tries = [(IPV6, number, struct.pack("=I", value), length) for number, value, length in values]
    if kind == "udp":
        tries += [(1, number, _int(1), length) for number in (2, 15) for length in LENGTHS]
    return [("noted", *one, name6("::", where.published + n)) for n, one in enumerate(tries)]


NOTED = 40  # ports that `noted` needs


def cells(group: str, where: Places, six: bool, kind: str) -> list[tuple[Any, ...]]:
    """The calls of one group, for an internet socket of a family and kind, or any other."""
    to = destinations(where, six)
    if group == "set":
        return options()
    if group == "set few":
        return options(FEW)
    if group == "get":
        return answers()
    if group == "get few":
        return answers(FEW)
    if group == "set some":
        return options((4,))
    if group == "get some":
        return answers((4,))
    if group == "ioctl":
        return requests()
    if group == "bind":
        return [("bind", what, name) for what, name in binds(where, six).items()]
    if group == "connect":
        return [("connect", what, name) for what, name in to.items()]
    if group == "send":
        plain: list[tuple[Any, ...]] = [("send", what, name, []) for what, name in to.items()]
        return plain + [
            ("send", f"{what}, {control[0]}", to[what], [control[1:]]) for what in TO if what in to for control in CONTROLS
        ] + [("send", f"no address, {control[0]}", b"", [control[1:]]) for control in CONTROLS]  # fmt: skip
    if group == "names":
        return [("names",), *(("listen", n) for n in (0, 1, -1)), *(("shutdown", n) for n in (0, 1, 2, 7)), ("disconnect",)]
    assert group == "noted"
    return noted(where, kind)


def told(call: tuple[Any, ...]) -> str:
    """A call as a reader wants it."""
    return f"{call[0]}({', '.join(hex(a) if isinstance(a, int) and a > 255 else repr(a) for a in call[1:])})"
