"""Names of containers on networks, as DNS answers."""

import json
import os
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graft.log import log
from graft.rules.address import Address
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

if TYPE_CHECKING:
    import dns.name

TTL = 5  # seconds; short, because containers come and go


QUERY_MAX = 512  # bytes: header 12, question at most 259, the rest for an OPT record
NAME_MAX = 255  # bytes of a name on the wire (RFC 1035, 2.3.4)


def docker_names(known: dict[str, Any]) -> list[str]:
    """Return a container's name, host name and aliases. @known: Docker's config.v2.json, parsed."""
    found = [str(known.get("Name", "")).lstrip("/"), (known.get("Config") or {}).get("Hostname") or ""]
    for network in ((known.get("NetworkSettings") or {}).get("Networks") or {}).values():
        for key in ("Aliases", "DNSNames"):
            found += (network or {}).get(key) or []
    return found


def failure(query: bytes) -> bytes:
    """Return a SERVFAIL response to a query, which need not be well-formed."""
    return query[:2] + b"\x81\x82" + bytes(8)


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
    return struct.unpack(">4H", query[4:12]) in ((1, 0, 0, 0), (1, 0, 0, 1)) and bool(question_end(query))


class Names:
    """The names of containers that share a network, and the responses that tell them.

    The loop and the threads of TCP clients call it: it reads copies of what the loop may change meanwhile.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.files: dict[str, tuple[int, list[str]]] = {}  # Docker's: modification time, names

    def answer(self, tenant: Tenant, query: bytes) -> bytes | None:
        """Answer a query on the wire from the names of the tenant's networks.

        Returns the reply; b"" to send none, for what is no DNS query; None to forward the query. Raises nothing:
        a query that cannot be parsed is answered with SERVFAIL.
        """
        import dns.exception

        if not is_query(query):
            return b"" if len(query) < 12 or query[2] & 0x80 else failure(query)
        try:
            return self._answer(tenant, query)
        except (dns.exception.DNSException, ValueError) as error:
            log.debug("names: %s: %s", tenant.name, error)
            return failure(query)

    def _answer(self, tenant: Tenant, query: bytes) -> bytes | None:
        import dns.flags
        import dns.message
        import dns.rcode
        import dns.rdatatype
        import dns.reversename
        import dns.rrset

        message = dns.message.from_wire(query)
        question = message.question[0]
        reply = dns.message.make_response(message)
        reply.flags |= dns.flags.RA
        name = question.name.to_text(omit_final_dot=True).lower()
        found: list[str] = []
        if question.rdtype == dns.rdatatype.PTR:
            found = [f"{n}." for n in self._names_at(tenant, question.name, dns.reversename.to_address)]
        addresses = self._addresses(tenant, name) if not found else []
        if question.rdtype in (dns.rdatatype.A, dns.rdatatype.AAAA):
            found = [str(a) for a in addresses if a.v4 == (question.rdtype == dns.rdatatype.A)]
        if found:
            reply.answer.append(dns.rrset.from_text_list(question.name, TTL, "IN", question.rdtype, found))
            return reply.to_wire()
        if addresses:
            return reply.to_wire()  # the name exists, but has no record of this type: NOERROR, no answer
        if not tenant.egress_host:
            reply.set_rcode(dns.rcode.NXDOMAIN)  # it may not connect as the host does: no names of the outside
            return reply.to_wire()
        return None

    def _neighbours(self, tenant: Tenant) -> list[tuple[Tenant, list[Address]]]:
        """Return the tenants that share a network with @tenant, itself included, with their addresses there."""
        networks = {attachment.network for attachment in tenant.attached}
        found = []
        for other in list(self.registry.tenants.values()):  # a copy: threads of TCP clients run this as well
            addresses = [o.address for a in list(other.attached) if a.network in networks for o in a.addresses]
            if addresses:
                found.append((other, addresses))
        return found

    def _addresses(self, tenant: Tenant, name: str) -> list[Address]:
        found = []
        for other, addresses in self._neighbours(tenant):
            if name in self.of(other):
                # a server's socket is bound to one address; if the container has both families, to the IPv4 one
                found += [a for a in addresses if a.v4] or addresses
        return found

    def _names_at(
        self, tenant: Tenant, pointer: "dns.name.Name", to_address: Callable[["dns.name.Name"], str]
    ) -> list[str]:
        try:
            text = to_address(pointer)
        except Exception:  # dnspython raises any of a dozen types for a name that is no address
            return []
        for other, addresses in self._neighbours(tenant):
            if text in map(str, addresses):
                return [other.name]
        return []

    def of(self, tenant: Tenant) -> set[str]:
        """Return all names of a container, in lower case."""
        found = {n for attachment in tenant.attached for n in attachment.names}
        for number, member in tenant.members.items():
            found |= {member.name, number[:12]}
            if member.directory:
                found.update(self._docker_names(member.directory))
        return {n.lower() for n in found if n}

    def _docker_names(self, directory: str) -> list[str]:
        """Return the names in config.v2.json in Docker's @directory. It is cached until its mtime changes."""
        path = f"{directory}/config.v2.json"
        try:
            changed = os.stat(path).st_mtime_ns
            if self.files.get(path, (0, []))[0] != changed:
                with open(path, "rb") as file:
                    self.files[path] = (changed, docker_names(json.load(file)))
        except (OSError, ValueError):
            self.files.pop(path, None)
        return self.files.get(path, (0, []))[1]
