"""The open sockets of containers: asked of the kernel in a thread, and told by container.

A stamp says whose a TCP socket is. One that accept() gave has none, and one that a direct container connects with
nothing to note. Those are known by their cgroup, by the listener that they come from, or by their address. Of UDP the
kernel shows no stamp: whose it is says the owner, or the address; what is left is told without a container, and the
command finds it by the process.
"""

import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from graft.kernel import linux
from graft.kernel.cgroup import cgroup_of
from graft.kernel.direct import directory_of
from graft.kernel.open_sockets import STATES, Open, open_sockets
from graft.kernel.stamps import OWN_TENANT, STAMP_CONNECTED, Stamp
from graft.log import log
from graft.process.lines import Lines, Then
from graft.process.loop import Loop
from graft.rules.address import ANY4, ANY6, PROTOCOL_NAME, Address
from graft.rules.slices import SLICE4_MASK, SLICE4_NET, SLICE6_PREFIX, SLICE_DYNAMIC, SLICE_GROUP, SLICE_SHIFT
from graft.rules.tables import INET, INET6
from graft.tenants.registry import Registry

DYNAMIC_KEY = struct.Struct("=IBBH")  # struct graft_dynamic_key
USED = 16  # GRAFT_USED
SPAN_MAX = 1024  # ports of a publication that are known again
REST_MAX = 1.0  # seconds
UNSTAMPED = Stamp(OWN_TENANT)
LOOPBACK4, LOOPBACK6 = ANY4[:12] + bytes((127, 0, 0, 1)), (1).to_bytes(16, "big")
At = tuple[bytes, int]


class Owned(NamedTuple):
    """A socket, the number of its tenant, and where its program believes it to be."""

    tenant: int
    asked: At
    peer: At
    accepted: bool
    socket: Open


class OpenSockets:
    """Asks for the open sockets of all containers. For the loop's thread."""

    def __init__(self, loop: Loop, registry: Registry) -> None:
        self.registry = registry
        self._lines = Lines(loop, 1, lambda: None)
        self._waiting: list[tuple[Callable[[Any], None], Callable[[list[Owned]], Any]]] = []
        self._rested = 0.0  # by time.monotonic(): when the thread has rested as long as its last look took

    def ask(self, then: Callable[[Any], None], work: Callable[[list[Owned]], Any] = list) -> None:
        """Have @then called, in the loop, with what @work, in a thread, makes of all sockets that containers have.

        Who asks meanwhile gets the same sockets. The thread rests as long as it has looked, so that users who ask
        without a pause leave graftd half of its time.
        """
        self._waiting.append((then, work))
        self._lines.push("sockets", self._begin)

    def _begin(self) -> Callable[[], Then] | None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return None
        whose = Whose(self.registry, directory_of(cgroup_of(os.getpid())).stat().st_ino)
        places = [os.dup(place.fd) for place in self.registry.places.values()]
        return partial(self._look, whose, places, waiting)

    def _look(self, whose: "Whose", places: list[int], waiting: Iterable[Any]) -> Then:
        time.sleep(max(0.0, self._rested - time.monotonic()))
        began = time.monotonic()
        stamps, found = self.registry.kernel.maps["stamps"].fd, []
        try:
            found = list(open_sockets(stamps))
            for fd in places:
                with linux.inside_netns(fd):
                    found += open_sockets(stamps)
        except OSError as error:
            log.error("the open sockets cannot be looked at: %s", error.strerror)
        finally:
            for fd in places:
                os.close(fd)
        owned = whose.owned(found)
        results = [(call, work(owned)) for call, work in waiting]
        took = time.monotonic() - began
        self._rested = began + took + min(took, REST_MAX)

        def then() -> None:
            for call, result in results:
                call(result)

        return then


