"""Tenants from their listener to their end, with all that graftd keeps for them.

Both services (the admin and the agent socket) and the loop reach tenants through here, so that none of them needs the
whole of graftd.
"""

import contextlib
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from socket import IPPROTO_UDP
from typing import Any

from graft.daemon.connection import Connection
from graft.daemon.doors import Doors
from graft.daemon.forwards import Forwards
from graft.daemon.open_sockets import OpenSockets
from graft.daemon.readers import Readers
from graft.daemon.refusals import Refusals
from graft.daemon.stats import Counting
from graft.daemon.verbose import Teller
from graft.engines.resolver import Resolver
from graft.errors import Refused
from graft.kernel.cgroup import cgroup2_root, relay_cgroup
from graft.kernel.denials import ALLOWED, CONVERTED, LEARNT, Event
from graft.kernel.direct import unleash
from graft.kernel.entrance import Entrances
from graft.kernel.listening import wildcard_ports
from graft.kernel.netns import processes_in_netns
from graft.kernel.programs import Kernel
from graft.kernel.stamps import OWN_TENANT, Stamper
from graft.log import log, set_level
from graft.process.loop import Loop
from graft.process.spare import Spare
from graft.process.store import Store
from graft.rules.address import Address
from graft.rules.configuration import Configuration
from graft.rules.limits import default_limits
from graft.tenants.direct import lives
from graft.tenants.direct_engines import EngineContainers
from graft.tenants.interfaces import Interfaces, patience
from graft.tenants.publish import unpublish
from graft.tenants.registry import Registry
from graft.tenants.tenant import API, OWNER_BASE, WRAPPER, Tenant
from graft.trap.dispatch import scope_of
from graft.trap.family import Family
from graft.trap.listeners import Listeners
from graft.trap.sockets import Sockets
from graft.trap.supervisor import Supervisor

DENIALS_KEPT = 32
SCOPE_GRACE_SECONDS = 5.0


