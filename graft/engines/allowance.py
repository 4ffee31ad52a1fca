"""What containers with a list of destinations are told of names, and the addresses that this pins in the kernel.

Theory of operation

Such a container reaches what its list has (graft/rules/policy.py). Of the addresses on it the kernel knows at once;
of a name it knows what the resolver has answered. So everything that the container sends to port 53 comes to
graft's resolver (csrc/allow.bpf.h), and of each answer this happens, in this order:

    1. It is read, and what does not follow from the question is left out (graft/engines/messages.py).
    2. Addresses that no name may stand for are left out: those of this host, its containers, loopbacks, link-local
       ones, groups. Whoever owns an allowed name could lead the container there else (DNS rebinding). An address
       that the list has itself is told; one that stands for the name of an endpoint never is.
    3. What is left is pinned for this container, at the ports of the name, for its TTL and GRACE seconds more.
    4. The answer is sent. So no connection comes before its pin.

The names of the container's own endpoints are answered without an entry: root has given it these.

A query for a name that is not on the list goes to nobody: it is answered NXDOMAIN, and counted. So it carries
nothing out of the container. Names below a wildcard do, to whoever owns the name: docs/policy.md says so.

Where an allowed name is an alias (CNAME), the names that it leads to are allowed for as long, at its ports, because
resolvers inside the container ask for them in turn. It opens no address that the allowed name would not. A name of a
container's is not allowed by that: whoever owns the alias could lead the container to its neighbours.

A pin ends in the kernel, by its time. It is for the container alone. PINS_MAX are one container's, and the one that
was answered longest ago gives way. What of this a graftd that is started again does not know is which names the
pins have.

A container that learns is refused nothing. The resolver remembers which names it has told by which address, the
kernel tells which addresses are reached (LEARNT), and document() has the list that would have allowed it.

Loop and the threads of TCP clients call this; a lock guards the books.
"""

import ipaddress
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from graft.engines.messages import (
    SIZES,
    Answer,
    addresses_told,
    as_asked,
    nothing,
    parse_answer,
    refusal,
    text_of,
    wire,
    written,
)
from graft.engines.names import AAAA, PTR, A, Names, failure, is_query, pointed_at, question, question_end, response
from graft.kernel.denials import Event
from graft.kernel.programs import Kernel
from graft.log import log
from graft.rules.address import MAPPED, Address
from graft.rules.endpoint_names import SUFFIX
from graft.rules.policy import NO_PORTS, Policy
from graft.rules.slices import in_names, in_slices
from graft.rules.tables import PIN, PINNED_KEY
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

GRACE = 120  # seconds that a program may use an address after its TTL: some look a name up, and connect later
TTL_MAX = 86400  # seconds of a TTL that are believed
PINS_MAX = 16384  # of one container
NAMES_KEPT = 256  # refused names of one container that are counted each; what is beyond is counted together
ENDED_KEPT = 64  # containers that have learnt, after their end
SHOWN = 256  # pins in document()
SVCB, HTTPS = 64, 65  # types whose records have addresses that nobody would pin: programs go by A and AAAA then
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # addresses of IPv4, by a translator (RFC 6052)
NAT64_LOCAL = ipaddress.ip_network("64:ff9b:1::/48")  # likewise; where in it the IPv4 is each site says (RFC 8215)
# Ports at which programs connect a UDP socket to each address of a name, and send nothing, to learn which they would
# leave from: discard (9) is Go's, 65535 musl's. The C library and Java do so at port 0, which no entry can have.
SORTING = (9, 65535)
SHARED = "not an address for names"


@dataclass
class Refusal:
    """How often a name was refused, when last (seconds since the epoch), and why."""

    count: int = 0
    last: float = 0.0
    why: str = ""


