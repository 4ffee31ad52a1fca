"""The resolver for names of containers: a DNS server in graftd, at 127.0.0.11 as Docker's own is (RFC 1035).

Who asks. A container sends its query to 127.0.0.11 on its own loopback. graft's BPF programs let that through to the
host's 127.0.0.11, with a source address in the container's private slice, and that address identifies the container.

What it knows. The names of the containers that share a network with the one that asks: container name, host name,
aliases and short id. Docker's names are read from Docker's files for each query, because `docker network connect` can
give a running container another network and new aliases.

All other names. The query is forwarded to the container's nameservers (graft/engines/nameservers.py) if its egress is
that of the host. The next one is asked where one refuses, fails, or is silent for EACH seconds. Without such egress
the answer is NXDOMAIN.

Where it listens. Networks of CNI use their gateway's address instead of 127.0.0.11, because Podman omits loopback
addresses from resolv.conf.

UDP is served in graftd's loop: a forwarded query has a socket of its own, whose answer the loop waits for. Over TCP,
each connection has a thread, and carries as many queries as it has cost its container (RFC 7766, csrc/budget.bpf.h).

One container must not take the resolver from the others. What it sends beyond its budget is dropped in its own send
(csrc/budget.bpf.h), so that the queue of the UDP socket has room. Of what is limited over all, a container that has
much gives way to one that has little: forwarded queries that wait, and TCP connections.
"""

import os
import secrets
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

from graft.engines.names import NOTIMP, REFUSED, SERVFAIL, Names, failure, question_end
from graft.engines.nameservers import Nameservers, family_of
from graft.errors import Failure
from graft.kernel.programs import CLIENT_KEY, Kernel
from graft.kernel.stamps import OWN_TENANT, Stamper
from graft.log import log
from graft.process.loop import Loop
from graft.process.store import Store
from graft.rules.address import MAPPED, Address
from graft.rules.slices import SLICE4_NET, SLICE_COUNT, SLICE_GROUP, SLICE_SHIFT
from graft.rules.tables import DNS_PORT, RESOLVER
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant

WAITING_MAX, WAITING_OF_ONE = 1024, 64  # UDP queries that wait for a nameserver: of all containers, of one
PATIENCE = 5.0  # seconds: for the nameservers to answer, and for a TCP client to send a query
EACH = 2.0  # seconds: for one nameserver to answer, if there is another
THREADS_MAX, THREADS_OF_ONE = 32, 4  # TCP connections: of all containers, of one
THREADS_FIRST = 512  # TCP connections of all, if it is a container's only one
SO_RCVBUFFORCE = 33  # socket(7), which Python does not name
QUEUE = 4 << 20  # bytes of the UDP socket's queue: the bursts of ten containers (BUDGET_BURST), or 5,000 queries
QUERIES = 4  # of one TCP connection: BUDGET_CONNECTION
BACKLOG = 1024  # TCP connections that wait to be accepted
STORED = "resolver-"
MESSAGE_MAX = 65535  # bytes, with TCP's length field of 16 bits (RFC 1035, 4.2.2)
UNANSWERED = (SERVFAIL, NOTIMP, REFUSED)  # what says that another nameserver is to be asked, as resolv.conf(5) has it


class Waiting(NamedTuple):
    """A UDP query that was forwarded to a nameserver. `number`: the id it has there; `tenant`: who asked.

    `left`: the nameservers that have not been asked. `until`: when the next one is; `over`: when nobody waits.
    """

    out: socket.socket
    tenant: int
    number: bytes
    query: bytes
    client: tuple[str, int]
    udp: socket.socket
    left: list[str]
    until: float  # monotonic seconds
    over: float  # monotonic seconds


