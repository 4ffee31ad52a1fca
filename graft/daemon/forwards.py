"""What is dialled inside a container's netns reaches the container's own servers: nsenter -n, port-forward, probes.

Theory of operation

A container's servers are sockets of the host's netns, so that who enters its netns from outside finds nobody at
127.0.0.1. graftd has an entrance in each container's netns (graft/daemon/doors.py): a listener, and a program that
leads there what has a server of the container's, and nothing else, so that a closed port refuses
(csrc/forward.bpf.h). From the accepted socket graftd reads what was dialled. It makes a socket as the container's
programs get them, with the container's policy, begins its connection to that address, and gives both to the
container's graft-relay, which copies (graft/daemon/relay.py). The server sees a client of its own loopback.

Who can come? Whoever enters the netns by CAP_SYS_ADMIN over it. A container's own sockets are not in its netns, but
by raw packets (CAP_NET_RAW) it can dial as well, and reaches its own servers, as it does anyway. So each container
has a share of connections and of graftd's time (graft/daemon/shares.py). Where that is used up its listener is not
read, and who dials waits.

What may be done to a listener? Whoever has CAP_NET_ADMIN over the netns may destroy it (sock_diag(7)). A destroyed
one reports a hang-up for ever, whatever is asked for. It is closed, and made again after a pause that grows.

What outlives graftd. The listener, the program's link and the relay's channel are in the descriptor store: meanwhile
connections wait, and a graft-relay goes on with the pairs that it has. With the container all of it ends.
"""

import contextlib
import errno
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from graft.daemon.doors import Door, Doors
from graft.daemon.relay import Relay, available
from graft.daemon.shares import START_PRICE, Common, Share
from graft.errors import GraftError
from graft.kernel.stamps import OWN_TENANT
from graft.log import log
from graft.process.loop import Loop
from graft.process.store import Store
from graft.rules.address import Address, parse_address
from graft.tenants.tenant import Tenant
from graft.trap.sockets import Sockets

IDLE_SECONDS = 10.0  # of a graft-relay without a pair
ANSWER_SECONDS = 5.0  # of a graft-relay that is asked what it has
LOOK_SECONDS = 1.0
RETRY_SECONDS, RETRIED = 0.05, 64  # who waits for room is looked at so often, and so many at once
AT_ONCE = 16  # entrances that are made in one round of the loop
FIRST_PAUSE, LAST_PAUSE = 1.0, 300.0  # seconds until an entrance is made again; each is twice the one before
END_SECONDS = 1.0
FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
BROKEN = select.EPOLLHUP | select.EPOLLERR
LOCAL4, LOCAL6 = parse_address("127.0.0.1"), parse_address("::1")
RESET = struct.pack("=ii", 1, 0)  # struct linger


class Forward:
    """One container: its entrance while there is one, its graft-relay while there is one, its share."""

    def __init__(self, tenant: Tenant, common: Common) -> None:
        self.tenant = tenant
        self.share = Share(common)
        self.door: Door | None = None
        self.relay: Relay | None = None
        self.idle_since = 0.0
        self.tries = 0  # in a row that it had no entrance, or none that lasted
        self.since = 0.0  # when the entrance was made, or when it is to be made again


