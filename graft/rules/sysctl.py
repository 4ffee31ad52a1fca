"""Sysctls of a container's netns, and the options of its sockets that stand for them.

A container's sockets are in the host's netns, so that the kernel never asks the container's sysctls about them. What
a sysctl sets for the sockets of a netns, an option often sets for one: those are set on each socket as it is made,
and the program may set another value, as everywhere. A few act by other means, or are the container's own to have.
The others would act on nothing. graft/kernel/sysctl.py refuses those.

Pure. Sources: Documentation/networking/ip-sysctl.rst of Linux, and socket(7), ip(7), ipv6(7), tcp(7).
"""

import socket
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from graft.errors import UsageError

IGNORE = "ignore"  # what would act on nothing is not refused
IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_PMTUDISC_WANT = 10, 0, 1  # linux/in.h
IP_LOCAL_PORT_RANGE = 51
TCP_THIN_LINEAR_TIMEOUTS, TCP_RTO_MAX_MS, TCP_RTO_MIN_US = 16, 44, 45  # linux/tcp.h
SUP_KIND_INET6, SUP_KIND_DGRAM = 1, 2  # csrc/sup.h: the bits of a kind of socket
TCP4, TCP6, UDP4, UDP6 = (1 << kind for kind in (0, SUP_KIND_INET6, SUP_KIND_DGRAM, SUP_KIND_DGRAM | SUP_KIND_INET6))
TCP, UDP = TCP4 | TCP6, UDP4 | UDP6

SOMAXCONN = "net.core.somaxconn"
SYN_RETRIES, SYNACK_RETRIES = "net.ipv4.tcp_syn_retries", "net.ipv4.tcp_synack_retries"
PORT_RANGE = "net.ipv4.ip_local_port_range"
CONGESTION = "net.ipv4.tcp_congestion_control"
NUMBERS_FIRST, NUMBERS_WORDS = 32768, 448  # csrc/abi.h: what a bind to port 0 may get, a bit for each
PORTS_LEAST = 1024  # of a range: with few, who may set a sysctl would choose a port of the host's for a UDP socket
PRIVATE_PORTS = (NUMBERS_FIRST, NUMBERS_FIRST + 64 * NUMBERS_WORDS - 1)


class Option(NamedTuple):
    """An option of setsockopt(2) with its value, an int of 32 bits or a text. @kinds: a bit for each of SUP_KINDS."""

    kinds: int
    level: int
    name: int
    value: int | str

    @property
    def raw(self) -> bytes:
        """The value's bytes, as the kernel takes them."""
        if isinstance(self.value, str):
            return self.value.encode()
        return self.value.to_bytes(4, "little")


class Carrier(NamedTuple):
    """The option that a sysctl of one number becomes, and which numbers that option takes."""

    kinds: int
    level: int
    name: int
    least: int
    most: int
    values: Mapping[int, int] = {}  # of the option, where they are others than the sysctl's


# TCP_LINGER2 takes two minutes at most, and 0 for the host's sysctl (tcp_setsockopt() in net/ipv4/tcp.c). No option
# switches tcp_thin_linear_timeouts off.
CARRIERS = {
    "net.ipv4.tcp_keepalive_time": Carrier(TCP, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1, 32767),
    "net.ipv4.tcp_keepalive_intvl": Carrier(TCP, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1, 32767),
    "net.ipv4.tcp_keepalive_probes": Carrier(TCP, socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1, 127),
    SYN_RETRIES: Carrier(TCP, socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1, 127),
    "net.ipv4.tcp_fin_timeout": Carrier(TCP, socket.IPPROTO_TCP, socket.TCP_LINGER2, 1, 120),
    "net.ipv4.tcp_notsent_lowat": Carrier(TCP, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1, (1 << 32) - 1),
    "net.ipv4.tcp_thin_linear_timeouts": Carrier(TCP, socket.IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1, 1),
    "net.ipv4.tcp_rto_max_ms": Carrier(TCP, socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 1000, 120000),
    "net.ipv4.tcp_rto_min_us": Carrier(TCP, socket.IPPROTO_TCP, TCP_RTO_MIN_US, 1, 200000),
    "net.ipv4.ip_default_ttl": Carrier(TCP | UDP, socket.IPPROTO_IP, socket.IP_TTL, 1, 255),
    "net.ipv4.ip_no_pmtu_disc": Carrier(
        TCP | UDP, socket.IPPROTO_IP, IP_MTU_DISCOVER, 0, 1, {0: IP_PMTUDISC_WANT, 1: IP_PMTUDISC_DONT}
    ),
    "net.ipv6.bindv6only": Carrier(TCP6 | UDP6, socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0, 1),
}
# What listen() does about these is graftd's (graft/trap/supervisor.py). Until then TCP_SYNCNT counts SYNs, and of a
# listener answers to them.
LISTENING = {SOMAXCONN: (0, (1 << 31) - 1), SYNACK_RETRIES: (1, 127)}
# They act, whatever their value: the bind hook reads the first (csrc/low_ports.bpf.h), ping sockets and unix sockets
# are the container's own.
OWN = ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range", "net.unix.max_dgram_qlen")


def carries(texts: Iterable[str]) -> bool:
    """Is there a sysctl among @texts that options of a container's sockets carry, which somebody has to set?"""
    return any(name not in (*OWN, *LISTENING) for name in parse_sysctls(texts))


