"""Names of containers on networks, as DNS answers (RFC 1035).

A name is told to who shares the network that it was given in. A container's own name, host name and short id hold on
each of its networks. An alias holds on one: with the address that the container has there. Each is told as NAME and
as NAME.NETWORK, and an address has the latter for its name, as Docker's own resolver has it.

Containers with an address of --ip are on no network, and everybody with a rule may reach them. They are told as
NAME.graft, to containers that are on no network either.

Endpoints of a container's own table are NAME.graft to it, by the address that stands for the name
(graft/rules/endpoint_names.py). Root has added them for this container, and any container may be called so: an
endpoint's name comes before a container's.

Queries come from hostile programs, and cost graftd's time. So a query is checked before it is read, nothing but its
question is, and the names are read from a table that is made again at most every FRESH seconds, and for a name that
is not in it not so often that it would take more than a twentieth of a processor.
"""

import json
import os
import struct
import time
from typing import Any, NamedTuple

from graft.errors import UsageError
from graft.log import log
from graft.rules.address import Address, parse_address
from graft.rules.endpoint_names import SUFFIX, endpoint_at, endpoint_named, label_of
from graft.tenants.attachment import Attachment
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

HERE = ""  # the network of containers that are on none
TTL = 5  # seconds; short, because containers come and go
FRESH = 0.1  # seconds that the table of names is used
SPARE = 20  # so many times what the table takes to make passes before it is made again

SERVICE = "com.docker.swarm.service.name"  # the label of a service's containers

A, PTR, AAAA, OPT = 1, 12, 28, 41  # types of records
SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 2, 3, 4, 5
QUERY_MAX = 512  # bytes: header 12, question at most 259, the rest for an OPT record
NAME_MAX = 255  # bytes of a name on the wire (RFC 1035, 2.3.4)
ANSWERS_MAX = 64  # records, which a datagram has room for
PAYLOAD = 1232  # bytes that graftd says it takes (RFC 6891); what is sent to it is shorter
QUESTION_AT = 0xC00C  # a pointer to the name in the question


class DockerNames(NamedTuple):
    """The names in Docker's config.v2.json."""

    everywhere: list[str]  # on each of its networks
    by_network: dict[str, list[str]]  # by the network's id; "" if Docker has not written that yet
    networks: dict[str, str]  # the networks' names, likewise


def docker_names(known: dict[str, Any]) -> DockerNames:
    """Return a container's name and host name, its service's, and its aliases. @known: config.v2.json, parsed."""
    config = known.get("Config") or {}
    everywhere = [str(known.get("Name", "")).lstrip("/"), config.get("Hostname") or ""]
    service = (config.get("Labels") or {}).get(SERVICE) if known.get("Managed") else None
    if service:  # swarm's own: an image may have the label, and is not `Managed`
        everywhere += [str(service), f"tasks.{service}"]
    by_network: dict[str, list[str]] = {}
    networks: dict[str, str] = {}
    for name, network in ((known.get("NetworkSettings") or {}).get("Networks") or {}).items():
        number = (network or {}).get("NetworkID") or ""
        networks[number] = str(name)
        found = by_network.setdefault(number, [])
        for key in ("Aliases", "DNSNames"):
            found += (network or {}).get(key) or []
    return DockerNames(everywhere, by_network, networks)


def failure(query: bytes) -> bytes:
    """Return a SERVFAIL response to a query, which need not be well-formed.

    It has the question, if there is one: Go's resolver, and others, wait on after a response that has none.
    """
    asked = query[12 : question_end(query)] if query[4:6] == b"\0\1" else b""
    return query[:2] + b"\x81\x82" + bytes((0, 1 if asked else 0)) + bytes(6) + asked


def question_end(query: bytes) -> int:
    """Return the offset of the end of a message's first question; 0 if it is malformed (RFC 1035, 4.1.2)."""
    at = 12
    while at < len(query) and 0 < query[at] < 64:
        at += 1 + query[at]
    return at + 5 if at + 5 <= len(query) and query[at] == 0 and at - 12 < NAME_MAX else 0


def is_query(query: bytes) -> bool:
    """Return whether @query is a standard query of one question and at most an OPT record (RFC 6891).

    Stub resolvers send nothing else. The check bounds what has to be parsed of untrusted input.
    """
    if not 12 <= len(query) <= QUERY_MAX or query[2] & 0xF8:  # these bits: a response, or another opcode
        return False
    return struct.unpack(">4H", query[4:12]) in ((1, 0, 0, 0), (1, 0, 0, 1)) and _ends_well(query)


def _ends_well(query: bytes) -> bool:
    """Is there a question, and after it an OPT record or nothing?"""
    end = question_end(query)
    if not end or not query[11]:
        return end == len(query)
    if len(query) < end + 11:
        return False
    root, kind, length = struct.unpack(">BH6xH", query[end : end + 11])
    return (root, kind) == (0, OPT) and len(query) == end + 11 + length


