"""TCP clients of the resolver: a thread for each connection, and as many queries on it as it has cost its container.

Clients keep connections open for the next query (RFC 7766). A container has THREADS_OF_ONE threads; the connections
beyond wait, and one that has been answered and asks nothing ends for one that waits: what it has sent by then is
answered still.
"""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator

from graft.log import log
from graft.tenants.tenant import Tenant

THREADS_MAX, THREADS_OF_ONE = 32, 4  # TCP connections in work: of all containers, of one
THREADS_FIRST = 512  # of all, if it is a container's only one
WAITING_MAX, WAITING_OF_ONE = 1024, 64  # TCP connections that wait for a thread: of all containers, of one
QUERIES = 4  # of one TCP connection: BUDGET_CONNECTION
PATIENCE = 5.0  # seconds for a client to send a query
MESSAGE_MAX = 65535  # bytes, with TCP's length field of 16 bits (RFC 1035, 4.2.2)


def messages(sock: socket.socket, patience: float = PATIENCE) -> Iterator[bytes]:
    """Receive messages with their length in front (RFC 1035, 4.2.2), until the peer closes the connection.

    Raises TimeoutError if one takes longer than @patience seconds, ValueError where one ends early, OSError.
    """
    data = b""
    while True:
        until = time.monotonic() + patience
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


class Conversations:
    """The TCP connections of all containers. The loop begins them; a lock guards what their threads share."""

    def __init__(self, answer: Callable[[Tenant, bytes], bytes]) -> None:
        """@answer: the reply to a query of a container's, b"" for none; threads call it."""
        self.answer = answer
        self.threads: Counter[int] = Counter()  # by tenant, as the next two
        self.idle: dict[int, dict[socket.socket, None]] = {}  # answered, and nothing asked; longest ago first
        self.waiting: dict[int, deque[socket.socket]] = {}
        self.lock = threading.Lock()

    def begin(self, peer: socket.socket, tenant: Tenant) -> None:
        """Answer what comes on a connection, which is closed at its end, or now if there are too many."""
        with self.lock:
            own = self.threads[tenant.id]
            if own < THREADS_OF_ONE and self.threads.total() < (THREADS_MAX if own else THREADS_FIRST):
                self.threads[tenant.id] += 1
                threading.Thread(target=self._converse, args=(peer, tenant), daemon=True).start()
                return
            queue = self.waiting.get(tenant.id, ())
            if own and len(queue) < WAITING_OF_ONE and sum(map(len, self.waiting.values())) < WAITING_MAX:
                self.waiting.setdefault(tenant.id, deque()).append(peer)
                self._end_idle(tenant)
                return
        peer.close()

    def forget(self, tenant: Tenant) -> None:
        """Close what waits, of a container that has ended."""
        with self.lock:
            for peer in self.waiting.pop(tenant.id, ()):
                peer.close()

    def _end_idle(self, tenant: Tenant) -> None:
        """End the connection that has been idle for longest: its thread reads what was sent, and then the end."""
        idle = self.idle.get(tenant.id)
        if idle:
            peer = next(iter(idle))
            del idle[peer]
            with contextlib.suppress(OSError):  # the peer has gone
                peer.shutdown(socket.SHUT_RD)

    def _rest(self, tenant: Tenant, peer: socket.socket) -> None:
        with self.lock:
            self.idle.setdefault(tenant.id, {})[peer] = None
            if self.waiting.get(tenant.id):
                self._end_idle(tenant)

    def _work(self, tenant: Tenant, peer: socket.socket) -> None:
        with self.lock:
            idle = self.idle.get(tenant.id, {})
            idle.pop(peer, None)
            if not idle:
                self.idle.pop(tenant.id, None)

    def _converse(self, peer: socket.socket | None, tenant: Tenant) -> None:
        while peer:
            try:
                with peer:
                    self._serve(peer, tenant)
            except (OSError, ValueError) as error:
                log.debug("names: %s", error)
            finally:
                self._work(tenant, peer)
                peer = self._next(tenant)

    def _serve(self, peer: socket.socket, tenant: Tenant) -> None:
        received = messages(peer)
        for _ in range(QUERIES):
            query = next(received, None)
            self._work(tenant, peer)
            if query is None:
                return
            reply = self.answer(tenant, query)
            if reply:
                peer.settimeout(PATIENCE)
                peer.sendall(struct.pack(">H", len(reply)) + reply)
            self._rest(tenant, peer)

    def _next(self, tenant: Tenant) -> socket.socket | None:
        """The connection that has waited for longest. None: there is none, and the thread ends."""
        with self.lock:
            queue = self.waiting.get(tenant.id)
            if queue:
                peer = queue.popleft()
                if not queue:
                    del self.waiting[tenant.id]
                return peer
            self.threads[tenant.id] -= 1
            if not self.threads[tenant.id]:
                del self.threads[tenant.id]
            return None