def parse_sysctl(text: str) -> tuple[str, str]:
    """`NAME=VALUE`, with the separators that sysctl(8) takes. Raises UsageError, also for one that is not net's.

    Returns the name with dots between its parts, and the value with one blank between its words.
    """
    name, equals, value = text.partition("=")
    if "/" in name and "." not in name.partition("/")[0]:
        name = name.translate(str.maketrans("/.", "./"))
    value = " ".join(value.split())
    parts = name.split(".")
    whole = all(part.strip("/") for part in parts) and len(parts) > 2 and parts[0] == "net"
    if not equals or not value or not whole or not f"{name}{value}".isprintable():
        raise UsageError(f"sysctl '{text}' is not NAME=VALUE", hint="one of net.*, as net.core.somaxconn=1024")
    return name, value


def parse_sysctls(texts: Iterable[str]) -> dict[str, str]:
    """Values by name; the word `ignore` is none. Raises UsageError, also for a name that has two values."""
    found: dict[str, str] = {}
    for text in texts:
        if text == IGNORE:
            continue
        name, value = parse_sysctl(text)
        if found.setdefault(name, value) != value:
            raise UsageError(f"sysctl {name} has two values, {found[name]} and {value}", hint="give one")
    return found


def ports_of(value: str) -> tuple[int, int] | None:
    """The first and the last port of a value of PORT_RANGE; None if it is none."""
    words = value.split()
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and len(word) < 6 for word in words):
        return None
    low, high = map(int, words)
    return (low, high) if 0 < low <= high <= 65535 else None


def udp_most(ephemeral: tuple[int, int]) -> int:
    """The last port that the kernel may choose for UDP, before any hook runs: half of @ephemeral is the host's."""
    return ephemeral[0] + (ephemeral[1] - ephemeral[0]) // 2


def tcp_most(ephemeral: tuple[int, int]) -> int:
    """Likewise for TCP: a sixteenth is the host's, because connections to one destination take a port each."""
    return ephemeral[0] + (ephemeral[1] - ephemeral[0]) * 15 // 16


def number_in(value: str, least: int, most: int) -> int | None:
    """The number that @value is, if it is one from @least to @most; else None."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) < 11 else -1
    return number if least <= number <= most else None


def options_for(name: str, value: str, ephemeral: tuple[int, int]) -> list[Option] | None:
    """The options that carry the sysctl; [] for what acts by other means; None if nothing carries it, or this value.

    @ephemeral: the host's net.ipv4.ip_local_port_range.
    """
    if name in OWN:
        return []
    if name in LISTENING:
        return [] if number_in(value, *LISTENING[name]) is not None else None
    if name == CONGESTION:
        return [Option(TCP, socket.IPPROTO_TCP, socket.TCP_CONGESTION, value)] if len(value) < 16 else None
    if name == PORT_RANGE:
        return _port_options(value, ephemeral)
    carrier = CARRIERS.get(name)
    number = number_in(value, carrier.least, carrier.most) if carrier else None
    if carrier is None or number is None:
        return None
    return [Option(carrier.kinds, carrier.level, carrier.name, carrier.values.get(number, number))]


def _port_options(value: str, ephemeral: tuple[int, int]) -> list[Option] | None:
    ports = ports_of(value)
    low, high = range_bounds(ephemeral)
    if ports is None or not low <= ports[0] <= last_begin(ephemeral) or ports[1] > high:
        return None
    if ports[1] - ports[0] + 1 < PORTS_LEAST:
        return None
    most = {TCP: ports[1], UDP: min(ports[1], udp_most(ephemeral))}
    return [Option(k, socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, ports[0] | m << 16) for k, m in most.items()]


def last_begin(ephemeral: tuple[int, int]) -> int:
    """The last port that a range may begin with, so that it has PORTS_LEAST for UDP as well."""
    return udp_most(ephemeral) - PORTS_LEAST + 1


def range_bounds(ephemeral: tuple[int, int]) -> tuple[int, int]:
    """Within which ports a container's ip_local_port_range may be: the kernel's choice and the bind hook's."""
    return max(ephemeral[0], PRIVATE_PORTS[0]), min(tcp_most(ephemeral), PRIVATE_PORTS[1])


@lru_cache(maxsize=1024)
def socket_options(texts: Sequence[str], ephemeral: tuple[int, int]) -> tuple[Option, ...]:
    """All that is set on a new socket of a container that asked for the sysctls @texts, in order of their names."""
    found = sorted(parse_sysctls(texts).items())
    return tuple(option for name, value in found for option in options_for(name, value, ephemeral) or ())


@lru_cache(maxsize=1024)
def private_ports(texts: Sequence[str], ephemeral: tuple[int, int]) -> tuple[int, int]:
    """The first and the last port that a bind to port 0 may get on the container's own loopback."""
    value = parse_sysctls(texts).get(PORT_RANGE, "")
    ports = ports_of(value)
    return ports if ports and options_for(PORT_RANGE, value, ephemeral) else PRIVATE_PORTS


def taken_ports(private: tuple[int, int]) -> bytes:
    """The bits of NUMBERS_WORDS words of 64, one a port: set for those that are not in @private."""
    low, high = private[0] - NUMBERS_FIRST, private[1] - NUMBERS_FIRST
    free = (1 << (high + 1)) - (1 << low)
    return ((1 << 64 * NUMBERS_WORDS) - 1 - free).to_bytes(8 * NUMBERS_WORDS, "little")


def kind_of(family: int, kind: int) -> int:
    """The bit of a kind of socket. @kind: SOCK_STREAM or SOCK_DGRAM."""
    if family == socket.AF_INET6:
        return UDP6 if kind == socket.SOCK_DGRAM else TCP6
    return UDP4 if kind == socket.SOCK_DGRAM else TCP4