@dataclass
class Book:
    """What is known of one container."""

    # until when, by PINNED_KEY, and the name that was last told by an address; answered longest ago first
    pins: OrderedDict[bytes, int] = field(default_factory=OrderedDict)
    names: OrderedDict[Address, str] = field(default_factory=OrderedDict)
    # names that allowed ones are aliases of: at which ports, until when (monotonic seconds); told longest ago first
    aliases: OrderedDict[str, tuple[frozenset[int], float]] = field(default_factory=OrderedDict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    refused_more: int = 0
    # of a container that learns: all names by each address that it was told, and what it has reached
    told: dict[Address, dict[str, None]] = field(default_factory=dict)
    reached: dict[tuple[Address, int], None] = field(default_factory=dict)
    sorted: dict[tuple[Address, int], None] = field(default_factory=dict)  # at ports of SORTING, by UDP


class Allowance:
    """The books of all containers with a list."""

    def __init__(self, registry: Registry, kernel: Kernel, names: Names) -> None:
        self.registry = registry
        self.kernel = kernel
        self.names = names
        self.books: dict[int, Book] = {}
        self.hosts: Collection[Address] = ()  # the addresses of the host's devices
        self.ended: dict[str, dict[str, Any]] = {}  # what containers had learnt that have ended, the last ones
        self.lock = threading.Lock()

    def restore(self) -> None:
        """Take over the pins that an earlier graftd has left, and delete those of no container. Raises OSError."""
        pinned = self.kernel.maps["pinned"]
        for key in list(pinned.keys(PINNED_KEY.size)):
            tenant = self.registry.tenants.get(PINNED_KEY.unpack(key)[0])
            value = pinned.get(key)
            if tenant and tenant.policy and value:
                book = self._book(tenant)
                book.pins[key] = PIN.unpack(value)[0]
                book.names.setdefault(Address(PINNED_KEY.unpack(key)[2]), "")
            else:
                pinned.delete(key)

    def forget(self, tenant: Tenant) -> None:
        """Forget a container that has ended, and its pins. Raises OSError."""
        with self.lock:
            book = self.books.pop(tenant.id, None) or Book()
            if tenant.policy and tenant.policy.learns:
                self.ended[tenant.name] = {**_learnt(book), "running": False}
                while len(self.ended) > ENDED_KEPT:
                    del self.ended[next(iter(self.ended))]
        for key in book.pins:
            self.kernel.maps["pinned"].delete(key)

    def know_hosts(self, addresses: Collection[Address]) -> None:
        """Note which addresses the host has. Pins at those that are new end: nobody could be named there any more.

        Whoever owns an allowed name could have told the address of a container that was to come. A neighbour's name
        stays, as a container that is started again has its address. Raises OSError.
        """
        new = set(addresses) - set(self.hosts)
        self.hosts = addresses
        for number, book in list(self.books.items()):
            tenant = self.registry.tenants.get(number)
            if tenant is None or tenant.policy is None:
                continue
            foreign = set()
            for address in new & book.names.keys():
                name = book.names[address]
                if not name or address not in self.names.addresses(tenant, name):
                    foreign.add(address)
            with self.lock:
                for key in [key for key in book.pins if foreign and Address(PINNED_KEY.unpack(key)[2]) in foreign]:
                    self._unpin(book, key)

    def sweep(self) -> None:
        """Delete the pins that have ended. Raises OSError."""
        now = time.monotonic_ns()
        with self.lock:
            for book in self.books.values():
                for key in [key for key, until in book.pins.items() if until < now]:
                    self._unpin(book, key)

    # -- queries --

    def answer(self, tenant: Tenant, query: bytes) -> bytes | None:
        """Answer a query on the wire of a container with a policy. None: ask a nameserver, by upstream_query().

        Returns b"" to send none, for what is no DNS query.
        """
        policy = tenant.policy
        if policy is None or not is_query(query):
            return b"" if len(query) < 12 or query[2] & 0x80 else failure(query)
        name, kind = question(query)
        told = self.names.of_endpoint(tenant, query, name, kind)
        if told:
            return told
        if kind == PTR and (address := pointed_at(name)):
            return self._name_of(tenant, policy, query, address)
        if query[question_end(query) - 2 : question_end(query)] != b"\0\1":
            return self._refuse(tenant, query, name, "not of the class IN")
        own = self.names.addresses(tenant, name)
        ports = policy.ports(name) if own else self._ports(tenant, policy, name)
        if not own and name.endswith(f".{SUFFIX}"):  # nobody else knows names there
            return self._refuse(tenant, query, name, "no endpoint and no container")
        if not ports and not any(policy.covers(address) for address in own):
            return self._refuse(tenant, query, name, "not on the list")
        if own:
            self._pin(tenant, policy, name, ports, own, 0)
            records = [a.raw[12:] if a.v4 else a.raw for a in own if a.v4 == (kind == A)]
            return response(query, 0, records if kind in (A, AAAA) else [], kind)
        return nothing(query) if kind in (SVCB, HTTPS) else None

    def _ports(self, tenant: Tenant, policy: Policy, name: str) -> frozenset[int]:
        """The ports at which a container may reach @name, which is none of a container's; 0: all."""
        if policy.learns:
            return frozenset((0,))
        ports, until = self._book(tenant).aliases.get(name, (NO_PORTS, 0.0))
        return policy.ports(name) | (ports if until > time.monotonic() else NO_PORTS)

    def _know_aliases(self, tenant: Tenant, policy: Policy, ports: frozenset[int], answer: Answer) -> None:
        """Note which names an allowed one has been told to be an alias of, at its @ports and for as long as a pin.

        A resolver in the container asks for them in turn. It could do so by the allowed name alone, at less ease.
        """
        if policy.learns or not answer.chain:
            return
        ttl = min(record.ttl for record in answer.chain)
        until = time.monotonic() + min(ttl, TTL_MAX) + GRACE
        book = self._book(tenant)
        with self.lock:
            for name in (text_of(record.data) for record in answer.chain):
                if "?" in name:  # it would stand for others, which would carry what the container likes
                    continue
                known, till = book.aliases.pop(name, (NO_PORTS, 0.0))
                same = known <= ports or till < time.monotonic()
                book.aliases[name] = (ports, until) if same else (known | ports, max(until, till))
                if len(book.aliases) > NAMES_KEPT:
                    book.aliases.popitem(last=False)

    def _name_of(self, tenant: Tenant, policy: Policy, query: bytes, address: Address) -> bytes | None:
        """The name of an address that this container was told by a name, or has as a neighbour's."""
        name = self.names.name_at(tenant, address)
        name = name or self._book(tenant).names.get(address, "")
        if name:
            return response(query, 0, [wire(name)], PTR)
        if policy.learns or policy.covers(address):
            return None
        return self._refuse(tenant, query, str(address), "not on the list")

    def _refuse(self, tenant: Tenant, query: bytes, name: str, why: str) -> bytes:
        book = self._book(tenant)
        with self.lock:
            refusal_ = book.refused.get(name)
            if refusal_ is None and len(book.refused) >= NAMES_KEPT:
                book.refused_more += 1
            else:
                refusal_ = refusal_ or book.refused.setdefault(name, Refusal())
                refusal_.count, refusal_.last, refusal_.why = refusal_.count + 1, time.time(), why
        return refusal(query, f"graft: {name} is refused to {tenant.name}: {why}")

    # -- answers --

    def admit(self, tenant: Tenant, query: bytes, reply: bytes) -> bytes:
        """What a container is told of a nameserver's @reply to its @query; the addresses are pinned when it returns.

        An answer that is malformed becomes SERVFAIL.
        """
        policy = tenant.policy
        name, kind = question(query)
        if policy is None or kind not in (A, AAAA):
            told = [Address(MAPPED + raw if len(raw) == SIZES[A] else raw) for raw in addresses_told(reply)]
            bad = [address for address in told if policy and not self._may_be_told(policy, address)]
            return self._refuse(tenant, query, name, f"{bad[0]} is {SHARED}") if bad else as_asked(query, reply)
        try:
            answer = parse_answer(reply, query)
        except ValueError as error:
            log.debug("names: the answer for %s: %s", name, error)
            return failure(query)
        ports = self._ports(tenant, policy, name)
        self._know_aliases(tenant, policy, ports, answer)
        found = [(Address(MAPPED + r.data if kind == A else r.data), r) for r in answer.records]
        good = [(a, r) for a, r in found if self._may_be_told(policy, a)]
        if found and not good:
            return self._refuse(tenant, query, name, f"{found[0][0]} is {SHARED}")
        ttl = min((record.ttl for _, record in good), default=0)
        self._pin(tenant, policy, name, ports, [address for address, _ in good], ttl)
        return written(query, Answer(*answer[:4], [record for _, record in good], *answer[5:]))

    def _may_be_told(self, policy: Policy, address: Address) -> bool:
        """May an answer from outside have @address, for a container with this policy?"""
        return not in_names(address) and (policy.learns or policy.covers(address) or self._may_be_named(address))

    def _may_be_named(self, address: Address) -> bool:
        """May an allowed name stand for @address? Not for one of this host or its containers, or known here alone."""
        if address.v4:
            known = ipaddress.ip_address(address.raw[12:])
        else:
            six = ipaddress.IPv6Address(address.raw)
            known = ipaddress.IPv4Address(address.raw[12:]) if six in NAT64 else six
        if (
            (known.version == 6 and known in NAT64_LOCAL)
            or known.is_loopback
            or known.is_link_local
            or known.is_multicast
            or known.is_unspecified
            or in_slices(address)
        ):
            return False
        if known.version == 4 and (known.packed[0] == 0 or known.packed[0] >= 240):
            return False
        translated = Address(MAPPED + known.packed) if known.version == 4 else address
        return translated not in self.hosts and self.kernel.maps["holders"].get(translated.raw) is None

    def _pin(
        self,
        tenant: Tenant,
        policy: Policy,
        name: str,
        ports: frozenset[int],
        addresses: Collection[Address],
        ttl: int,
    ) -> None:
        """Pin @addresses for a container. A map that is full is logged: its connections are refused then."""
        book, pinned = self._book(tenant), self.kernel.maps["pinned"]
        until = time.monotonic_ns() + (min(ttl, TTL_MAX) + GRACE) * 1_000_000_000
        with self.lock:
            for address in addresses:
                book.names.pop(address, None)
                book.names[address] = name
                for port in () if policy.learns else ports:
                    key = PINNED_KEY.pack(tenant.id, port, address.raw)
                    later = max(until, book.pins.pop(key, 0))
                    try:
                        pinned.update(key, PIN.pack(later))
                    except OSError as error:
                        log.error("container %s: %s is not pinned: %s", tenant.name, address, error)
                        continue
                    book.pins[key] = later
            while len(book.pins) > PINS_MAX:
                self._unpin(book, next(iter(book.pins)))
            while len(book.names) > PINS_MAX:
                book.names.popitem(last=False)
            if policy.learns and len(book.told) < PINS_MAX:
                for address in addresses:
                    book.told.setdefault(address, {})[name] = None

    def _unpin(self, book: Book, key: bytes) -> None:
        self.kernel.maps["pinned"].delete(key)
        del book.pins[key]

    # -- what is told --

    def learn(self, event: Event) -> None:
        """Note what a container that learns has reached."""
        tenant = self.registry.tenants.get(event.tenant)
        if tenant is None or not event.port:
            return
        book = self._book(tenant)
        sorts = event.protocol == socket.IPPROTO_UDP and event.port in SORTING
        with self.lock:
            found = book.sorted if sorts else book.reached
            if len(found) < PINS_MAX:
                found[Address(event.address), event.port] = None

    def learnt(self, name: str) -> dict[str, Any] | None:
        """What the container @name has reached, or one that has lately ended; None if there is none that learns."""
        tenant = self.registry.by_name(name)
        if tenant and tenant.policy and tenant.policy.learns:
            return {**_learnt(self._book(tenant)), "running": True}
        return self.ended.get(name)

    def name_of(self, tenant: Tenant, address: Address) -> str:
        """The name that a container was last told by @address; "" if none was."""
        book = self.books.get(tenant.id)
        return book.names.get(address, "") if book else ""

    def document(self, tenant: Tenant) -> dict[str, Any] | None:
        """What a container may reach, has been told and was refused, in JSON; None if it has no list."""
        policy = tenant.policy
        if policy is None:
            return None
        book, now = self._book(tenant), time.monotonic_ns()
        with self.lock:
            pins = [(PINNED_KEY.unpack(key), until) for key, until in list(book.pins.items())[-SHOWN:]]
            document: dict[str, Any] = {
                "allow": list(tenant.asked.allow),
                "learn": policy.learns,
                "pinned": [
                    {
                        "name": book.names.get(Address(raw), ""),
                        "address": str(Address(raw)),
                        "port": port,
                        "seconds": max(0, (until - now) // 1_000_000_000),
                    }
                    for (_, port, raw), until in pins
                    if until > now
                ],
                "refused_names": [
                    {"name": name, "count": r.count, "last": r.last, "why": r.why} for name, r in book.refused.items()
                ],
                "refused_names_more": book.refused_more,
            }
            return {**document, **(_learnt(book) if policy.learns else {})}

    def _book(self, tenant: Tenant) -> Book:
        return self.books.setdefault(tenant.id, Book())


def _learnt(book: Book) -> dict[str, Any]:
    """What would have to be allowed, and names that were looked up beside that.

    Which of an address's names a connection was meant for nobody knows: it is all of them.
    """
    names: set[str] = set()

    def entries(destinations: dict[tuple[Address, int], None]) -> list[str]:
        found: set[str] = set()
        for address, port in list(destinations):
            of_address = book.told.get(address, ())
            names.update(of_address)
            found.update([f"{name}:{port}" for name in of_address] or [address.with_port(port)])
        return sorted(found)

    told = {"reached": entries(book.reached), "sorted": entries(book.sorted)}
    looked_up = {name for of_address in book.told.values() for name in of_address}
    return {**told, "looked_up": sorted(looked_up - names)}
