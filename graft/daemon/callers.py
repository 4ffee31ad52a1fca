"""Who connects to graftd's own sockets: accepted within the shares that users have, or closed at once."""

import errno
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from graft.daemon.connection import Connection
from graft.kernel.linux import credentials
from graft.process.closing import end
from graft.process.loop import Loop
from graft.process.spare import Spare
from graft.tenants.registry import Registry

CONNECTIONS_MAX = 512
CONNECTIONS_OF_USERS = 448  # above that, only root may connect
CONNECTIONS_OF_A_USER = 64


class Service(Protocol):
    """What answers at a socket: Admin, Agent, Users."""

    def serve(self, connection: Connection, message: bytes, fds: list[int]) -> Any:
        """Carry out one message. Raises GraftError."""

    @staticmethod
    def whole(text: bytes) -> bool:
        """Is it a whole message?"""


class Callers:
    """The connections of one graftd. Only the loop's thread calls it.

    @share_of: what an unprivileged uid counts against.
    """

    def __init__(
        self, loop: Loop, registry: Registry, spare: Spare, share_of: Callable[[int], tuple[str, int]]
    ) -> None:
        self.loop = loop
        self.registry = registry
        self.spare = spare
        self.share_of = share_of
        self.connections: set[Connection] = set()
        self.last = 0.0  # monotonic seconds, when somebody was let in

    def expire(self, now: float) -> None:
        """Close the connections whose time is up. @now: monotonic seconds."""
        for connection in [c for c in self.connections if c.deadline < now]:
            connection.close()

    def serve(self, sock: socket.socket, service: Service) -> None:
        """Accept at a listening socket, and have @service answer."""
        sock.setblocking(False)

        def accept(_events: int) -> None:
            try:
                peer, _ = sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    if not self.spare.lend():
                        time.sleep(0.01)  # level-triggered: the connection waits, the loop must not spin
                    return
                raise
            self.spare.make_room()  # for the pidfd of who has connected
            pid, uid, _ = credentials(peer)
            here = sum(c.service is service for c in self.connections)
            account = self._account(pid, uid)
            same = sum(c.account == account for c in self.connections) if account else 0
            full = here >= CONNECTIONS_MAX or (here >= CONNECTIONS_OF_USERS and uid)
            if full or same >= CONNECTIONS_OF_A_USER:
                end(peer)
                return
            self.last = time.monotonic()
            connection = Connection(
                self.loop, peer, service.whole, service.serve, self.connections.discard, self.last
            )
            connection.service, connection.account = service, account
            self.connections.add(connection)

        self.loop.add(sock.fileno(), accept)

    def _account(self, pid: int, uid: int) -> tuple[str, int] | None:
        """What a connection counts against: its user, or the network namespace of a container's root.

        What is delegated to a user (subuid(5)) is one account, whatever number of it a process has.
        None: root of the host, which has no limit of its own.
        """
        if uid:
            return self.share_of(uid)
        try:
            netns = self.registry.netns_of(pid)
        except OSError:
            return "uid", 0
        return None if netns == self.registry.home else ("netns", netns)