def question(query: bytes) -> tuple[str, int]:
    """Return the name, in lower case and without the final dot, and the type of record that is asked for.

    @query: one that is_query(). A label that has more than printable ASCII is nobody's name: it becomes "?".
    """
    labels, at = [], 12
    while query[at]:
        label = query[at + 1 : at + 1 + query[at]]
        labels.append(
            label.decode() if label.isascii() and label.decode().isprintable() and b"." not in label else "?"
        )
        at += 1 + query[at]
    return ".".join(labels).lower(), int.from_bytes(query[at + 1 : at + 3], "big")


def response(query: bytes, code: int, records: list[bytes], kind: int) -> bytes:
    """Return the response to a query that is_query(). @code: RCODE. @records: RDATA of records of the type @kind."""
    end = question_end(query)
    extended = query[11]
    header = struct.pack(">2sBB4H", query[:2], 0x80 | query[2] & 1, 0x80 | code, 1, len(records), 0, extended)
    parts = [header, query[12:end]]
    parts += [struct.pack(">3HIH", QUESTION_AT, kind, 1, TTL, len(data)) + data for data in records]
    if extended:
        parts.append(struct.pack(">BHHIH", 0, OPT, PAYLOAD, 0, 0))
    return b"".join(parts)


def _wire(name: str) -> list[bytes]:
    """Return @name on the wire, alone in a list; none if it is no name."""
    labels = [label.encode() for label in name.split(".")]
    whole = b"".join(bytes([len(label)]) + label for label in labels if len(label) < 64) + b"\0"
    return [whole] if all(0 < len(label) < 64 for label in labels) and len(whole) <= NAME_MAX else []


def pointed_at(name: str) -> Address | None:
    """Return the address of a name in in-addr.arpa (RFC 1035, 3.5) or ip6.arpa (RFC 3596, 2.5), or None."""
    labels = name.split(".")
    try:
        if labels[-2:] == ["in-addr", "arpa"] and len(labels) == 6:
            return parse_address(".".join(reversed(labels[:4])))
        if labels[-2:] == ["ip6", "arpa"] and len(labels) == 34 and all(len(label) == 1 for label in labels[:32]):
            return Address(bytes.fromhex("".join(reversed(labels[:32]))))
    except (UsageError, ValueError):
        pass
    return None


def _here(tenant: Tenant) -> str:
    """The network of a container that is on none: a user's own have one in common, and hear of no others."""
    whose = tenant.parent or tenant
    return f"{HERE}@{whose.uid}" if whose.user else HERE


class Told(NamedTuple):
    """What is told on one network."""

    addresses: dict[str, list[tuple[int, Address]]]  # by name: of which tenant, and which
    names: dict[Address, str]