class Whose:
    """By what a socket is known to be a container's: a copy of what the registry has, for another thread."""

    def __init__(self, registry: Registry, cgroup: int) -> None:
        """@cgroup: the inode of the one in which graftd makes sockets."""
        self.cgroup = cgroup
        self.tenants = set(registry.tenants)
        self.cgroups: dict[int, int] = {}
        self.slices: dict[int, int] = {}
        self.holders: dict[bytes, int] = {}
        self.owners: dict[int, int] = {}
        self.dynamic = registry.kernel.maps["dynamic_ports"]
        self.led: dict[At, tuple[int, int]] = {}  # of those, where TCP is led to a tenant that is bound elsewhere
        self.published: dict[tuple[int, At], tuple[int, int]] = {}  # of the host's ports: whose, the program's port
        for tenant in registry.tenants.values():
            for path in tenant.cgroups:
                try:
                    self.cgroups[directory_of(path).stat().st_ino] = tenant.id
                except FileNotFoundError:
                    continue
            for n in range(SLICE_GROUP if tenant.wide else 1):
                self.slices[tenant.slice_number + n] = tenant.id
            if not tenant.shares:
                self.owners[tenant.owner] = tenant.id
            self.holders |= {own.address.raw: tenant.id for own in tenant.owned}
            for rule in tenant.ingress:
                endpoint = tenant.endpoints.get(rule.endpoint)
                if endpoint and endpoint.address and endpoint.port:
                    for n in range(min(endpoint.span, SPAN_MAX)):
                        at = endpoint.address.raw, endpoint.port + n
                        for protocol in rule.protocols:
                            self.published[protocol, at] = tenant.id, rule.first + n
                        if rule.endpoint in tenant.led:
                            self.led[at] = tenant.id, rule.first + n

    def owned(self, found: Iterable[Open]) -> list[Owned]:
        """Those of @found that are a container's."""
        every = list(found)
        listeners = {
            (one.stamp.tenant if one.cgroup in self.cgroups else 0, one.local): one.stamp
            for one in every
            if one.stamp and STATES[one.state] == "LISTEN"
        }
        owned = []
        for one in every:
            known = self._stamped(one) if one.stamp else self._unstamped(one, listeners)
            if known and (known.tenant in self.tenants or not known.tenant):
                owned.append(known)
        return owned

    def _stamped(self, one: Open) -> Owned:
        stamp = one.stamp or UNSTAMPED
        asked, peer = stamp.local if stamp.local != (bytes(16), 0) else one.local, one.peer
        if not asked[1] and one.local[1]:
            asked = asked[0], one.local[1]
        if stamp.flags & STAMP_CONNECTED and peer == stamp.peer_real:
            peer = stamp.peer
        return Owned(stamp.tenant, self._shown(asked), self._shown(peer), False, one)

    def _unstamped(self, one: Open, listeners: Mapping[tuple[int, At], Stamp]) -> Owned | None:
        direct = self.cgroups.get(one.cgroup, 0)
        if not direct and one.cgroup != self.cgroup:
            return None
        raw, port = one.local
        if one.protocol == socket.IPPROTO_UDP:
            return self._datagram(one, direct)
        anywhere = (raw, ANY4 if raw[:12] == ANY4[:12] else ANY6, ANY6)
        for at in anywhere[:2]:
            tenant, asked_port = self.led.get((at, port), (0, 0))
            if tenant and direct in (0, tenant):
                return Owned(tenant, (raw, asked_port), self._shown(one.peer), True, one)
        for at in anywhere:
            stamp = listeners.get((direct, (at, port)))
            if stamp:
                asked = raw if stamp.local[0] in (ANY4, ANY6) and not self._slice(raw) else stamp.local[0]
                return Owned(stamp.tenant, (asked, stamp.local[1]), self._shown(one.peer), True, one)
        for at in anywhere:
            tenant, asked_port = self.published.get((one.protocol, (at, port)), (0, 0))
            if tenant and direct in (0, tenant):
                return Owned(tenant, (raw, asked_port), one.peer, True, one)
        tenant = direct or self.holders.get(raw, 0) or self._slice(raw)
        accepted = bool(self._slice(raw)) or not direct
        return Owned(tenant, self._shown(one.local), self._shown(one.peer), accepted, one)

    def _datagram(self, one: Open, direct: int) -> Owned:
        raw, port = one.local
        tenant = direct or self.owners.get(one.uid, 0) or self.holders.get(raw, 0) or self._slice(raw)
        whose, asked_port = self.published.get((one.protocol, one.local), (0, 0))
        if whose and tenant in (0, whose):
            return Owned(whose, (raw, asked_port), self._shown(one.peer), False, one)
        family = INET if raw[:12] == ANY4[:12] else INET6
        chosen = self.dynamic.get(DYNAMIC_KEY.pack(tenant, one.protocol, family | USED, port)) if tenant else None
        asked = (raw, int.from_bytes(chosen[:2], "little")) if chosen else self._shown(one.local)
        return Owned(tenant, asked, self._shown(one.peer), False, one)

    def _slice(self, raw: bytes) -> int:
        """The tenant whose loopback's address this is; 0: nobody's."""
        return self.slices.get(slice_number(raw)[0], 0)

    def _shown(self, at: At) -> At:
        """An address of a container's loopback as the container knows it."""
        number, index = slice_number(at[0])
        if not self.slices.get(number):
            return at
        loopback = LOOPBACK4 if at[0][:12] == ANY4[:12] else LOOPBACK6
        return loopback, at[1] if index >= SLICE_DYNAMIC else index << 12 | at[1] & 0xFFF


def slice_number(raw: bytes) -> tuple[int, int]:
    """The slice number that an address is in, and which of its addresses it is; (0, 0): it is in none."""
    if raw[:12] == ANY4[:12]:
        ip = int.from_bytes(raw[12:], "big")
        place = ip & ~SLICE4_MASK
        return (place >> SLICE_SHIFT, place & (1 << SLICE_SHIFT) - 1) if ip & SLICE4_MASK == SLICE4_NET else (0, 0)
    if not raw.startswith(SLICE6_PREFIX):
        return 0, 0
    return int.from_bytes(raw[8:12], "big"), int.from_bytes(raw[12:], "big")


def socket_document(owned: Owned, container: str) -> dict[str, Any]:
    """An open socket in JSON."""
    one = owned.socket
    state = STATES[one.state] if one.protocol == socket.IPPROTO_TCP or one.peer[1] else "UNCONN"
    connected = bool(one.peer[1])
    return {
        "container": container,
        "protocol": PROTOCOL_NAME[one.protocol],
        "state": state,
        "local": _text(owned.asked),
        "local_real": _text(one.local),
        "peer": _text(owned.peer) if connected else "",
        "peer_real": _text(one.peer) if connected else "",
        "accepted": owned.accepted,
        "receive_queue": one.queued[0],
        "send_queue": one.queued[1],
        "bytes_received": one.received,
        "bytes_sent": one.sent,
        "segments_received": one.segments_in,
        "segments_sent": one.segments_out,
        "idle": one.idle / 1000,
        "rate": one.rate,
        "uid": one.uid,
        "inode": one.inode,
    }


def _text(at: At) -> str:
    return Address(at[0]).with_port(at[1])
