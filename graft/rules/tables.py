"""Compile rules and endpoints to entries of the BPF maps. Nothing here has a side effect.

Theory of operation

Ingress rules name port ranges, but a BPF hash map has no ranges. So they are kept in a longest-prefix-match trie
(BPF_MAP_TYPE_LPM_TRIE) whose last 16 key bits are the port: a range becomes at most 30 prefixes. The trie prefers
the longer prefix, but of two ranges that overlap the rule given first shall win, as in AF_GRAFT. So overlaps are cut
here, and the trie holds disjoint ranges. Egress rules need no cutting: the longest prefix shall win, and of two equal
prefixes the first.

The BPF programs cannot exchange the socket that socket(2) gave. Endpoints of type unix, and those in another
namespace, need another socket, so graftd decides those calls. It looks the endpoint up with `match_ingress` and
`match_egress`, which must decide as the entries do (tests/unit/rules/test_tables.py compares them).

The layouts are those of csrc/abi.h; tests/unit/kernel/test_layout.py compares them.
"""

import socket
import struct
from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import NamedTuple

from graft.rules.address import ANY4, ANY6, Address
from graft.rules.endpoint import DEFAULT_SOURCE, EgressRule, Endpoint, IngressRule
from graft.rules.endpoint_names import by_address
from graft.rules.own_address import Own
from graft.rules.policy import Policy
from graft.rules.slices import SLICE6_PREFIX

TENANT_EGRESS = 1
TENANT_STRICT = 2
TENANT_REPLIES = 4
TENANT_HOME = 8
TENANT_VERBOSE = 16
TENANT_SERVES4 = 32
TENANT_SERVES6 = 64
TENANT_ABROAD = 128
TENANT_DIRECT = 256
TENANT_PLAIN = 512
TENANT_ALLOW = 1024
TENANT_LEARN = 2048
TENANT_NAMES = 4096
TENANT_WATCHED = 8192
TENANT_PACED = 16384

DEFAULT = 1
INET = 4
INET6 = 6
PLACE_UNIX = 0xFFFFFFFF
PLACE_NOWHERE = 0xFFFFFFFE
HOLDER_LOCAL = 1
HOLDER_DEVICE = 2

INGRESS_KEY = struct.Struct("=IIBBH16s2s2x")
INGRESS_VALUE = struct.Struct("=16sHHIII")
EGRESS_KEY = struct.Struct("=III16s")
EGRESS_VALUE = struct.Struct("=16sII")
ALLOWED_KEY = struct.Struct("=III16s")
ENDPOINT_KEY = struct.Struct("=I16s")
ENDPOINT = struct.Struct("=16sII")
ENDPOINT_OF_USER = 0x10000
PINNED_KEY = struct.Struct("=II16s")
PIN = struct.Struct("=Q")
SERVICE_KEY = struct.Struct("=IH2x16s")
OWNER = struct.Struct("=IIII")
LED_KEY = struct.Struct("=I16s2s2x")
LED = struct.Struct("=I16sHH")
INGRESS_FIXED_BITS = 32 + 32 + 128
EGRESS_FIXED_BITS = 64
ALLOWED_FIXED_BITS = 64
LED_FIXED_BITS = 128

SERVICE_PLAIN = 1
SERVICE_NAMED = 2
DNS_PORT = 53
NO_INGRESS = INGRESS_VALUE.pack(ANY6, 0, 0, 0, PLACE_NOWHERE, 0)
NO_EGRESS = EGRESS_VALUE.pack(ANY6, 0, PLACE_NOWHERE)
RESOLVER = Address(ANY4[:12] + bytes((127, 0, 0, 11)))  # graft/engines/resolver.py; the address is Docker's as well
RESOLVER6_INDEX = 11
RESOLVER6 = Address(SLICE6_PREFIX + bytes(7) + bytes((RESOLVER6_INDEX,)))  # for containers with a list of names


class Segment(NamedTuple):
    """A port range of one rule that no earlier rule covers; `last` is included."""

    first: int
    last: int
    rule: IngressRule


class Tables(NamedTuple):
    """One tenant's entries in each BPF map, as key and value bytes, and its flags (TENANT_*)."""

    ingress: dict[bytes, bytes]
    egress: dict[bytes, bytes]
    services: dict[bytes, bytes]
    holders: dict[bytes, bytes]
    slices: dict[bytes, bytes]
    allowed: dict[bytes, bytes]
    endpoints: dict[bytes, bytes]
    flags: int

    def maps(self) -> tuple[dict[bytes, bytes], ...]:
        """The entries without the flags, in the order of KEY_SIZES."""
        return self.ingress, self.egress, self.services, self.holders, self.slices, self.allowed, self.endpoints