class Names:
    """The names of containers that share a network, and the responses that tell them.

    The loop and the threads of TCP clients call it: it reads copies of what the loop may change meanwhile.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.files: dict[str, tuple[int, DockerNames]] = {}  # Docker's: modification time, names
        self.told: dict[str, Told] = {}  # by network
        self.made = float("-inf")  # monotonic seconds: when that was made
        self.rest = 0.0  # seconds until it may be made again

    def answer(self, tenant: Tenant, query: bytes) -> bytes | None:
        """Answer a query on the wire from the names of the tenant's networks.

        Returns the reply; b"" to send none, for what is no DNS query; None to forward the query. Raises nothing.
        """
        if not is_query(query):
            return b"" if len(query) < 12 or query[2] & 0x80 else failure(query)
        name, kind = question(query)
        told = self.of_endpoint(tenant, query, name, kind)
        if told:
            return told
        records: list[bytes] = []
        addresses: list[Address] = []
        if kind == PTR:
            address = pointed_at(name)
            records = _wire(self.name_at(tenant, address)) if address else []
        if not records:
            addresses = self.addresses(tenant, name)
        if kind in (A, AAAA):
            records = [a.raw[12:] if a.v4 else a.raw for a in addresses if a.v4 == (kind == A)]
        if records or addresses:  # a name that has no record of this type: NOERROR, no answer
            return response(query, 0, records[:ANSWERS_MAX], kind)
        # it may not connect as the host does: no names of the outside; and nobody there has a name of graft's
        if not tenant.egress_host or name.endswith(f".{SUFFIX}"):
            return response(query, NXDOMAIN, [], kind)
        return None

    def of_endpoint(self, tenant: Tenant, query: bytes, name: str, kind: int) -> bytes | None:
        """Answer a query for the name of an endpoint of the tenant's, or for what stands for one.

        @name, @kind: the question() of the query. None: it asks for something else.
        """
        if kind == PTR and (address := pointed_at(name)):
            endpoint = endpoint_at(tenant.endpoints, address)
            if endpoint is None or not tenant.uses(endpoint):
                return None
            return response(query, 0, _wire(f"{label_of(endpoint)}.{SUFFIX}"), kind)
        found = endpoint_named(tenant.endpoints, name)
        if found is None or not tenant.uses(found[1]):
            return None
        address = found[0]
        raw = address.raw[12:] if address.v4 else address.raw
        return response(query, 0, [raw] if kind == (A if address.v4 else AAAA) else [], kind)

    def addresses(self, tenant: Tenant, name: str) -> list[Address]:
        """Return the addresses of the containers that have this @name on a network of @tenant's, there."""
        found = self._addresses(tenant, name)
        return found or (self._addresses(tenant, name) if self._make(self.rest) else [])

    def _addresses(self, tenant: Tenant, name: str) -> list[Address]:
        self._make(max(FRESH, self.rest))
        of_tenant: dict[int, list[Address]] = {}
        for told in self._told_to(tenant):
            for number, address in told.addresses.get(name, ()):
                of_tenant.setdefault(number, []).append(address)
        # a server's socket is bound to one address; if the container has both families, to the IPv4 one
        return [a for each in of_tenant.values() for a in ([a for a in each if a.v4] or each)]

    def name_at(self, tenant: Tenant, address: Address) -> str:
        """Return the name of the container that has @address on a network of @tenant's; "" if none has."""
        self._make(max(FRESH, self.rest))
        return next((told.names[address] for told in self._told_to(tenant) if address in told.names), "")

    def _told_to(self, tenant: Tenant) -> list[Told]:
        networks = dict.fromkeys([attachment.network for attachment in list(tenant.attached)] or [_here(tenant)])
        return [self.told[network] for network in networks if network in self.told]

    def _make(self, age: float) -> bool:
        """Make the table again if it is older than @age seconds. Returns whether it was made."""
        began = time.monotonic()
        if began - self.made < age:
            return False
        told: dict[str, Told] = {}
        for tenant in list(self.registry.tenants.values()):  # a copy: threads of TCP clients run this as well
            for attachment in list(tenant.attached):
                here = told.setdefault(attachment.network, Told({}, {}))
                addresses = [own.address for own in attachment.addresses]
                network = self.network(tenant, attachment)
                for name in self.of(tenant, attachment):
                    for full in (name, f"{name}.{network}"):
                        here.addresses.setdefault(full, []).extend((tenant.id, address) for address in addresses)
                for address in addresses:
                    here.names.setdefault(address, f"{tenant.name}.{network}")
            for own in list(tenant.given):
                own_name = tenant.name.removesuffix(f"@{tenant.user}") if tenant.user else tenant.name
                for network, known in {HERE: tenant.name, _here(tenant): own_name}.items():
                    here = told.setdefault(network, Told({}, {}))
                    name = f"{known}.{SUFFIX}".lower()
                    here.addresses.setdefault(name, []).append((tenant.id, own.address))
                    here.names.setdefault(own.address, name)
        self.told = told
        self.made = time.monotonic()
        self.rest = SPARE * (self.made - began)
        return True

    def network(self, tenant: Tenant, attachment: Attachment) -> str:
        """Return the name of the network of one of a container's attachments, in lower case."""
        for member in list(tenant.members.values()):
            if member.directory:
                networks = self._docker_names(member.directory).networks
                unwritten = networks.get("") if len(networks) == len(tenant.attached) == 1 else None
                found = networks.get(attachment.network) or unwritten
                if found:
                    return found.lower()
        return attachment.network.removeprefix("cni/").lower()  # of Docker the id, while nobody has written the name

    def of(self, tenant: Tenant, attachment: Attachment) -> set[str]:
        """Return the names that a container has on the network of one of its attachments, in lower case."""
        found = set(attachment.names)
        for number, member in list(tenant.members.items()):
            found |= {member.name, number[:12]}
            if member.directory:
                names = self._docker_names(member.directory)
                found.update(names.everywhere, names.by_network.get(attachment.network, ()))
                if len(names.by_network) == len(tenant.attached) == 1:  # not written yet, and there is one choice
                    found.update(names.by_network.get("", ()))
        return {n.lower() for n in found if n}

    def _docker_names(self, directory: str) -> DockerNames:
        """Return the names in config.v2.json in Docker's @directory. It is cached until its mtime changes."""
        path = f"{directory}/config.v2.json"
        try:
            changed = os.stat(path).st_mtime_ns
            if path not in self.files or self.files[path][0] != changed:
                with open(path, "rb") as file:
                    self.files[path] = (changed, docker_names(json.load(file)))
        except (OSError, ValueError) as error:
            log.debug("names: %s: %s", path, error)
            self.files.pop(path, None)
        return self.files.get(path, (0, DockerNames([], {}, {})))[1]
