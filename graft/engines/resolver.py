"""The resolver for names of containers: a DNS server in graftd, at 127.0.0.11 as Docker's own is (RFC 1035).

Who asks. A container sends its query to 127.0.0.11 on its own loopback. graft's BPF programs let that through to
the host's 127.0.0.11, with a source address in the container's private slice, and that address identifies the
container.

What it knows. The names of the containers that share a network with the one that asks: container name, host name,
aliases and short id. Docker's names are read from Docker's files for each query, because `docker network connect`
can give a running container another network and new aliases.

All other names. The query is forwarded to the container's nameservers (graft/engines/nameservers.py) if its egress
is that of the host. The next one is asked where one refuses, fails, or is silent for EACH seconds; one that was
silent is asked last for a while. Where none answers, the answer is SERVFAIL, at once where nobody is there. Without
such egress the answer is NXDOMAIN.

Containers that may reach a list of names are asked and answered by graft/engines/allowance.py, which also says what
of a nameserver's answer they get. Whatever they send to port 53 comes here, of IPv6 to RESOLVER6.

Where it listens. Networks of CNI use their gateway's address instead of 127.0.0.11, because Podman omits loopback
addresses from resolv.conf.

UDP is served in graftd's loop: a forwarded query has a socket of its own, whose answer the loop waits for. TCP has
threads (graft/engines/conversations.py).

One container must not take the resolver from the others. What it sends beyond its budget is dropped in its own send
(csrc/budget.bpf.h), so that the queue of the UDP socket has room. Of what is limited over all, a container that has
much gives way to one that has little: forwarded queries that wait, and TCP connections.
"""

import errno
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from graft.engines.allowance import Allowance
from graft.engines.conversations import MESSAGE_MAX, Conversations, messages
from graft.engines.messages import addresses_told, cut, refusal, upstream_query
from graft.engines.names import NOTIMP, REFUSED, SERVFAIL, Names, failure, question_end
from graft.engines.nameservers import Nameservers, family_of, where_to_ask
from graft.errors import Failure
from graft.kernel import linux
from graft.kernel.programs import CLIENT_KEY, Kernel
from graft.kernel.stamps import OWN_TENANT, Stamper
from graft.log import log
from graft.process.loop import Loop
from graft.process.store import Store
from graft.rules.address import MAPPED, Address
from graft.rules.slices import SLICE4_NET, SLICE6_PREFIX, SLICE_COUNT, SLICE_GROUP, SLICE_SHIFT, in_names
from graft.rules.tables import DNS_PORT, RESOLVER, RESOLVER6
from graft.tenants.registry import Registry
from graft.tenants.tenant import CONTAINER, Tenant

WAITING_MAX, WAITING_OF_ONE = 1024, 64  # UDP queries that wait for a nameserver: of all containers, of one
PATIENCE = 5.0  # seconds for the nameservers to answer
EACH = 2.0  # seconds: for one nameserver to answer, if there is another
LAST = 10.0  # seconds for which a nameserver that was silent is asked after the others
TOLD = 60.0  # seconds for which the log does not say again that no nameserver answers
SO_RCVBUFFORCE = 33  # socket(7), which Python does not name
QUEUE = 4 << 20  # bytes of the UDP socket's queue: the bursts of ten containers (BUDGET_BURST), or 5,000 queries
BACKLOG = 1024  # TCP connections that wait to be accepted
KEPT = 1.0  # seconds for which the keeper may have a copy of a socket that was given up
STORED = "resolver-"
KNOWN = (RESOLVER, RESOLVER6)  # addresses that are there without being added
UNANSWERED = (SERVFAIL, NOTIMP, REFUSED)  # what says that another nameserver is to be asked, as resolv.conf(5) has it


class Waiting(NamedTuple):
    """A UDP query that was forwarded to a nameserver. `number`: the id it has there; `tenant`: who asked.

    `left`: the nameservers that have not been asked. `until`: when the next one is; `over`: when nobody waits.
    """

    out: socket.socket
    server: str
    tenant: int
    number: bytes
    query: bytes
    client: tuple[str, int]
    udp: socket.socket
    left: list[str]
    until: float  # monotonic seconds
    over: float  # monotonic seconds