NOTHING = Tables({}, {}, {}, {}, {}, {}, {}, 0)


KEY_SIZES = (
    ("ingress", INGRESS_KEY.size),
    ("egress", EGRESS_KEY.size),
    ("services", SERVICE_KEY.size),
    ("holders", 16),
    ("slices", 4),
    ("allowed", ALLOWED_KEY.size),
    ("endpoints", ENDPOINT_KEY.size),
)


def port_prefixes(first: int, last: int, width: int = 16) -> list[tuple[int, int]]:
    """The fewest prefixes that cover @first to @last, as (port, number of fixed bits of @width)."""
    prefixes = []
    while first <= last:
        size = first & -first or 1 << width
        while size > last - first + 1:
            size >>= 1
        prefixes.append((first, width + 1 - size.bit_length()))
        first += size
    return prefixes


class Intervals:
    """A set of port ranges, kept disjoint and sorted."""

    def __init__(self) -> None:
        self.first: list[int] = []
        self.last: list[int] = []

    def claim(self, first: int, last: int) -> list[tuple[int, int]]:
        """Add @first to @last. Returns the parts that were not in the set, sorted."""
        low = bisect_left(self.last, first)
        high = low
        free = []
        at = first
        while high < len(self.first) and self.first[high] <= last:
            if self.first[high] > at:
                free.append((at, self.first[high] - 1))
            at = self.last[high] + 1
            high += 1
        if at <= last:
            free.append((at, last))
        if low < high:
            first, last = min(first, self.first[low]), max(last, self.last[high - 1])
        self.first[low:high] = [first]
        self.last[low:high] = [last]
        return free


def disjoint(rules: Iterable[IngressRule], protocol: int) -> list[Segment]:
    """Cut the rules of one protocol so that each port of an address belongs to the first rule that names it."""
    done: dict[bytes, Intervals] = {}
    return [
        Segment(first, last, rule)
        for rule in rules
        if protocol in rule.protocols
        for first, last in done.setdefault(rule.address.raw, Intervals()).claim(rule.first, rule.last)
    ]


def _place(endpoint: Endpoint) -> int:
    return endpoint.place if endpoint.address else PLACE_UNIX


def _address(endpoint: Endpoint) -> bytes:
    return endpoint.address.raw if endpoint.address else ANY6


def compile_ingress(
    tenant: int, rules: Sequence[IngressRule], endpoints: Mapping[str, Endpoint], led: Container[str] = ()
) -> dict[bytes, bytes]:
    """Entries of the map `ingress`. @led: the endpoints that compile_led() has.

    A rule whose endpoint does not exist, or is not there to serve, has entries that stand for no rule: its ports do
    not fall to a wider one. So has one whose connections are led: its servers are where they were before the move.
    """
    entries = {}
    for protocol in sorted({p for rule in rules for p in rule.protocols}):
        for segment in disjoint(rules, protocol):
            rule = segment.rule
            endpoint = endpoints.get(rule.endpoint)
            value = NO_INGRESS
            moved = rule.endpoint in led and protocol == socket.IPPROTO_TCP
            if endpoint and endpoint.serves and not moved:
                span = endpoint.span if endpoint.span > 1 else 0
                place, exclusive = _place(endpoint), int(endpoint.published)
                value = INGRESS_VALUE.pack(_address(endpoint), endpoint.port, rule.first, span, place, exclusive)
            family = INET if rule.address.v4 else INET6
            for port, bits in port_prefixes(segment.first, segment.last):
                length = INGRESS_FIXED_BITS + bits
                key = INGRESS_KEY.pack(length, tenant, protocol, family, 0, rule.address.raw, port.to_bytes(2, "big"))
                entries[key] = value
    return entries


