"""Rules and endpoints → the entries of the kernel's tables, and the decision they stand for. Pure.

The kernel looks ingress rules up in a longest-prefix-match trie whose last 16 bits are the port, so a port
range becomes at most 30 prefixes. Where ranges of one address overlap, the rule given first wins (AF_GRAFT's
order); overlaps are cut here, so that the trie holds disjoint ranges. Egress needs no cutting: longest
prefix wins by itself, and of two equal prefixes the first.

Layouts are those of csrc/graft.h (tests/unit/test_layout.py compares them).
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from graft.endpoint import ANY4, ANY6, Address, EgressRule, Endpoint, IngressRule
from graft.errors import Refused

SLICE_SHIFT = 5
SLICE_DYNAMIC = 16
SLICE_PORT_BASE = 61440
SLICE_SLOTS = 1 << (22 - SLICE_SHIFT)
SLICE4_NET = 0x7F400000
SLICE6_PREFIX = bytes.fromhex("fd67726166740000")
SLICE6_NETWORK = "fd67:7261:6674::/64"

TENANT_EGRESS = 1
TENANT_STRICT = 2
TENANT_REPLIES = 4

INET = 4
INET6 = 6

INGRESS_KEY = struct.Struct("=IIBBH16s2s2x")
INGRESS_VALUE = struct.Struct("=16sHHI")
EGRESS_KEY = struct.Struct("=III16s")
EGRESS_VALUE = struct.Struct("=16sI4x")
SERVICE_KEY = struct.Struct("=IH2x16s")
INGRESS_FIXED_BITS = 32 + 32 + 128
EGRESS_FIXED_BITS = 64

DNS_PORT = 53


class Segment(NamedTuple):
    """A range of one rule that no earlier rule covers."""

    first: int
    last: int
    rule: IngressRule


class Tables(NamedTuple):
    """What one tenant has in the kernel: key → value, and its flags."""

    ingress: dict[bytes, bytes]
    egress: dict[bytes, bytes]
    services: dict[bytes, bytes]
    flags: int

    def maps(self) -> tuple[dict[bytes, bytes], dict[bytes, bytes], dict[bytes, bytes]]:
        """The entries alone, in the order of KEY_SIZES."""
        return self.ingress, self.egress, self.services


KEY_SIZES = (
    ("ingress", INGRESS_KEY.size),
    ("egress", EGRESS_KEY.size),
    ("services", SERVICE_KEY.size),
)


def port_prefixes(first: int, last: int) -> list[tuple[int, int]]:
    """The fewest (port, bits) prefixes that cover first..last: bits of 16 are fixed."""
    prefixes = []
    while first <= last:
        size = first & -first or 1 << 16
        while size > last - first + 1:
            size >>= 1
        prefixes.append((first, 17 - size.bit_length()))
        first += size
    return prefixes


def disjoint(rules: Iterable[IngressRule], protocol: int) -> list[Segment]:
    """Cut the rules of one protocol so that each port of an address belongs to the first that names it."""
    done: dict[bytes, list[tuple[int, int]]] = {}
    segments = []
    for rule in rules:
        if protocol not in rule.protocols:
            continue
        covered = done.setdefault(rule.address.raw, [])
        start = rule.first
        for low, high in sorted(covered):
            if high < start or low > rule.last:
                continue
            if low > start:
                segments.append(Segment(start, low - 1, rule))
            start = high + 1
        if start <= rule.last:
            segments.append(Segment(start, rule.last, rule))
        covered.append((rule.first, rule.last))
    return segments


def compile_ingress(
    tenant: int, rules: Sequence[IngressRule], endpoints: Mapping[str, Endpoint]
) -> dict[bytes, bytes]:
    """Entries of the map `ingress`. A rule whose endpoint is gone compiles to nothing."""
    known = [rule for rule in rules if rule.endpoint in endpoints]
    entries = {}
    for protocol in sorted({p for rule in known for p in rule.protocols}):
        for segment in disjoint(known, protocol):
            rule = segment.rule
            endpoint = endpoints[rule.endpoint]
            span = endpoint.span if endpoint.span > 1 else 0
            value = INGRESS_VALUE.pack(endpoint.address.raw, endpoint.port, rule.first, span)
            family = INET if rule.address.v4 else INET6
            for port, bits in port_prefixes(segment.first, segment.last):
                length = INGRESS_FIXED_BITS + bits
                key = INGRESS_KEY.pack(length, tenant, protocol, family, 0, rule.address.raw, port.to_bytes(2, "big"))
                entries[key] = value
    return entries


def compile_egress(
    tenant: int, rules: Sequence[EgressRule], endpoints: Mapping[str, Endpoint], *, host: bool
) -> dict[bytes, bytes]:
    """Entries of the map `egress`; @host adds a default that leaves as the host routes."""
    entries: dict[bytes, bytes] = {}
    for rule in rules:
        endpoint = endpoints.get(rule.endpoint)
        if endpoint is None:
            continue
        bits = rule.length + (96 if rule.prefix.v4 else 0)
        family = INET if rule.prefix.v4 else INET6
        key = EGRESS_KEY.pack(EGRESS_FIXED_BITS + bits, tenant, family, rule.prefix.raw)
        entries.setdefault(key, EGRESS_VALUE.pack(endpoint.address.raw, endpoint.port))
    if host:
        for family, raw, bits in ((INET, ANY4, 96), (INET6, ANY6, 0)):
            key = EGRESS_KEY.pack(EGRESS_FIXED_BITS + bits, tenant, family, raw)
            entries.setdefault(key, EGRESS_VALUE.pack(raw, 0))
    return entries


def compile_services(tenant: int, resolvers: Iterable[Address]) -> dict[bytes, bytes]:
    """Entries of the map `services`: the host's stub resolvers, which the container may ask."""
    return {SERVICE_KEY.pack(tenant, DNS_PORT, address.raw): struct.pack("=I", 1) for address in resolvers}


