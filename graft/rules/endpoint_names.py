"""Names of endpoints for programs that know nothing of graft: NAME.graft, and the address that stands for it. Pure.

A program that is told an address by DNS binds or connects to it. So each endpoint has an address that stands for its
name: of NAMES4 for one of type ipv4, unix or local, of NAMES6 for one of type ipv6. A bind there is one to the
endpoint, a connection there goes to it, whatever the port. Nothing else has these addresses, and no packet has them:
NAMES4 is of 240.0.0.0/4, which nobody routes (RFC 1112, 4), NAMES6 is beside the slices.

The address is a hash of the name, and nothing is remembered. So an endpoint that is deleted and added again has the
address that programs still hold, also after a restart of graftd. Of two names with one hash (4 million there are of
IPv4) the endpoint that was added first is told, and the other has no name; so it is with names that differ in upper
case alone, which are one to DNS. Publications have none, nor has what is beyond NAMED_MAX of a table.

One of type unix or local has no address of IPv6: a server that binds all addresses of its name would bind it twice.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from graft.rules.address import ANY4, Address
from graft.rules.endpoint import Endpoint
from graft.rules.slices import NAMES4_MASK, NAMES4_NET, NAMES6_PREFIX, in_names

SUFFIX = "graft"
NAMED_MAX = 1024  # endpoints of a table, those that were added first: each of its wrappers has entries for each
KNOWN_MAX = 256  # tables
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_.")
FNV_PRIME, FNV_BASIS = 0x100000001B3, 0xCBF29CE484222325  # FNV-1a of 64 bits (draft-eastlake-fnv)


@lru_cache(maxsize=4096)
def _address(name: str, six: bool) -> Address:
    number = FNV_BASIS
    for byte in name.encode():
        number = (number ^ byte) * FNV_PRIME & (1 << 64) - 1
    if six:
        return Address(NAMES6_PREFIX + number.to_bytes(8, "big"))
    number ^= number >> 32
    return Address(ANY4[:12] + (NAMES4_NET | number & ~NAMES4_MASK & 0xFFFFFFFF).to_bytes(4, "big"))


def label_of(endpoint: Endpoint) -> str:
    """The endpoint's name as DNS has it, without the suffix; "" if it has none."""
    name = endpoint.name.lower()
    labels = name.split(".")
    if endpoint.published or not PLAIN.issuperset(name) or not all(labels):
        return ""
    return name


def address_of(endpoint: Endpoint) -> Address | None:
    """The address that stands for the endpoint's name; None if it has no name that DNS knows."""
    label = label_of(endpoint)
    return _address(label, endpoint.kind == "ipv6") if label else None


class Named(NamedTuple):
    """The endpoints of a table that have a name."""

    all: tuple[Endpoint, ...]  # of the table; they are kept, so that nothing else is at their place in memory
    addresses: dict[Address, Endpoint]
    labels: dict[str, Address]


_known: dict[tuple[int, ...], Named] = {}  # by the places of a table's endpoints, which never change themselves


def named(endpoints: Mapping[str, Endpoint]) -> Named:
    """The endpoints of a table by the addresses that stand for their names. The first that was added wins.

    Each query for a name asks, and to compute a thousand addresses takes 2 ms.
    """
    every = tuple(endpoints.values())  # a copy: other threads than the loop's ask
    key = tuple(map(id, every))
    known = _known.get(key)
    if known:
        return known
    found: dict[Address, Endpoint] = {}
    labels: dict[str, Address] = {}
    for endpoint in every:
        if len(found) == NAMED_MAX:
            break
        address = address_of(endpoint)
        if address and address not in found and (label := label_of(endpoint)) not in labels:
            found[address] = endpoint
            labels[label] = address
    if len(_known) >= KNOWN_MAX:
        _known.clear()
    known = _known[key] = Named(every, found, labels)
    return known


def by_address(endpoints: Mapping[str, Endpoint]) -> dict[Address, Endpoint]:
    """The endpoints of a table that have a name, by the address that stands for it."""
    return named(endpoints).addresses


def endpoint_at(endpoints: Mapping[str, Endpoint], address: Address) -> Endpoint | None:
    """The endpoint of a table that @address stands for; None if it stands for none."""
    return by_address(endpoints).get(address) if in_names(address) else None


def endpoint_named(endpoints: Mapping[str, Endpoint], name: str) -> tuple[Address, Endpoint] | None:
    """The endpoint that is called @name, in lower case and with the suffix, and its address."""
    label = name.removesuffix(f".{SUFFIX}")
    if label == name:
        return None
    known = named(endpoints)
    address = known.labels.get(label)
    return (address, known.addresses[address]) if address else None


def names_need_swap(endpoints: Mapping[str, Endpoint], place: int) -> bool:
    """Does a name stand for an endpoint that needs another socket than one of @place?"""
    return any(e.address is None or e.place != place for e in by_address(endpoints).values())