def compile_led(
    tenant: int, rules: Sequence[IngressRule], endpoints: Mapping[str, Endpoint], led: Container[str]
) -> dict[bytes, bytes]:
    """Entries of the map `led`: what arrives by TCP at the endpoints @led, which were moved to a tenant."""
    entries: dict[bytes, bytes] = {}
    for rule in rules:
        endpoint = endpoints.get(rule.endpoint) if rule.endpoint in led else None
        if not endpoint or not endpoint.serves or not endpoint.address or socket.IPPROTO_TCP not in rule.protocols:
            continue
        asked = bytes(16) if rule.address.any else rule.address.raw
        for port, bits in port_prefixes(endpoint.port, endpoint.port + endpoint.span - 1):
            key = LED_KEY.pack(LED_FIXED_BITS + bits, endpoint.address.raw, port.to_bytes(2, "big"))
            entries.setdefault(key, LED.pack(tenant, asked, endpoint.port, rule.first))
    return entries


def compile_egress(
    tenant: int, rules: Sequence[EgressRule], endpoints: Mapping[str, Endpoint], owned: Iterable[Own], *, host: bool
) -> dict[bytes, bytes]:
    """Entries of the map `egress`. @host: what no rule matches leaves as the host's own connections do.

    A rule whose endpoint does not exist, or is not there to leave from, has an entry that stands for no rule: its
    destinations do not fall to a wider one. Destinations of an own address leave from that address, unless a rule
    matches them.

    The endpoint `default-source`, if there is one, has a key of its own (DEFAULT), which no rule can match: it is
    for sockets of the family AF_GRAFT.
    """
    entries: dict[bytes, bytes] = {}
    for rule in rules:
        endpoint = endpoints.get(rule.endpoint)
        bits = rule.length + (96 if rule.prefix.v4 else 0)
        family = INET if rule.prefix.v4 else INET6
        key = EGRESS_KEY.pack(EGRESS_FIXED_BITS + bits, tenant, family, rule.prefix.raw)
        value = NO_EGRESS
        if endpoint and endpoint.leaves:
            value = EGRESS_VALUE.pack(_address(endpoint), endpoint.port, _place(endpoint))
        entries.setdefault(key, value)
    source = endpoints.get(DEFAULT_SOURCE)
    if source and source.leaves:
        key = EGRESS_KEY.pack(EGRESS_FIXED_BITS, tenant, DEFAULT, bytes(16))
        entries[key] = EGRESS_VALUE.pack(_address(source), source.port, _place(source))
    for own in owned:
        if own.length or host:
            bits = own.length + (96 if own.address.v4 else 0)
            key = EGRESS_KEY.pack(EGRESS_FIXED_BITS + bits, tenant, INET if own.address.v4 else INET6, own.prefix.raw)
            entries.setdefault(key, EGRESS_VALUE.pack(own.address.raw, 0, 0))
    if host:
        for family, raw, bits in ((INET, ANY4, 96), (INET6, ANY6, 0)):
            key = EGRESS_KEY.pack(EGRESS_FIXED_BITS + bits, tenant, family, raw)
            entries.setdefault(key, EGRESS_VALUE.pack(raw, 0, 0))
    return entries


def compile_services(tenant: int, resolvers: Iterable[Address], *, named: bool = False) -> dict[bytes, bytes]:
    """Entries of the map `services`: the host's stub resolvers, which the container may ask for names.

    @named adds graftd's own resolver (graft/engines/resolver.py).
    """
    kinds = dict.fromkeys(resolvers, SERVICE_PLAIN)
    if named:
        kinds[RESOLVER] = SERVICE_NAMED
    return {SERVICE_KEY.pack(tenant, DNS_PORT, a.raw): struct.pack("=I", kind) for a, kind in kinds.items()}


def compile_allowed(tenant: int, policy: Policy) -> dict[bytes, bytes]:
    """Entries of the map `allowed`: the addresses of a policy. Those of its names are pinned when they are known."""
    return {
        ALLOWED_KEY.pack(
            ALLOWED_FIXED_BITS + allow.prefix.length + (96 if allow.prefix.address.v4 else 0),
            tenant,
            allow.port,
            allow.prefix.address.raw,
        ): bytes(4)
        for allow in policy.addresses
    }


def compile_names(
    tenant: int, endpoints: Mapping[str, Endpoint], added: Container[Address] = ()
) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """Entries of the maps `ingress` and `endpoints` for the names of endpoints: where one may serve, and be reached.

    They are those that its programs may use by AF_GRAFT. @added: the addresses of containers, at which an endpoint
    that a user has added serves nobody.
    """
    named = by_address(endpoints)
    rules = [
        IngressRule(address, 0, 65535, e.name)
        for address, e in named.items()
        if e.serves and not (e.by_user and e.address in added)
    ]
    return compile_ingress(tenant, rules, endpoints), {
        ENDPOINT_KEY.pack(tenant, address.raw): ENDPOINT.pack(
            _address(endpoint), endpoint.port | (ENDPOINT_OF_USER if endpoint.by_user else 0), _place(endpoint)
        )
        for address, endpoint in named.items()
        if endpoint.leaves
    }


