"""Addresses of a container's own: their grammar, and what leaves from them. Pure."""

from typing import NamedTuple

from graft.errors import UsageError
from graft.rules.address import ANY4, ANY6, Address, parse_address
from graft.rules.slices import SLICE6_PREFIX, in_names


class Own(NamedTuple):
    """A container's own address (graft/tenants/attachment.py)."""

    address: Address
    prefix: Address  # connections to prefix/length leave from the address
    length: int
    network: int = 0  # only tenants with an address of the same network reach it; 0: the rules alone decide
    local: bool = False  # of a network of this host alone: it answers nobody who comes by a device


def parse_own(text: str) -> Own:
    """`--ip ADDR`: an own address from which every connection leaves.

    Raises UsageError for an address that no host can have.
    """
    address = parse_address(text)
    check_own(address)
    return Own(address, Address(ANY4 if address.v4 else ANY6), 0)


def check_families(owned: list[Own]) -> None:
    """Raise UsageError for two addresses of one family: a wildcard bind can go to one address only."""
    for v4 in (True, False):
        same = [str(own.address) for own in owned if own.address.v4 == v4]
        if len(same) > 1:
            raise UsageError(f"{' and '.join(same)} are of one family", hint="one address of each")


def check_own(address: Address) -> None:
    """Raise UsageError unless @address is a unicast address that is neither loopback nor link-local."""
    raw = address.raw
    v4 = int.from_bytes(raw[12:], "big")
    wrong = ""
    if address.any:
        wrong = "is the wildcard"
    elif address.loopback or raw.startswith(SLICE6_PREFIX):
        wrong = "is a loopback address"
    elif in_names(address):
        wrong = "stands for the name of an endpoint"
    elif (address.v4 and (v4 >> 28 >= 0xE or v4 >> 24 == 0)) or raw[0] == 0xFF:
        wrong = "is not an address of one host"
    elif address.link_local:
        wrong = "is a link-local address"
    if wrong:
        raise UsageError(f"{address} {wrong}", hint="an address of the container's own, like 10.88.0.5")


def network_of(text: str, network: int, within: str = "") -> Own:
    """Parse ADDR/LEN, as engines give it: the address, and the destinations to which connections leave from it.

    Those are the network of ADDR/LEN, or the network of PREFIX/LEN in @within, if that is of the same family.
    @network is the number of the engine's network, which is of this host alone without @within. Raises UsageError.
    """
    if within and ("." in within) == ("." in text):
        own, wide = network_of(text, network), network_of(within, network)
        return own._replace(prefix=wide.prefix, length=wide.length, local=False)
    bare, slash, length_text = text.partition("/")
    address = parse_address(bare)
    longest = address.bits
    if not slash or not length_text.isascii() or not length_text.isdigit() or int(length_text) > longest:
        raise UsageError(f"'{text}' is not an address with its prefix length", hint="like 10.77.0.5/16")
    check_own(address)
    length = int(length_text)
    mask = (1 << 128) - (1 << (longest - length))
    prefix = (int.from_bytes(address.raw, "big") & mask).to_bytes(16, "big")
    return Own(address, Address(prefix), length, network, local=not within)