def _stored(address: Address, kind: int) -> str:
    """The name of the socket of @kind (SOCK_DGRAM, SOCK_STREAM) at @address in the descriptor store."""
    return f"{STORED}{'tcp' if kind == socket.SOCK_STREAM else 'udp'}-{address}"


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
        self.waiting: dict[int, dict[int, Waiting]] = {}  # by tenant, and by the descriptor that asks, in their order
        self.nameservers = Nameservers()
        self.threads: Counter[int] = Counter()  # TCP conversations, by tenant
        self.lock = threading.Lock()

    def inherit(self, stored: Iterable[tuple[str, int]]) -> None:
        """Take the sockets of an earlier graftd, by the names that they have in the store; start() uses them."""
        self.inherited = {name: fd for name, fd in stored if name.startswith(STORED)}

    def held(self) -> list[tuple[str, int]]:
        """The sockets by the names that they have in the store."""
        return [
            (_stored(address, sock.type), sock.fileno()) for address, pair in self.places.items() for sock in pair
        ]

    def start(self) -> None:
        """Listen at the addresses that the attachments' resolv.conf name, and stop at all others.

        An address that cannot be had is logged: its containers have no names of each other.
        """
        attachments = self.registry.attachments.values()
        wanted = {a.resolver or RESOLVER for a in attachments}
        for address in self.places.keys() - wanted:
            self._stop(address)
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

    def end(self) -> None:
        """Stop at all addresses, and take those off the host's stack that are there for this."""
        for address in list(self.places):
            self._stop(address)

    def _listen(self, address: Address) -> None:
        if address != RESOLVER:
            self.registry.add_address(address)
            self.registry.reserve(address)
        names = [_stored(address, kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)]
        if all(name in self.inherited for name in names):
            udp, tcp = (socket.socket(fileno=self.inherited.pop(name)) for name in names)
            self.places[address] = (udp, tcp)
        else:
            udp, tcp = self.places[address] = (self._socket(socket.SOCK_DGRAM), self._socket(socket.SOCK_STREAM))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for sock in (udp, tcp):
                sock.bind((str(address), DNS_PORT))
            udp.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE)
            tcp.listen(BACKLOG)
            for name, sock in zip(names, (udp, tcp), strict=True):  # now: the store drops a socket that hangs up
                self.store.put(name, sock.fileno())
        self.loop.add(udp.fileno(), lambda _events: self._asked(udp))
        self.loop.add(tcp.fileno(), lambda _events: self._called(tcp))

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
        if address != RESOLVER:
            self.registry.release(address)
            self.registry.remove_address(address)

    # -- UDP --

    def _asked(self, udp: socket.socket) -> None:
        try:
            query, client = udp.recvfrom(MESSAGE_MAX)
            tenant = self._tenant(client, socket.IPPROTO_UDP)
            if tenant is None:
                return
            reply = self.names.answer(tenant, query)
            if reply is None:
                self._forward(query, client, udp, tenant)
            elif reply:
                udp.sendto(reply, client)
        except OSError as error:
            log.debug("names: %s", error)

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
        for asked, server in enumerate(servers, 1):
            number = secrets.token_bytes(2)
            out = self._socket(socket.SOCK_DGRAM, family_of(server))
            try:
                out.connect((server, DNS_PORT))
                out.send(number + query[2:])
            except OSError as error:
                log.debug("nameserver %s: %s", server, error)
                out.close()
                continue
            left = servers[asked:]
            until = min(over, time.monotonic() + EACH) if left else over
            waiting = Waiting(out, tenant, number, query, client, udp, left, until, over)
            self.waiting.setdefault(tenant, {})[out.fileno()] = waiting
            self.loop.add(out.fileno(), partial(self._heard, waiting))
            return
        udp.sendto(failure(query), client)

    def _heard(self, waiting: Waiting, _events: int) -> None:
        try:
            reply = waiting.out.recv(MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError as error:  # ECONNREFUSED: nobody is there
            log.debug("names: %s", error)
            self._ask_next(waiting)
            return
        question = waiting.query[12 : question_end(waiting.query)]
        if reply[:2] != waiting.number or reply[12 : 12 + len(question)].lower() != question.lower():
            return  # an answer to something else; the right one may still come
        if reply[3] & 0xF in UNANSWERED and waiting.left:
            self._ask_next(waiting)
            return
        self._forget(waiting)
        waiting.udp.sendto(waiting.query[:2] + reply[2:], waiting.client)

    def _ask_next(self, waiting: Waiting) -> None:
        self._forget(waiting)
        self._send(waiting.query, waiting.client, waiting.udp, waiting.tenant, waiting.left, waiting.over)

    def expire(self) -> None:
        """Ask the next nameserver where one is silent, and drop what none has answered within PATIENCE seconds."""
        now = time.monotonic()
        for waiting in [w for own in self.waiting.values() for w in own.values() if w.until < now]:
            try:
                if now < waiting.over:
                    self._ask_next(waiting)
                else:
                    self._forget(waiting)
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
        if tenant is None or not self._admit(tenant):
            peer.close()
            return
        threading.Thread(target=self._converse, args=(peer, tenant), daemon=True).start()

    def _admit(self, tenant: Tenant) -> bool:
        with self.lock:
            own = self.threads[tenant.id]
            if own >= THREADS_OF_ONE or self.threads.total() >= (THREADS_MAX if own else THREADS_FIRST):
                return False
            self.threads[tenant.id] += 1
            return True

    def _converse(self, peer: socket.socket, tenant: Tenant) -> None:
        try:
            with peer:
                for query in islice(_messages(peer), QUERIES):
                    reply = self.names.answer(tenant, query)
                    if reply is None:
                        reply = self._relay(query, self.nameservers.of(tenant))
                    if reply:
                        peer.settimeout(PATIENCE)
                        peer.sendall(struct.pack(">H", len(reply)) + reply)
        except (OSError, ValueError) as error:
            log.debug("names: %s", error)
        finally:
            with self.lock:
                self.threads[tenant.id] -= 1
                if not self.threads[tenant.id]:
                    del self.threads[tenant.id]

    def _relay(self, query: bytes, servers: Iterable[str]) -> bytes:
        reply = failure(query)
        for server in servers:
            try:
                with self._socket(socket.SOCK_STREAM, family_of(server)) as out:
                    out.settimeout(EACH)
                    out.connect((server, DNS_PORT))
                    out.sendall(struct.pack(">H", len(query)) + query)
                    reply = next(_messages(out), b"") or reply
            except (OSError, ValueError) as error:
                log.debug("nameserver %s: %s", server, error)
            else:
                if len(reply) >= 12 and reply[3] & 0xF not in UNANSWERED:
                    break
        return reply

    # -- who asks --

    def _tenant(self, client: tuple[str, int], kind: int) -> Tenant | None:
        """Return the tenant that sent from @client, or None. @kind: IPPROTO_UDP or IPPROTO_TCP.

        The source is in the tenant's private slice, or is an address of its own. From any other source, the map
        `client_ports` has the tenant by protocol and source port.
        """
        raw = socket.inet_aton(client[0])
        number = int.from_bytes(raw, "big")
        registry = self.registry
        slice_number = (number ^ SLICE4_NET) >> SLICE_SHIFT
        if 0 <= slice_number < SLICE_COUNT:
            first = slice_number - slice_number % SLICE_GROUP
            for tenant in registry.tenants.values():
                if tenant.slice_number == slice_number or (tenant.wide and tenant.slice_number == first):
                    return tenant
            return None
        address = Address(MAPPED + raw)
        for tenant in registry.tenants.values():
            if any(own.address == address for own in tenant.owned):
                return tenant
        noted = self.kernel.maps["client_ports"].get(CLIENT_KEY.pack(kind, client[1]))
        return registry.tenants.get(int.from_bytes(noted, "little")) if noted else None


def _messages(sock: socket.socket) -> Iterator[bytes]:
    """Receive messages with their length in front (RFC 1035, 4.2.2), until the peer closes the connection.

    Raises TimeoutError if one takes longer than PATIENCE seconds, ValueError where one ends early, OSError.
    """
    data = b""
    while True:
        until = time.monotonic() + PATIENCE
        while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
            sock.settimeout(max(until - time.monotonic(), 0.001))
            more = sock.recv(MESSAGE_MAX)
            if not more and data:
                raise ValueError("a message ended early")
            if not more:
                return
            data += more
        end = 2 + int.from_bytes(data[:2], "big")
        yield data[2:end]
        data = data[end:]
