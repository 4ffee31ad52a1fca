"""The entrance of a container's netns, from graftd's side: which netns has one, and how it is made, kept and found.

It is a listener in the netns, and the link of the program that leads there (graft/kernel/entrance.py).

Which netns has one? One that was made for the container, by graft or by the container's engine, for root of the host.
There the container's servers come first: the program takes a connection before the kernel looks for a listener of the
netns. So it must not be where others live: in graftd's own netns, in one that endpoints name, in one that somebody
has prepared or shares (`graft run --netns`), in one that belongs to another user namespace, whose owner may have real
sockets there, or in one where a program of the netns's own listens.
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from graft.errors import Refused
from graft.kernel import diag, linux
from graft.kernel.entrance import Entrances
from graft.kernel.netns import belongs_here
from graft.kernel.stamps import OWN_TENANT
from graft.log import log
from graft.process.store import Store
from graft.tenants.tenant import CONTAINER, Tenant
from graft.trap.sockets import Stamps

BACKLOG = 64
DOCKERS = "127.0.0.11"  # dockerd's resolver is in the netns of each container on a network, at a port of chance
# The address that nobody has (RFC 7600). Where it is one of IPv6, the socket would take that family alone. At the
# address itself nothing is found (csrc/forward.bpf.h, ENTRANCE_IP).
NOWHERE = "192.0.0.8"


class Door(NamedTuple):
    """One entrance."""

    listener: socket.socket
    link: int


class Doors:
    """Makes the entrances and keeps them in the descriptor store. Only the loop's thread calls it.

    @is_hosts: is the netns with this inode graftd's own, or one that an endpoint names? @ipv6: does the kernel have
    IPv6?
    """

    def __init__(
        self, store: Store, stamps: Stamps, programs: Entrances, is_hosts: Callable[[int], bool], *, ipv6: bool
    ) -> None:
        self.store = store
        self.stamps = stamps
        self.programs = programs
        self.is_hosts = is_hosts
        self.ipv6 = ipv6

    def may_be(self, tenant: Tenant) -> bool:
        """May this tenant's netns have an entrance?"""
        return (
            tenant.kind == CONTAINER
            and tenant.trusted
            and tenant.netns_made
            and tenant.netns_fd >= 0
            and not self.is_hosts(tenant.netns)
            and _belongs_here(tenant)
        )

    def make(self, tenant: Tenant) -> Door:
        """Make one. Raises Refused where a program of the netns's own listens, Failure, and OSError."""
        others = sorted(set(diag.listening_in(tenant.netns_fd)) - {DOCKERS})
        if others:
            raise Refused(f"a program that is not the container's listens there, at {others[0]}", code="EADDRINUSE")
        listener = self._listen(tenant)
        try:
            link = self.programs.attach(tenant.netns_fd, listener.fileno())
        except BaseException:
            listener.close()
            raise
        door = Door(listener, link)
        for name, fd in self.held(tenant, door):
            self.store.put(name, fd)
        return door

    def end(self, tenant: Tenant, door: Door) -> None:
        """Close one, in the store as well."""
        for name, _ in self.held(tenant, door):
            self.store.remove(name)
        door.listener.close()
        os.close(door.link)

    def held(self, tenant: Tenant, door: Door) -> list[tuple[str, int]]:
        """The (name, descriptor) pairs that a successor needs.

        The name of the link has the common program's map: a link whose program ends in another leads nobody.
        """
        return [
            (f"inside-{tenant.id}", door.listener.fileno()),
            (f"entrance-{tenant.id}-{self.programs.common()}", door.link),
        ]

    def restore(self, tenants: Mapping[int, Tenant], inherited: Iterable[tuple[str, int]]) -> dict[int, Door]:
        """The entrances that a predecessor has stored, by the tenant's id. What is not whole is closed and removed.

        A predecessor may have been killed between two messages to the store. Then a descriptor is alone, or there
        twice.
        """
        found: dict[str, list[tuple[str, int]]] = {}
        for name, fd in inherited:
            kind, _, rest = name.partition("-")
            if kind in ("inside", "entrance"):
                found.setdefault(rest.partition("-")[0], []).append((name, fd))
        doors = {}
        for number, kept in found.items():
            tenant = tenants.get(int(number))
            fds = dict(sorted(kept))
            wanted = [f"entrance-{number}-{self.programs.common()}", f"inside-{number}"]
            if tenant and self.may_be(tenant) and sorted(name for name, _ in kept) == wanted:
                listener = socket.socket(fileno=fds[wanted[1]])
                if listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    doors[tenant.id] = Door(listener, fds[wanted[0]])
                    continue
                listener.detach()
            for name, fd in kept:
                self.store.remove(name)
                os.close(fd)
        return doors

    def _listen(self, tenant: Tenant) -> socket.socket:
        with linux.inside_netns(tenant.netns_fd):
            sock = socket.socket(socket.AF_INET6 if self.ipv6 else socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            self.stamps.stamp(sock.fileno(), OWN_TENANT, 0)
            # The common program knows the tenant by it. What is accepted inherits it: lo has no queue that cares.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, tenant.id)
            sock.setsockopt(socket.IPPROTO_IP, linux.IP_FREEBIND, 1)
            if self.ipv6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((f"::ffff:{NOWHERE}" if self.ipv6 else NOWHERE, 0))
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock


def _belongs_here(tenant: Tenant) -> bool:
    try:
        return belongs_here(tenant.netns_fd)
    except OSError as error:  # no descriptor is left
        log.warning("container %s: nobody inside its netns reaches its servers: %s", tenant.name, error)
        return False
