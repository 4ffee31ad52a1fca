"""Print the table of the socket options that are refused as docs/differences.md has it.

usage: options.py [--write]     --write: put it into docs/differences.md, between the two markers

csrc/options.bpf.h decides. tests/kernel/test_options.py compares it with this table, number by number.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.printed import print_or_write

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/differences.md"
BEGIN = "<!-- printed by scripts/options.py -->\n"
END = "<!-- end of what scripts/options.py prints -->\n"
SOCKET, IP, IPV6, TCP, UDP = 1, 0, 41, 6, 17
LEVELS = {SOCKET: "SOL_SOCKET", IP: "IPPROTO_IP", IPV6: "IPPROTO_IPV6", TCP: "IPPROTO_TCP", UDP: "IPPROTO_UDP"}
GROUP = [
    "MCAST_JOIN_GROUP",
    "MCAST_BLOCK_SOURCE",
    "MCAST_UNBLOCK_SOURCE",
    "MCAST_LEAVE_GROUP",
    "MCAST_JOIN_SOURCE_GROUP",
    "MCAST_LEAVE_SOURCE_GROUP",
    "MCAST_MSFILTER",
]
MEMBERS = [
    "IP_ADD_MEMBERSHIP",
    "IP_DROP_MEMBERSHIP",
    "IP_UNBLOCK_SOURCE",
    "IP_BLOCK_SOURCE",
    "IP_ADD_SOURCE_MEMBERSHIP",
    "IP_DROP_SOURCE_MEMBERSHIP",
    "IP_MSFILTER",
]


@dataclass(frozen=True)
class Refused:
    """Options of a level that are refused.

    @names: by number, "" for one that is within a range. @default: the value that passes, as it is written, "" for
    none; @values: the same as bytes.
    """

    level: int
    names: dict[int, str]
    why: str
    default: str = ""
    values: tuple[bytes, ...] = ()


def _from(first: int, *names: str) -> dict[int, str]:
    return {first + n: name for n, name in enumerate(names)}


def _range(first: int, last: int, start: str, end: str) -> dict[int, str]:
    return {first: start} | dict.fromkeys(range(first + 1, last), "") | {last: end}


ZERO = ("0", (bytes(4),))
BYTE = ("0", (bytes(1), bytes(4)))
NOTHING = ("no value", (b"",))
IRQ = {69: "SO_PREFER_BUSY_POLL", 70: "SO_BUSY_POLL_BUDGET"}
ROUTING = {6: "IPV6_2292PKTOPTIONS", 57: "IPV6_RTHDR"}
HEADERS = {54: "IPV6_HOPOPTS", 55: "IPV6_RTHDRDSTOPTS", 59: "IPV6_DSTOPTS"}
REPAIR = _from(19, "TCP_REPAIR", "TCP_REPAIR_QUEUE", "TCP_QUEUE_SEQ", "TCP_REPAIR_OPTIONS")
FILTERS = {26: "SO_ATTACH_FILTER", 50: "SO_ATTACH_BPF"}
MARKS = {75: "SO_RCVMARK", 82: "SO_RCVPRIORITY"}
EMPTY_NAME = ('""', (b"", bytes(1), bytes(16)))
ANYWHERE = ("0.0.0.0", (bytes(4), bytes(8), bytes(12)))
FLAG = ("0", (b"", bytes(1), bytes(4)))
REFUSED = (
    Refused(SOCKET, {1: "SO_DEBUG"}, "the kernel's log is the host's", *ZERO),
    Refused(SOCKET, {25: "SO_BINDTODEVICE"}, "the devices are the host's", *EMPTY_NAME),
    Refused(SOCKET, FILTERS, "a filter reads hardware addresses, devices and marks of the host's"),
    Refused(SOCKET, {73: "SO_RESERVE_MEM"}, "the memory is the host's, and taken without a byte sent"),
    Refused(SOCKET, {32: "SO_SNDBUFFORCE", 33: "SO_RCVBUFFORCE"}, "past the host's limit"),
    Refused(SOCKET, {36: "SO_MARK"}, "the host's routing and firewall decide by marks", *ZERO),
    Refused(SOCKET, {62: "SO_BINDTOIFINDEX"}, "the devices are the host's", *ZERO),
    Refused(SOCKET, IRQ, "they hold back the interrupts of a host's device", *ZERO),
    Refused(SOCKET, MARKS, "the marks and priorities are the host's", *ZERO),
    Refused(IP, {4: "IP_OPTIONS"}, "a source route leads round the rules", *NOTHING),
    Refused(IP, {7: "IP_RETOPTS"}, "likewise", *FLAG),
    Refused(IP, {15: "IP_FREEBIND", 19: "IP_TRANSPARENT"}, "addresses that are not the container's", *BYTE),
    Refused(IP, {16: "IP_IPSEC_POLICY", 17: "IP_XFRM_POLICY"}, "IPsec's policies are the host's"),
    Refused(IP, {32: "IP_MULTICAST_IF"}, "the devices are the host's", *ANYWHERE),
    Refused(IP, _from(35, *MEMBERS) | _from(42, *GROUP), "the host's devices would join"),
    Refused(IP, {50: "IP_UNICAST_IF"}, "the devices are the host's", *ZERO),
    Refused(IP, {51: "IP_LOCAL_PORT_RANGE"}, "which ports the kernel may choose is graft's to set", *ZERO),
    Refused(IP, _from(64, "IPT_SO_SET_REPLACE", "IPT_SO_SET_ADD_COUNTERS"), "the firewall is the host's"),
    Refused(IP, _from(96, "ARPT_SO_SET_REPLACE", "ARPT_SO_SET_ADD_COUNTERS"), "likewise"),
    Refused(IP, _from(128, "EBT_SO_SET_ENTRIES", "EBT_SO_SET_COUNTERS"), "likewise"),
    Refused(IP, _range(200, 212, "MRT_INIT", "MRT_MAX"), "multicast routing is the host's"),
    Refused(IP, _range(1152, 1167, "IP_VS_SO_SET_NONE", "IP_VS_SO_SET_MAX"), "so is IPVS"),
    Refused(IPV6, {1: "IPV6_ADDRFORM"}, "the hooks of IPv4 would meet a socket of IPv6"),
    Refused(IPV6, ROUTING, "a routing header leads round the rules", *NOTHING),
    Refused(IPV6, HEADERS, "headers that go with one"),
    Refused(IPV6, {17: "IPV6_MULTICAST_IF"}, "the devices are the host's", *ZERO),
    Refused(IPV6, _from(20, "IPV6_ADD_MEMBERSHIP", "IPV6_DROP_MEMBERSHIP"), "the host's devices would join"),
    Refused(IPV6, _from(27, "IPV6_JOIN_ANYCAST", "IPV6_LEAVE_ANYCAST") | _from(42, *GROUP), "likewise"),
    Refused(IPV6, {32: "IPV6_FLOWLABEL_MGR"}, "a lease is the whole host's"),
    Refused(IPV6, {34: "IPV6_IPSEC_POLICY", 35: "IPV6_XFRM_POLICY"}, "IPsec's policies are the host's"),
    Refused(IPV6, {50: "IPV6_PKTINFO"}, "a device and a source of the host's", "zeros", (bytes(20),)),
    Refused(IPV6, _from(64, "IP6T_SO_SET_REPLACE", "IP6T_SO_SET_ADD_COUNTERS"), "the firewall is the host's"),
    Refused(IPV6, {75: "IPV6_TRANSPARENT", 78: "IPV6_FREEBIND"}, "addresses that are not the container's", *ZERO),
    Refused(IPV6, {76: "IPV6_UNICAST_IF"}, "the devices are the host's", *ZERO),
    Refused(IPV6, _range(200, 212, "MRT6_INIT", "MRT6_MAX"), "multicast routing is the host's"),
    Refused(TCP, REPAIR, "it makes connections that no hook has seen"),
    Refused(TCP, {29: "TCP_REPAIR_WINDOW", 42: "TCP_AO_REPAIR"}, "likewise"),
    Refused(UDP, {100: "UDP_ENCAP"}, "the kernel would take what arrives, past every hook", *ZERO),
)


def table() -> str:
    """The text between the markers."""
    lines = ["| level | refused | but | because |", "| --- | --- | --- | --- |"]
    for row in REFUSED:
        names = [name for name in row.names.values() if name]
        shown = " to ".join(names) if "" in row.names.values() else ", ".join(names)
        lines.append(f"| {LEVELS[row.level]} | {shown} | {row.default or '-'} | {row.why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, or write it."""
    print_or_write(table(), DOCUMENT, BEGIN, END)


if __name__ == "__main__":
    main()