def compile_holders(tenant: int, owned: Iterable[Own], added: Container[Address]) -> dict[bytes, bytes]:
    """Entries of the map `holders`. @added: the addresses that graft has put on the host."""
    entries: dict[bytes, bytes] = {}
    count = {True: 0, False: 0}
    for own in owned:
        flags = (HOLDER_LOCAL if own.local else 0) | (HOLDER_DEVICE if own.address not in added else 0)
        entries[own.address.raw] = OWNER.pack(tenant, own.network, flags, count[own.address.v4])
        count[own.address.v4] += 1
    return entries


def compile_tables(
    tenant: int,
    endpoints: Mapping[str, Endpoint],
    ingress: Sequence[IngressRule],
    egress: Sequence[EgressRule],
    *,
    slice_number: int,
    egress_host: bool,
    strict: bool,
    direct: bool = False,
    home: bool = False,
    verbose: bool = False,
    watched: bool = False,
    paced: bool = False,
    resolvers: Sequence[Address] = (),
    owned: Sequence[Own] = (),
    added: Container[Address] = (),
    named: bool = False,
    policy: Policy | None = None,
    asks: bool = False,
    led: Container[str] = (),
) -> Tables:
    """All entries and flags of one tenant's policy.

    @egress_host: what no egress rule matches leaves as the host's own connections do. @direct: its programs make
    their sockets. @home: the tenant's namespace
    is the host's own, whose loopback it may reach anyway. @added: as compile_holders(). @named: graftd's resolver has
    names for it. @policy: what it is allowed to reach, of that; None: all. @asks: its queries for names go to graftd.
    @led: as compile_ingress().
    """
    out = compile_egress(tenant, egress, endpoints, owned, host=egress_host)
    leaves = any(value != NO_EGRESS for value in out.values())
    flags = (TENANT_EGRESS if leaves else 0) | (TENANT_STRICT if strict else 0)
    flags |= (TENANT_HOME if home else 0) | (TENANT_VERBOSE if verbose else 0) | (TENANT_DIRECT if direct else 0)
    flags |= (TENANT_WATCHED if watched else 0) | (TENANT_PACED if paced else 0)
    if not egress_host:
        flags |= TENANT_REPLIES
    elif direct and not (egress or owned or strict or verbose or watched or paced or home or policy or asks):
        flags |= TENANT_PLAIN
    if policy:
        flags |= TENANT_ALLOW | (TENANT_LEARN if policy.learns else 0)
    flags |= TENANT_NAMES if asks or policy else 0
    entries = compile_ingress(tenant, ingress, endpoints, led)
    binds, destinations = compile_names(tenant, endpoints, added)
    return Tables(
        entries | binds,
        out,
        compile_services(tenant, () if policy or asks else resolvers, named=named),
        compile_holders(tenant, owned, added),
        {slice_number.to_bytes(4, "little"): tenant.to_bytes(4, "little")},
        compile_allowed(tenant, policy) if policy else {},
        destinations,
        flags | _serves(entries) | (TENANT_ABROAD if _goes_abroad(out, owned) else 0),
    )


def _goes_abroad(entries: Mapping[bytes, bytes], owned: Sequence[Own]) -> bool:
    """Does something leave from another address than the tenant's own, all of which are known on this host alone?"""
    own = {o.address.raw for o in owned}
    sources = {EGRESS_VALUE.unpack(value)[0] for value in entries.values() if value != NO_EGRESS}
    return bool(owned) and all(o.local for o in owned) and bool(sources - own)


def _serves(entries: Mapping[bytes, bytes]) -> int:
    """The flags that say in which families a UDP port is published at each address of the host's."""
    flags = 0
    for key, value in entries.items():
        address, _, _, _, place, _ = INGRESS_VALUE.unpack(value)
        if INGRESS_KEY.unpack(key)[2] == socket.IPPROTO_UDP and address in (ANY4, ANY6) and not place:
            flags |= TENANT_SERVES4 if address == ANY4 else TENANT_SERVES6
    return flags