class Tenancy:
    """The registry, the descriptor store and the trapped calls of one graftd, kept in step. For the loop's thread."""

    def __init__(
        self,
        directory: Path,
        loop: Loop,
        store: Store,
        kernel: Kernel,
        registry: Registry,
        configuration: Configuration,
        resolver: Resolver,
    ) -> None:
        self.directory = directory
        self.loop = loop
        self.store = store
        self.kernel = kernel
        self.registry = registry
        self.resolver = resolver
        self.listening = wildcard_ports(OWNER_BASE)  # when graftd began
        self.reserved: set[tuple[int, int]] = set()  # ports of the node
        self.interfaces = Interfaces(loop, registry, self.is_hosts)
        self.configure(configuration)
        stamper = Stamper(kernel.maps["stamps"], kernel.maps["settling"], kernel.maps["prepared"])
        self.sockets = Sockets(stamper, self._place, registry.ephemeral)
        self.family = Family(self.sockets, kernel.maps["families"])
        doors = Doors(store, stamper, Entrances(kernel.maps), self.is_hosts, ipv6=registry.ipv6)
        self.forwards = Forwards(loop, store, self.sockets, doors, relay_cgroup(cgroup2_root()))
        self.direct = EngineContainers(registry, kernel, directory)
        self.supervisor = Supervisor(
            self.sockets, self.family, kernel.maps["holders"], self.is_hosts, self.direct.let_listen
        )
        self.denials: dict[int, deque[Event]] = {}
        self.readers = Readers(registry, resolver.allowance.name_of)
        self.refusals = Refusals()
        self.open_sockets = OpenSockets(loop, registry)
        self.tellers: dict[int, Teller] = {}
        self.kept_places: set[int] = set()
        self.spare = Spare()
        self.stray = False  # a listener has been put out of reach
        self.calls = Listeners(self, kernel.maps, directory)
        self.counting = Counting(registry, self.open_sockets, self.calls)

    def configure(self, configuration: Configuration) -> None:
        """Put graft.toml in force: for containers that are created from now on, the pods' resolvers for all.

        What a container was given it keeps. What the environment says wins. Raises UsageError for that, and OSError
        if a map is full.
        """
        limits = default_limits(os.environ, configuration.limits)
        reserved, before = configuration.reserved(self.listening), self.registry.pod_resolvers
        self.kernel.reserve({port for protocol, port in reserved if protocol == IPPROTO_UDP})
        try:
            self._resolve(configuration.resolvers)
        except OSError:
            with contextlib.suppress(OSError):  # what there was room for before there is again
                self._resolve(before)
                self.kernel.reserve({port for protocol, port in self.reserved if protocol == IPPROTO_UDP})
            raise
        self.configuration, self.reserved = configuration, reserved
        self.limits = limits  # of a container that names none
        self.interfaces.patience = patience(configuration.address_wait)
        self.store.expect(configuration.watchdog)
        set_level(configuration.log)
        self.kernel.tell(counts=configuration.count_datagrams)

    def _resolve(self, resolvers: tuple[Address, ...]) -> None:
        """Let all pods ask @resolvers. Raises OSError if a map is full."""
        if self.registry.pod_resolvers == resolvers:
            return
        self.registry.pod_resolvers = resolvers
        for tenant in self.registry.tenants.values():
            if tenant.netns_fd >= 0:  # not while graftd starts, and gives them their descriptors back
                self.registry.apply(tenant)

    # -- tenants --

    def adopt(
        self, tenant: Tenant, listener_fd: int, *, trusted: bool, pid: int = 0, idle: bool = False, member: str = ""
    ) -> None:
        """Store a tenant's namespace and new listener, then receive from the listener.

        @listener_fd belongs to graftd from now on. @trusted: root handed it over. @pid: who has it, or 0. @idle: no
        call is expected from it. @member: the engine's container that it is of. Raises Refused (EMFILE) if graftd has
        too few descriptors left.
        """
        if not self.spare.whole:
            raise Refused("graftd has no descriptors left", hint="end containers, or raise its limit", code="EMFILE")
        if not tenant.listeners:
            self.store.put(f"netns-{tenant.id}", tenant.netns_fd)
        self.calls.adopt(tenant, listener_fd, trusted=trusted, pid=pid, idle=idle, member=member)
        self.forwards.want(tenant)

    def ended(self, tenant: Tenant) -> None:
        """Remove a tenant whose last listener has ended, which means that its last process has.

        A container that had lost its listener, when another process joined it or graftd started, is kept while it has
        a process: the daemon's tick looks for the end of that.
        """
        if tenant.lost_listener and self.alive(tenant, time.monotonic()):
            self.store.remove(f"netns-{tenant.id}")
            return
        self.kernel.reports.drain()  # events of its last processes are reported before it is gone
        self.remove(tenant)
        if tenant.cgroup and not tenant.lost_listener:
            unleash(self.kernel.maps["leashes"], tenant.id)
        log.info("container %s ended", tenant.name)

    def left(self, tenant: Tenant, member: str) -> None:
        """Forget an engine's container that has ended, in whose netns others run, and what it published."""
        tenant.members.pop(member, None)
        tenant.no_netadmin.discard(member)
        self.direct.unmark(member)
        for publication in tenant.brought.pop(member, []):
            if publication in tenant.publications:
                unpublish(tenant, publication)
        self.registry.apply(tenant)
        log.debug("container %s: %s has ended", tenant.name, member)

    def remove(self, tenant: Tenant) -> None:
        """Take a tenant away, the wrappers inside it first, and what is kept for it."""
        for inner in self.registry.inner(tenant):
            self.remove(inner)
        self.forwards.forget(tenant)
        self.interfaces.withdraw(tenant)
        self.registry.remove(tenant)
        self.resolver.forget(tenant)
        self.direct.end(tenant)
        self.store.remove(f"netns-{tenant.id}")
        if tenant.parent and tenant.scope:
            self.calls.divide(tenant.parent)
        self.denials.pop(tenant.id, None)
        self.readers.ended(tenant)
        self.refusals.ended(tenant)
        self.calls.forget(tenant)
        teller = self.tellers.pop(tenant.id, None)
        if teller:
            teller.connection.close()
        self.keep_places()

    def forget_unstarted(self) -> None:
        """Remove direct containers of engines whose start has failed since they were put under the policy."""
        for tenant in [t for t in self.registry.tenants.values() if t.cgroup and not t.listeners]:
            if not self.alive(tenant, time.monotonic()):
                self.remove(tenant)

    def alive(self, tenant: Tenant, now: float, seen: Mapping[int, list[int]] | None = None) -> bool:
        """Does a tenant that has no listener still have a process?

        @seen: the PIDs of all processes by netns, for who asks about many tenants.
        """
        if tenant.kind == API:
            tenant.followers = {pid for pid in tenant.followers if self._runs(pid, tenant.netns)}
            return bool(tenant.followers)
        if tenant.kind == WRAPPER and not tenant.scope:  # others are in its netns as well: only its program counts
            return self._runs(tenant.pid, tenant.netns)
        if tenant.cgroup and lives(tenant):
            return True  # else, if its processes were moved out, graft-sup is in its netns as long as there are any
        pids = processes_in_netns(tenant.netns) if seen is None else seen.get(tenant.netns, [])
        if not tenant.scope:
            return bool(pids)
        return now - tenant.since < SCOPE_GRACE_SECONDS or any(scope_of(pid) == tenant.scope for pid in pids)

    def _runs(self, pid: int, netns: int) -> bool:
        try:
            return self.registry.netns_of(pid) == netns
        except OSError:
            return False

    def follow(self, tenant: Tenant, pid: int) -> None:
        """Remember that a process has sockets of this tenant by the API: the tenant lives as long as the process."""
        if tenant.kind == API and pid not in tenant.followers:
            tenant.followers.add(pid)
            self.registry.save()

    def own_socket(self, sock: socket.socket) -> None:
        """Make it a socket of graftd's own, which the programs of its cgroup leave alone. Raises OSError."""
        self.sockets.stamps.stamp(sock.fileno(), OWN_TENANT, 0)

    # -- places --

    def _place(self, number: int) -> int:
        place = self.registry.places.get(number)
        if place is None:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        return place.fd

    def is_hosts(self, netns: int) -> bool:
        """Is the netns with this inode graftd's own, or one that an endpoint names? From any thread."""
        return netns == self.registry.home or any(p.inode == netns for p in list(self.registry.places.values()))

    def keep_places(self) -> None:
        """Store the namespaces that endpoints name, and close those that no endpoint names any more."""
        for place in self.registry.unused_places():
            self.store.remove(f"place-{place.number}")
            self.kept_places.discard(place.number)
            os.close(place.fd)
        for number in self.registry.places.keys() - self.kept_places:
            self.store.put(f"place-{number}", self.registry.places[number].fd)
            self.kept_places.add(number)

    # -- what is told --

    def listen_in(self, tenant: Tenant, connection: Connection) -> None:
        """Send @connection one line for each bind and connect of a verbose wrapper's programs, until it closes."""
        connection.told = True
        connection.deadline = float("inf")
        self.tellers[tenant.id] = Teller(tenant, connection)

    def denied(self, event: Event) -> None:
        """Keep what the kernel reports, and tell who listens in."""
        teller = self.tellers.get(event.tenant)
        if teller:
            teller.tell(event)
        if event.reason == LEARNT:
            self.resolver.allowance.learn(event)
            return
        self.readers.tell(event)
        if event.reason in (CONVERTED, ALLOWED):
            return
        self.stray |= event.op == "listen"
        tenant = self.registry.tenants.get(event.tenant)
        if tenant is None:  # its sockets outlive it; the host's own are of nobody
            return
        self.refusals.tell(event, tenant)
        kept = self.denials.setdefault(event.tenant, deque(maxlen=DENIALS_KEPT))
        kept.append(event)

    def last_refused(
        self, tenant: Tenant | None, sees: Callable[[Tenant | None], bool] = lambda _: True
    ) -> list[dict[str, Any]]:
        """What was refused last to a tenant and the wrappers inside it, or to all, in JSON, the oldest first.

        @sees: may it be shown?
        """
        found = []
        for number, events in self.denials.items():
            whose = self.registry.tenants.get(number)
            if sees(whose) and (tenant is None or (whose and tenant in (whose, whose.parent))):
                found += [self.readers.document(event, whose, {}) for event in events]
        return sorted(found, key=lambda document: document["time"])