def check_rule(rule: IngressRule | EgressRule, endpoints: Mapping[str, Endpoint]) -> None:
    """Refuse a rule that cannot work: an unknown endpoint, or families that do not go together."""
    endpoint = endpoints.get(rule.endpoint)
    if endpoint is None:
        raise Refused(
            f"rule '{rule}' names an unknown endpoint '{rule.endpoint}'",
            hint="add it with 'graft endpoint add'",
            code="ENOENT",
        )
    wanted = rule.address if isinstance(rule, IngressRule) else rule.prefix
    if wanted.v4 != endpoint.address.v4:
        raise Refused(
            f"rule '{rule}' is {wanted.kind}, endpoint '{endpoint.name}' is {endpoint.address.kind}",
            hint="use an endpoint of the rule's family",
            code="EAFNOSUPPORT",
        )


def compile_tables(
    tenant: int,
    endpoints: Mapping[str, Endpoint],
    ingress: Sequence[IngressRule],
    egress: Sequence[EgressRule],
    *,
    egress_host: bool,
    strict: bool,
    resolvers: Sequence[Address] = (),
) -> Tables:
    """Everything that one tenant's policy is in the kernel."""
    out = compile_egress(tenant, egress, endpoints, host=egress_host)
    flags = (TENANT_EGRESS if out else 0) | (TENANT_STRICT if strict else 0)
    if not egress_host:
        flags |= TENANT_REPLIES
    return Tables(
        compile_ingress(tenant, ingress, endpoints),
        out,
        compile_services(tenant, resolvers) if egress_host else {},
        flags,
    )


def slice_address(slot: int, port: int, *, v4: bool = True) -> tuple[Address, int]:
    """Where port @port of a tenant's private loopback is on the host's stack; 0: ports the kernel chooses."""
    index = port >> 12 if port else SLICE_DYNAMIC
    real = SLICE_PORT_BASE | (port & 0xFFF) if port else 0
    if v4:
        return Address(ANY4[:12] + (SLICE4_NET | slot << SLICE_SHIFT | index).to_bytes(4, "big")), real
    return Address(SLICE6_PREFIX + slot.to_bytes(4, "big") + index.to_bytes(4, "big")), real