def _stored(address: Address, kind: int) -> str:
    """The name of the socket of @kind (SOCK_DGRAM, SOCK_STREAM) at @address in the descriptor store.

    A name there has no colon (sd_listen_fds_with_names(3)).
    """
    return f"{STORED}{'tcp' if kind == socket.SOCK_STREAM else 'udp'}-{str(address).replace(':', '.')}"


class Resolver:
    """The DNS server. It listens while there are attachments to networks.

    Its sockets are in the descriptor store, so that a query which comes while graftd is started again waits in the
    socket. Without one, the stub resolver would be told ECONNREFUSED, and give up at once.
    """

    def __init__(self, loop: Loop, registry: Registry, kernel: Kernel, store: Store) -> None:
        self.loop = loop
        self.registry = registry
        self.store = store
        self.inherited: dict[str, int] = {}
        self.names = Names(registry)
        self.kernel = kernel
        self.places: dict[Address, tuple[socket.socket, socket.socket]] = {}
        self.given_up: dict[Address, float] = {}  # when, in monotonic seconds; not those that could not be had
        self.waiting: dict[int, dict[int, Waiting]] = {}  # by tenant, and by the descriptor that asks, in their order
        self.nameservers = Nameservers()
        self.conversations = Conversations(self._converse)
        self.allowance = Allowance(registry, kernel, self.names)
        self.silent: dict[str, float] = {}  # nameservers, and until when they are asked last (monotonic seconds)
        self.told = float("-inf")  # when the log was told that none answers

    def inherit(self, stored: Iterable[tuple[str, int]]) -> None:
        """Take the sockets of an earlier graftd, by the names that they have in the store; start() uses them."""
        self.inherited = {name: fd for name, fd in stored if name.startswith(STORED)}

    def held(self) -> list[tuple[str, int]]:
        """The sockets by the names that they have in the store."""
        return [
            (_stored(address, sock.type), sock.fileno()) for address, pair in self.places.items() for sock in pair
        ]

    def start(self, *, listed: bool = False) -> None:
        """Listen at the addresses that the attachments' resolv.conf name, or containers with a list are led to, and
        stop at all others. @listed: such a container is about to come.

        An address that cannot be had is logged: its containers have no names of each other.
        """
        attachments = self.registry.attachments.values()
        wanted = {a.resolver or RESOLVER for a in attachments}
        if listed or any(tenant.asks_graft for tenant in self.registry.tenants.values()):
            wanted |= {RESOLVER, RESOLVER6} if self.registry.ipv6 else {RESOLVER}
        for address in self.places.keys() - wanted:
            self._stop(address)
            self.given_up[address] = time.monotonic()
        for address in wanted - self.places.keys():
            try:
                self._listen(address)
            except (OSError, Failure) as error:
                log.error("%s for names of containers: %s", address.with_port(DNS_PORT), error)
                self._stop(address)
        for name, fd in self.inherited.items():  # of an address that no attachment names any more
            self.store.remove(name)
            os.close(fd)
        self.inherited = {}

    def serve(self) -> None:
        """start(), for a container with a list, which reaches nothing by name without. Raises Failure."""
        self.start(listed=True)
        if RESOLVER not in self.places or (self.registry.ipv6 and RESOLVER6 not in self.places):
            raise Failure(
                f"{RESOLVER.with_port(DNS_PORT)} is not to be had for names",
                hint="'ss -lnp sport = :53' says who has it, here or on the wildcard; graftd's log says more",
                code="EADDRINUSE",
            )

    def forget(self, tenant: Tenant) -> None:
        """Forget a container that has ended."""
        for waiting in list(self.waiting.get(tenant.id, {}).values()):
            self._forget(waiting)
        self.conversations.forget(tenant)
        if tenant.asks_graft and tenant.kind == CONTAINER:
            self.allowance.forget(tenant)
            self.start()

    def end(self) -> None:
        """Stop at all addresses, and take those off the host's stack that are there for this."""
        for address in list(self.places):
            self._stop(address)

    def _listen(self, address: Address) -> None:
        if address not in KNOWN:
            self.registry.add_address(address)
            self.registry.reserve(address)
        names = [_stored(address, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)]
        if all(name in self.inherited for name in names):
            udp, tcp = (socket.socket(fileno=self.inherited.pop(name)) for name in names)
            self.places[address] = (udp, tcp)
        else:
            family = family_of(str(address))
            udp, tcp = self._socket(socket.SOCK_DGRAM, family), self._socket(socket.SOCK_STREAM, family)
            self.places[address] = (udp, tcp)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for sock in (udp, tcp):
                if family == socket.AF_INET6:  # no device has an address of the slices
                    sock.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_FREEBIND, 1)
                self._bind(sock, address)
            udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE)
            tcp.listen(BACKLOG)
            for name, sock in zip(names, (udp, tcp), strict=True):  # now: the store drops a socket that hangs up
                self.store.put(name, sock.fileno())
        self.loop.add(udp.fileno(), lambda _events: self._asked(udp))
        self.loop.add(tcp.fileno(), lambda _events: self._called(tcp))

    def _bind(self, sock: socket.socket, address: Address) -> None:
        """Bind a socket. The keeper may not have come to close its copy of the one before. Raises OSError."""
        until = self.given_up.pop(address, float("-inf")) + KEPT
        while True:
            try:
                return sock.bind((str(address), DNS_PORT))
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > until:
                    raise
            self.store.flush()
            time.sleep(0.002)

    def _socket(self, kind: int, family: int = socket.AF_INET) -> socket.socket:
        made = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        self._stamp(made)
        return made

    def _stamp(self, sock: socket.socket) -> None:
        """Make it a socket of graftd's own, which sees the addresses that the host's stack has."""
        Stamper(self.kernel.maps["stamps"]).stamp(sock.fileno(), OWN_TENANT, 0)

    def _stop(self, address: Address) -> None:
        for sock in self.places.pop(address, ()):
            self.store.remove(_stored(address, sock.type))
            if sock.fileno() in self.loop.callbacks:
                self.loop.remove(sock.fileno())
            sock.close()
        if address not in KNOWN:
            self.registry.release(address)
            self.registry.remove_address(address)

    # -- UDP --

    def _asked(self, udp: socket.socket) -> None:
        try:
            query, client = udp.recvfrom(MESSAGE_MAX)
            tenant = self._tenant(client, socket.IPPROTO_UDP)
            if tenant is None:
                return
            reply = self._answer(tenant, query)
            if reply is None:
                self._forward(query, client, udp, tenant)
            elif reply:
                udp.sendto(reply, client)
        except OSError as error:
            log.debug("names: %s", error)

    def _answer(self, tenant: Tenant, query: bytes) -> bytes | None:
        """The answer to a query without asking a nameserver; b"": none at all; None: ask one."""
        return (self.allowance if tenant.policy else self.names).answer(tenant, query)

    def _tell(self, tenant: Tenant | None, query: bytes, reply: bytes) -> bytes:
        """What the client is told of a nameserver's @reply."""
        if tenant and tenant.policy:
            return self.allowance.admit(tenant, query, reply)
        if any(in_names(Address(raw if len(raw) == 16 else MAPPED + raw)) for raw in addresses_told(reply)):
            return refusal(query, "graft: an address of the answer stands for the name of an endpoint")
        return query[:2] + reply[2:]

    def _forward(self, query: bytes, client: tuple[str, int], udp: socket.socket, tenant: Tenant) -> None:
        """Forward a query to the container's nameservers. A query that waits gives way if there are too many."""
        own = self.waiting.get(tenant.id, {})
        if len(own) >= WAITING_OF_ONE:
            self._forget(next(iter(own.values())))
        elif sum(map(len, self.waiting.values())) >= WAITING_MAX:
            self._forget(next(iter(max(self.waiting.values(), key=len).values())))  # who has most gives way
        self._send(query, client, udp, tenant.id, self.nameservers.of(tenant), time.monotonic() + PATIENCE)

    def _send(
        self, query: bytes, client: tuple[str, int], udp: socket.socket, tenant: int, servers: list[str], over: float
    ) -> None:
        """Send a query to the first of these nameservers that takes it. Reply SERVFAIL if none does.

        Each query has its own socket: to forge an answer takes its port and its id (RFC 5452).
        """
        servers = self._ordered(servers)
        of = self.registry.tenants.get(tenant)
        asks = upstream_query(query) if of and of.policy else query
        for asked, server in enumerate(servers, 1):
            number = secrets.token_bytes(2)
            out = self._socket(socket.SOCK_DGRAM, family_of(server))
            try:
                out.connect(where_to_ask(server))
                out.send(number + asks[2:])
            except OSError as error:
                log.debug("nameserver %s: %s", server, error)
                out.close()
                continue
            left = servers[asked:]
            until = min(over, time.monotonic() + EACH) if left else over
            waiting = Waiting(out, server, tenant, number, query, client, udp, left, until, over)
            self.waiting.setdefault(tenant, {})[out.fileno()] = waiting
            self.loop.add(out.fileno(), partial(self._heard, waiting))
            return
        self._unanswered(of)
        udp.sendto(failure(query), client)

    def _unanswered(self, tenant: Tenant | None) -> None:
        """Say in the log that no nameserver answers, not too often."""
        if tenant and self.told + TOLD < time.monotonic():
            self.told = time.monotonic()
            servers = ", ".join(self.nameservers.of(tenant)) or "none is known"
            log.warning("no nameserver answers (%s): container %s is told SERVFAIL", servers, tenant.name)

    def _heard(self, waiting: Waiting, _events: int) -> None:
        try:
            reply = waiting.out.recv(MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError as error:  # ECONNREFUSED: nobody is there
            log.debug("names: %s", error)
            self._ask_next(waiting)
            return
        self.silent.pop(waiting.server, None)
        question = waiting.query[12 : question_end(waiting.query)]
        bare = len(reply) == 12 and reply[3] & 0xF  # some say what is wrong, and nothing else
        if reply[:2] != waiting.number or not (bare or reply[12 : 12 + len(question)].lower() == question.lower()):
            return  # an answer to something else; the right one may still come
        if bare:
            reply = reply[:4] + b"\0\1" + bytes(6) + question  # which clients look for
        if reply[3] & 0xF in UNANSWERED and waiting.left:
            self._ask_next(waiting)
            return
        self._forget(waiting)
        of = self.registry.tenants.get(waiting.tenant)
        reply = self._tell(of, waiting.query, reply)
        waiting.udp.sendto(cut(waiting.query, reply) if of and of.policy else reply, waiting.client)

    def _ask_next(self, waiting: Waiting) -> None:
        self._forget(waiting)
        self._send(waiting.query, waiting.client, waiting.udp, waiting.tenant, waiting.left, waiting.over)

    def expire(self) -> None:
        """Ask the next nameserver where one is silent, and drop what none has answered within PATIENCE seconds."""
        now = time.monotonic()
        for waiting in [w for own in self.waiting.values() for w in own.values() if w.until < now]:
            try:
                self.silent[waiting.server] = now + LAST
                if now < waiting.over:
                    self._ask_next(waiting)
                else:
                    self._forget(waiting)
                    self._unanswered(self.registry.tenants.get(waiting.tenant))
                    waiting.udp.sendto(failure(waiting.query), waiting.client)
            except OSError as error:
                log.debug("names: %s", error)

    def _forget(self, waiting: Waiting) -> None:
        own = self.waiting.get(waiting.tenant, {})
        if own.pop(waiting.out.fileno(), None):
            self.loop.remove(waiting.out.fileno())
            waiting.out.close()
        if not own:
            self.waiting.pop(waiting.tenant, None)

    # -- TCP --

    def _called(self, tcp: socket.socket) -> None:
        try:
            peer, _ = tcp.accept()
        except OSError:
            return
        try:
            self._stamp(peer)  # what accept(2) has told is the address as a container sees it
            client = peer.getpeername()
        except OSError:  # it has gone
            peer.close()
            return
        tenant = self._tenant(client, socket.IPPROTO_TCP)
        if tenant is None:
            peer.close()
        else:
            self.conversations.begin(peer, tenant)

    def _converse(self, tenant: Tenant, query: bytes) -> bytes:
        """The answer to a query that came over TCP; b"": none at all. Threads call it."""
        reply = self._answer(tenant, query)
        if reply is None:
            asks = upstream_query(query) if tenant.policy else query
            found = self._relay(asks, self.nameservers.of(tenant))
            reply = self._tell(tenant, query, found) if found else failure(query)
            if not found:
                self._unanswered(tenant)
        return reply

    def _relay(self, query: bytes, servers: Iterable[str]) -> bytes:
        """What the first of these nameservers that answers says, else what one has said; b"": nothing at all."""
        reply, over, ordered = b"", time.monotonic() + PATIENCE, self._ordered(servers)
        for asked, server in enumerate(ordered, 1):
            until = min(over, time.monotonic() + EACH) if asked < len(ordered) else over
            try:
                with self._socket(socket.SOCK_STREAM, family_of(server)) as out:
                    out.settimeout(max(until - time.monotonic(), 0.001))
                    out.connect(where_to_ask(server))
                    out.sendall(struct.pack(">H", len(query)) + query)
                    reply = next(messages(out, until - time.monotonic()), b"") or reply
            except TimeoutError:
                self.silent[server] = time.monotonic() + LAST
            except (OSError, ValueError) as error:
                log.debug("nameserver %s: %s", server, error)
            else:
                if len(reply) >= 12 and reply[3] & 0xF not in UNANSWERED:
                    break
        return reply if len(reply) >= 12 else b""

    def _ordered(self, servers: Iterable[str]) -> list[str]:
        """Nameservers in the order in which they are asked: those that were silent come last."""
        now = time.monotonic()
        return sorted(servers, key=lambda server: self.silent.get(server, 0.0) > now)

    # -- who asks --

    def _tenant(self, client: tuple[str, int], kind: int) -> Tenant | None:
        """Return the tenant that sent from @client, or None. @kind: IPPROTO_UDP or IPPROTO_TCP.

        The source is in the tenant's private slice, or is an address of its own. From any other source, the map
        `client_ports` has the tenant by protocol and source port.
        """
        registry = self.registry
        if ":" in client[0]:
            raw = socket.inet_pton(socket.AF_INET6, client[0])
            if raw.startswith(SLICE6_PREFIX):
                number = int.from_bytes(raw[8:12], "big")
                return next((t for t in registry.tenants.values() if t.slice_number == number), None)
        else:
            raw = MAPPED + socket.inet_aton(client[0])
            slice_number = (int.from_bytes(raw[12:], "big") ^ SLICE4_NET) >> SLICE_SHIFT
            if 0 <= slice_number < SLICE_COUNT:
                first = slice_number - slice_number % SLICE_GROUP
                for tenant in registry.tenants.values():
                    if tenant.slice_number == slice_number or (tenant.wide and tenant.slice_number == first):
                        return tenant
                return None
        address = Address(raw)
        for tenant in registry.tenants.values():
            if any(own.address == address for own in tenant.owned):
                return tenant
        return self._noted(client, kind)

    def _noted(self, client: tuple[str, int], kind: int) -> Tenant | None:
        """The tenant that has noted the source port of a client."""
        noted = self.kernel.maps["client_ports"].get(CLIENT_KEY.pack(kind, client[1]))
        return self.registry.tenants.get(int.from_bytes(noted, "little")) if noted else None