class Forwards:
    """All entrances of one graftd, and what comes by them. Only the loop's thread calls it.

    @cgroup: of the graft-relays; it is made when it is needed.
    """

    def __init__(self, loop: Loop, store: Store, sockets: Sockets, doors: Doors, cgroup: Path) -> None:
        self.loop = loop
        self.store = store
        self.sockets = sockets
        self.doors = doors
        self.cgroup = cgroup
        self.common = Common()
        self.forwards: dict[int, Forward] = {}  # by the tenant's id
        self.wanted: deque[Forward] = deque()  # whose entrance is due,
        self.later: set[Forward] = set()  # will be,
        self.paused: dict[Forward, None] = {}  # or is not read, the longest first
        self.relayed: set[Forward] = set()  # those that have a graft-relay
        self.ending: list[Relay] = []
        self.next_look = self.next_retry = 0.0

    def want(self, tenant: Tenant) -> None:
        """Have an entrance made for a container, in one of the next rounds: no start waits for it."""
        if tenant.id not in self.forwards and self.doors.may_be(tenant) and available():
            self.wanted.append(self._forward(tenant))

    def _forward(self, tenant: Tenant) -> Forward:
        return self.forwards.setdefault(tenant.id, Forward(tenant, self.common))

    def restore(self, tenants: Mapping[int, Tenant], inherited: Iterable[tuple[str, int]]) -> None:
        """Take over a predecessor's entrances and relays; @inherited: the (name, descriptor) pairs that it stored."""
        if not available():
            log.warning("graft-relay is not built: nobody inside a container's netns reaches its servers")
        for found, door in self.doors.restore(tenants, inherited).items():
            self._have(self._forward(tenants[found]), door)
        for tenant in tenants.values():
            self.want(tenant)
        for name, fd in inherited:
            kind, _, number = name.partition("-")
            if kind != "relay":
                continue
            forward = self.forwards.get(int(number))
            relay = Relay(socket.socket(fileno=fd))
            if forward and not forward.relay:
                self._take_relay(forward, relay)
                continue
            relay.end()
            relay.close()
            self.store.remove(name)
            if forward and forward.relay:  # it was there twice under this name: both went
                self.store.put(name, forward.relay.channel.fileno())

    def tick(self) -> float:
        """Make the entrances that are due, end what is idle, and read on where that was paused.

        Returns within how many seconds it is to be called again.
        """
        try:
            self._work()
        except Exception:  # it must not end graftd
            log.exception("what is dialled inside containers' netns is not served")
        return 0.0 if self.wanted else RETRY_SECONDS if self.paused else float("inf")

    def _work(self) -> None:
        for _ in range(min(AT_ONCE, len(self.wanted))):
            forward = self.wanted.popleft()
            known = self.forwards.get(forward.tenant.id) is forward and not forward.door
            if known and self.doors.may_be(forward.tenant):
                self._open(forward)
        now = time.monotonic()
        if now >= self.next_look:
            self.next_look = now + LOOK_SECONDS
            self._look(now)
        if self.paused and now >= self.next_retry:
            self.next_retry = now + RETRY_SECONDS
            self._retry(now)

    def _look(self, now: float) -> None:
        for forward in list(self.relayed):
            relay = forward.relay
            if relay and not relay.known and now - relay.since > ANSWER_SECONDS:
                relay.end()
                self._drop_relay(forward)
            elif relay and relay.known and not relay.open and now - forward.idle_since > IDLE_SECONDS:
                self._drop_relay(forward)
        due = {forward for forward in self.later if forward.since <= now}
        self.later -= due
        self.wanted.extend(due)
        self.ending = [relay for relay in self.ending if not relay.ended()]

    def forget(self, tenant: Tenant) -> None:
        """The container has ended: its connections end, and nothing is left of it."""
        forward = self.forwards.pop(tenant.id, None)
        if not forward:
            return
        self.later.discard(forward)
        if forward.relay:
            forward.relay.end()
            self._drop_relay(forward)
        self._close_door(forward)

    def end(self) -> None:
        """End all connections, because no graftd will follow this one, and remove the relays' cgroup."""
        for forward in list(self.relayed):
            if forward.relay:
                forward.relay.end()
            self._drop_relay(forward)
        until = time.monotonic() + END_SECONDS
        while self.cgroup.exists() and time.monotonic() < until:
            self.ending = [relay for relay in self.ending if not relay.ended()]
            try:
                self.cgroup.rmdir()
            except OSError:  # one of them is not gone yet
                time.sleep(0.01)

    def held(self) -> list[tuple[str, int]]:
        """The (name, descriptor) pairs that a successor needs."""
        found = []
        for number, forward in self.forwards.items():
            if forward.door:
                found += self.doors.held(forward.tenant, forward.door)
            if forward.relay:
                found.append((f"relay-{number}", forward.relay.channel.fileno()))
        return found

    # -- entrances --

    def _open(self, forward: Forward) -> None:
        try:
            door = self.doors.make(forward.tenant)
        except (OSError, GraftError) as error:
            self._try_later(forward, str(error))
        else:
            self._have(forward, door)

    def _have(self, forward: Forward, door: Door) -> None:
        forward.door, forward.since = door, time.monotonic()
        self.loop.add(door.listener.fileno(), lambda events: self._called(forward, door, events))

    def _lose(self, forward: Forward, why: str) -> None:
        """The listener is broken: close it, and make another one later. What is open goes on."""
        if time.monotonic() - forward.since > LAST_PAUSE:
            forward.tries = 0
        self._close_door(forward)
        self._try_later(forward, why)

    def _try_later(self, forward: Forward, why: str) -> None:
        tell = log.debug if forward.tries else log.error
        tell("container %s: nobody inside its netns reaches its servers: %s", forward.tenant.name, why)
        forward.since = time.monotonic() + min(FIRST_PAUSE * 2**forward.tries, LAST_PAUSE)
        forward.tries = min(forward.tries + 1, 16)
        self.later.add(forward)

    def _close_door(self, forward: Forward) -> None:
        door, forward.door = forward.door, None
        self.paused.pop(forward, None)
        if door:
            self.loop.remove(door.listener.fileno())
            self.doors.end(forward.tenant, door)

    # -- connections --

    def _called(self, forward: Forward, door: Door, events: int) -> None:
        if events & BROKEN:
            self._lose(forward, "its listener was destroyed")
            return
        now = time.monotonic()
        if not self._has_room(forward, now):
            self._pause(forward, door)
            return
        try:
            dialled = door.listener.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno in FULL:
                self._pause(forward, door)
            else:
                self._lose(forward, f"its listener: {error.strerror}")
            return
        forward.share.take(now)
        with dialled:
            try:
                self._join(forward, dialled)
            except OSError as error:
                log.debug("container %s: %s", forward.tenant.name, error)
                dialled.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _join(self, forward: Forward, dialled: socket.socket) -> None:
        """Connect a socket of the container's to what was dialled, and have both joined. Raises OSError."""
        dialled.setblocking(False)
        self.sockets.stamps.stamp(dialled.fileno(), OWN_TENANT, 0)  # its name is of that netns, and no host's
        relay = self._relay(forward)  # first: else a server would see a connection that nobody carries
        host, port = dialled.getsockname()[:2]
        address = _server(forward.tenant, parse_address(host.partition("%")[0]))
        family = socket.AF_INET if address.v4 else socket.AF_INET6
        with self.sockets.make(forward.tenant, family, socket.SOCK_STREAM, place=0) as server:
            server.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                server.connect((str(address), port))
            for sock in (dialled, server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # else that byte would be lost
            relay.join(dialled, server)
        forward.share.count(relay.open)

    # -- relays --

    def _relay(self, forward: Forward) -> Relay:
        """The container's graft-relay, which is started if there is none. Raises OSError."""
        if forward.relay is None:
            tenant, name = forward.tenant, f"relay-{forward.tenant.id}"
            forward.share.take(time.monotonic(), START_PRICE)
            try:
                self.cgroup.mkdir(exist_ok=True)
                relay = Relay.start(
                    tenant.name, tenant.owner, self.cgroup, tenant.pid, lambda fd: self.store.put(name, fd)
                )
            except OSError as error:
                self.store.remove(name)
                log.error("container %s: cannot start its graft-relay: %s", tenant.name, error)
                raise
            self._take_relay(forward, relay)
            return relay
        return forward.relay

    def _take_relay(self, forward: Forward, relay: Relay) -> None:
        forward.relay = relay
        self.relayed.add(forward)
        self.loop.add(relay.channel.fileno(), lambda _events: self._told(forward, relay))

    def _told(self, forward: Forward, relay: Relay) -> None:
        if relay.count():
            forward.share.count(relay.open)
        else:
            log.warning("container %s: its graft-relay has ended", forward.tenant.name)
            relay.end()
            self._drop_relay(forward)
        forward.idle_since = now = time.monotonic()
        self._resume(forward, now)

    def _drop_relay(self, forward: Forward) -> None:
        relay, forward.relay = forward.relay, None
        self.relayed.discard(forward)
        if relay:
            self.store.remove(f"relay-{forward.tenant.id}")
            self.loop.remove(relay.channel.fileno())
            relay.close()
            self.ending.append(relay)
            forward.share.count(0)

    # -- who waits --

    def _has_room(self, forward: Forward, now: float) -> bool:
        return (not forward.relay or forward.relay.known) and forward.share.may(now)

    def _pause(self, forward: Forward, door: Door) -> None:
        self.paused[forward] = None
        self.loop.modify(door.listener.fileno(), 0)

    def _retry(self, now: float) -> None:
        for forward in list(self.paused)[:RETRIED]:
            if not self._resume(forward, now):
                self.paused[forward] = self.paused.pop(forward)  # behind the others

    def _resume(self, forward: Forward, now: float) -> bool:
        """Read on at a container's listener, if it is paused and there is room. False: it waits on."""
        if forward not in self.paused or not forward.door:
            return True
        if not self._has_room(forward, now):
            return False
        del self.paused[forward]
        self.loop.modify(forward.door.listener.fileno(), select.EPOLLIN)
        return True


def _server(tenant: Tenant, dialled: Address) -> Address:
    """Where the container's server is that @dialled means: an address of its own, or its loopback."""
    if dialled.loopback or any(own.address == dialled for own in tenant.owned):
        return dialled
    return LOCAL4 if dialled.v4 else LOCAL6
