"""Addresses that are graft's own: the slices, and those that stand for names of endpoints. Pure.

Slices are the host's loopback addresses that stand for a tenant's own loopback. Names: graft/rules/endpoint_names.py.
"""

from graft.rules.address import ANY4, Address

SLICE_SHIFT = 5
SLICE_GROUP = 8  # numbers of a tenant's, by the first of which it is known: 256 addresses of IPv4
SLICE_LOOPBACKS = 14
SLICE_DYNAMIC = 16
SLICE_PORT_BASE = 61440
SLICE_COUNT = 1 << (22 - SLICE_SHIFT)
SLICE4_NET = 0x7F400000
SLICE4_MASK = 0xFFC00000
SLICES4 = "127.64.0.0/10"
SLICE6_PREFIX = bytes.fromhex("fd67726166740000")
SLICE6_NETWORK = "fd67:7261:6674::/64"
NAMES4_NET = 0xFA400000  # 250.64.0.0/10
NAMES4_MASK = 0xFFC00000
NAMES6_PREFIX = bytes.fromhex("fd67726166740001")
NAMES4, NAMES6 = "250.64.0.0/10", "fd67:7261:6674:1::/64"


def in_slices(address: Address) -> bool:
    """Is @address in 127.64.0.0/10 or fd67:7261:6674::/64, so that it is some tenant's loopback?"""
    if address.v4:
        return int.from_bytes(address.raw[12:], "big") & SLICE4_MASK == SLICE4_NET
    return address.raw.startswith(SLICE6_PREFIX)


def in_names(address: Address) -> bool:
    """Is @address in 250.64.0.0/10 or fd67:7261:6674:1::/64, so that it stands for an endpoint's name, or could?"""
    if address.v4:
        return int.from_bytes(address.raw[12:], "big") & NAMES4_MASK == NAMES4_NET
    return address.raw.startswith(NAMES6_PREFIX)


def dynamic_address(number: int) -> Address:
    """The IPv6 address of the slice with this number from which connections to the tenant's own loopback leave."""
    return Address(SLICE6_PREFIX + number.to_bytes(4, "big") + SLICE_DYNAMIC.to_bytes(4, "big"))


def slice_address(number: int, port: int, *, v4: bool = True) -> tuple[Address, int]:
    """The host's address and port for port @port of a tenant's private loopback."""
    index, real = port >> 12, SLICE_PORT_BASE | (port & 0xFFF)
    if v4:
        return Address(ANY4[:12] + (SLICE4_NET | number << SLICE_SHIFT | index).to_bytes(4, "big")), real
    return Address(SLICE6_PREFIX + number.to_bytes(4, "big") + index.to_bytes(4, "big")), real
