"""Addresses, ports and protocols: their values and their grammar. Pure."""

import socket
from typing import NamedTuple

from graft.errors import UsageError

MAPPED = bytes(10) + b"\xff\xff"
IPPROTO = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
PROTOCOL_NAME = {number: name for name, number in IPPROTO.items()}
ANY4 = MAPPED + bytes(4)
ANY6 = bytes(16)


class Address(NamedTuple):
    """An IP address: 16 bytes in network order, IPv4 as ::ffff:a.b.c.d."""

    raw: bytes

    @property
    def v4(self) -> bool:
        """Is it IPv4?"""
        return self.raw.startswith(MAPPED)

    @property
    def any(self) -> bool:
        """Is it 0.0.0.0 or ::?"""
        return self.raw in (ANY4, ANY6)

    @property
    def loopback(self) -> bool:
        """Is it in 127.0.0.0/8, or ::1?"""
        return self.raw[12] == 127 if self.v4 else self.raw == bytes(15) + b"\x01"

    @property
    def link_local(self) -> bool:
        """Is it in fe80::/10, so that it means something on one device alone?"""
        return self.raw[0] == 0xFE and self.raw[1] & 0xC0 == 0x80

    @property
    def group(self) -> bool:
        """Is it a group's (multicast), or everybody's (broadcast)?"""
        return (self.raw[12] >> 4 == 14 or self.raw[12:] == b"\xff" * 4) if self.v4 else self.raw[0] == 0xFF

    @property
    def bits(self) -> int:
        """How many bits an address of this family has: 32 or 128."""
        return 32 if self.v4 else 128

    @property
    def kind(self) -> str:
        """The endpoint type of this family: "ipv4" or "ipv6"."""
        return "ipv4" if self.v4 else "ipv6"

    def __str__(self) -> str:
        if self.v4:
            return socket.inet_ntop(socket.AF_INET, self.raw[12:])
        return socket.inet_ntop(socket.AF_INET6, self.raw)

    def with_port(self, port: int | str) -> str:
        """ADDR:PORT as text, with brackets around an IPv6 address."""
        return f"{self}:{port}" if self.v4 else f"[{self}]:{port}"


def parse_address(text: str, *, kind: str | None = None) -> Address:
    """Parse an IPv4 or IPv6 literal, the latter with or without brackets. Raises UsageError, also if not of @kind."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        if ":" in bare:
            address = Address(socket.inet_pton(socket.AF_INET6, bare))
        else:
            address = Address(MAPPED + socket.inet_pton(socket.AF_INET, bare))
    except (OSError, ValueError):
        raise UsageError(f"'{text}' is not an IP address", hint="like 192.0.2.1 or 2001:db8::1") from None
    if kind and address.kind != kind:
        raise UsageError(f"'{text}' is not an {kind} address", hint=f"it is {address.kind}")
    return address


class Prefix(NamedTuple):
    """The addresses whose first `length` bits are those of `address`: of 32 or 128, by its family."""

    address: Address
    length: int

    def covers(self, address: Address) -> bool:
        """Is @address one of them?"""
        shift = self.address.bits - self.length
        numbers = [int.from_bytes(a.raw, "big") >> shift for a in (self.address, address)]
        return self.address.v4 == address.v4 and numbers[0] == numbers[1]

    def __str__(self) -> str:
        return f"{self.address}/{self.length}"


def parse_prefix(text: str) -> Prefix:
    """Parse ADDR/LEN, or ADDR for that address alone. Raises UsageError, also if bits after LEN are set."""
    bare, slash, length_text = text.partition("/")
    address = parse_address(bare)
    longest = address.bits
    number = length_text.isascii() and length_text.isdigit() and len(length_text) <= 3
    if slash and not (number and int(length_text) <= longest):
        raise UsageError(f"'{text}' is not an address with its prefix length", hint="like 10.77.0.0/16")
    length = int(length_text) if slash else longest
    if int.from_bytes(address.raw, "big") & ((1 << (longest - length)) - 1):
        raise UsageError(f"'{text}' has bits set after the prefix", hint="like 10.77.0.0/16")
    return Prefix(address, length)


def parse_port(text: str, *, least: int = 0) -> int:
    """Parse a decimal port number from @least to 65535. Raises UsageError."""
    if not text.isascii() or not text.isdigit() or len(text) > 5 or not least <= int(text) <= 65535:
        raise UsageError(f"'{text}' is not a port", hint=f"a number from {least} to 65535")
    return int(text)


def parse_ports(text: str, *, least: int = 0) -> tuple[int, int]:
    """Parse PORT or PORT-PORT: the first and the last port. Raises UsageError."""
    low, dash, high = text.partition("-")
    first = parse_port(low, least=least)
    last = parse_port(high, least=least) if dash else first
    if last < first:
        raise UsageError(f"port range '{text}' runs backwards", hint=f"write {last}-{first}")
    return first, last
