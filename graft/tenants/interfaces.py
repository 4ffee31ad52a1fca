"""The addresses in containers' netns, kept equal to what graft/tenants/inside.py says, and removed at their end.

Theory of operation

Who adds an address or a device takes the kernel's rtnl lock, and may wait for it as long as somebody else likes
(graft/kernel/rtnetlink.py). So threads do that (graft/process/lines.py), and the loop goes on. A thread gets copies:
a descriptor of the netns, addresses, names. It touches no tenant. What has come of it is noted in the loop. The jobs
of one netns are done one after the other, also those of a container that follows another in a named netns.

A start waits for its addresses, WAIT_SECONDS and a tick at most, and goes on without. Nothing that fails here keeps a
container from running, and what fails is tried again every RETRY_SECONDS. When the host's own addresses change, all
containers are looked at, REFRESHED_AT_ONCE at the same time, so that a start need not wait for all of them.

Nothing is done in a netns that is the host's, or that has a device which is not graft's: there whoever made that has
seen to the addresses.
"""

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from graft.kernel import nowhere
from graft.kernel.addresses import outward
from graft.kernel.nowhere import LO, Order, Outcome
from graft.kernel.rtnetlink import reason
from graft.log import log
from graft.process.lines import Job, Lines, Then
from graft.process.loop import Loop
from graft.rules.address import Address
from graft.rules.configuration import ADDRESS_WAIT_MOST, Configuration
from graft.tenants.inside import device_of, shown, wanted
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant
from graft.text import plain

BRIEF_SECONDS = 0.02
RETRY_SECONDS = 30.0
FINISH_SECONDS = 1.0
THREADS, REFRESHED_AT_ONCE = 6, 2
HOST = "host"  # the key of the jobs that look from where the host sends


def patience(configured: float) -> float:
    """The seconds that a start waits for its addresses: GRAFT_ADDRESS_WAIT of the environment, else @configured."""
    told = os.environ.get("GRAFT_ADDRESS_WAIT", "")
    with contextlib.suppress(ValueError):
        if 0 <= float(told) <= ADDRESS_WAIT_MOST:
            return float(told)
    if told:
        log.warning(
            "GRAFT_ADDRESS_WAIT=%s is no number of seconds from 0 to %d; %g is in force",
            plain(told),
            ADDRESS_WAIT_MOST,
            configured,
        )
    return configured


@dataclass(frozen=True)
class _Turn:
    """What is begun for a tenant when its turn comes. Two of the same are equal, so that one is in line once."""

    begin: Callable[[Tenant], Job | None]
    tenant: Tenant

    def __call__(self) -> Job | None:
        return self.begin(self.tenant)


class Interfaces:
    """Looks after the addresses of all containers. All methods are for the loop's thread.

    @is_hosts: is the netns with this inode graftd's own, or one that an endpoint names?
    """

    def __init__(self, loop: Loop, registry: Registry, is_hosts: Callable[[int], bool]) -> None:
        self.registry = registry
        self.is_hosts = is_hosts
        self.patience = Configuration().address_wait  # until the configuration is in force
        self._lines = Lines(loop, THREADS, self._changed)
        self._outward_known = False
        self._stale: deque[Tenant] = deque()  # to be looked at when there is time
        self._failed: set[Tenant] = set()
        self._retry_at = time.monotonic() + RETRY_SECONDS
        self._told: set[Tenant] = set()  # whose netns has somebody else's device; it is logged once
        self._waiting: list[tuple[float, Tenant, Callable[[], None]]] = []  # until when, for whom, what then

    def tick(self) -> None:
        """Look at the containers whose addresses have changed, and at what is due. Before each round of the loop."""
        self._look_at_moved()
        if time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            self._stale.extend(self._failed)
        self._changed()

    def refresh(self) -> None:
        """Look again from where the host sends. If that has changed, all containers are looked at."""
        self._lines.push(HOST, self._ask_host)

    def withdraw(self, tenant: Tenant) -> None:
        """Remove what a container's netns has of graft's, before the container is forgotten: it may have a name."""
        for those in (self.registry.moved, self._told, self._failed):
            those.discard(tenant)
        if tenant.netns_fd < 0 or not (_has_any(tenant) or self._lines.is_busy(tenant.table.cookie)):
            return
        try:
            fd = os.dup(tenant.netns_fd)
        except OSError as error:
            _tell_left(tenant.name, (reason(error),))
            return
        self._lines.push(tenant.table.cookie, partial(self._leave, tenant, fd))

    def when_there(self, tenant: Tenant, call: Callable[[], None]) -> bool:
        """Have @call called when a container has its addresses, or `patience` seconds have passed. False: it has
        them.

        The loop itself waits for BRIEF_SECONDS, which mostly does. Its next round may take longer, because it
        starts a graft-sup.
        """
        self._look_at_moved()
        self._lines.wait(tenant.table.cookie, BRIEF_SECONDS)
        if self._has_come(tenant):
            return False
        self._waiting.append((time.monotonic() + self.patience, tenant, call))
        return True

    def finish(self) -> None:
        """Wait for what has begun, FINISH_SECONDS at most, at graftd's end: nobody does it later. Nobody waits on."""
        self._lines.finish(FINISH_SECONDS)
        waiting, self._waiting = self._waiting, []
        for _, _, call in waiting:
            call()
        if not self.registry.saved:
            self.registry.save()

    def _has_come(self, tenant: Tenant) -> bool:
        return tenant not in self.registry.moved and not self._lines.is_busy(tenant.table.cookie)

    def _changed(self) -> None:
        while self._stale and len(self._lines) < REFRESHED_AT_ONCE:
            self._look_at(self._stale.popleft())
        now, waiting = time.monotonic(), self._waiting
        self._waiting = []
        for entry in waiting:
            until, tenant, call = entry
            if until > now and not self._has_come(tenant):
                self._waiting.append(entry)
            else:
                call()

    def _look_at_moved(self) -> None:
        while self.registry.moved and self._outward_known:
            self._look_at(self.registry.moved.pop())

    def _ask_host(self) -> Job:
        return partial(_find_outward, self._know_outward)

    def _know_outward(self, found: dict[bool, Address] | None) -> None:
        """@found: from where the host sends; None if that could not be asked."""
        if not self._outward_known or found not in (None, self.registry.outward):
            self.registry.outward = found or {}
            self._stale = deque(self.registry.tenants.values())
        self._outward_known = True

    def _look_at(self, tenant: Tenant) -> None:
        self._lines.push(tenant.table.cookie, _Turn(self._begin, tenant))

    def _begin(self, tenant: Tenant) -> Job | None:
        """The job that a container's netns needs now; None if it needs none."""
        known = self.registry.tenants.get(tenant.id) is tenant and tenant.netns_fd >= 0
        if not known or self.is_hosts(tenant.netns):
            return None
        new, old = wanted(self.registry, tenant), shown(tenant)
        if new == old and tenant not in self._failed:
            return None
        ipv6 = any(not own.address.v4 for own in tenant.owned)
        order = Order(new, old, device_of(self.registry, tenant), ipv6)
        try:
            return partial(_put, os.dup(tenant.netns_fd), order, partial(self._note, tenant))
        except OSError as error:
            self._note(tenant, Outcome(old, failed=(reason(error),)))
            return None

    def _note(self, tenant: Tenant, outcome: Outcome) -> None:
        device = LO if outcome.deviceless else outcome.device or tenant.device
        texts = {str(address): name for address, name in outcome.shown.items()}
        if (texts, device) != (tenant.shown, tenant.device):
            tenant.shown, tenant.device = texts, device
            self.registry.saved = False  # one save for many, at the next tick
        if self.registry.tenants.get(tenant.id) is not tenant:
            return
        if outcome.foreign and tenant not in self._told:
            self._told.add(tenant)
            name = outcome.foreign
            log.info("container %s: its namespace has the device %s, so it gets no address", tenant.name, name)
        if outcome.deviceless:
            log.warning("container %s: its addresses are on lo: %s", tenant.name, outcome.deviceless)
        if outcome.failed and tenant not in self._failed:
            log.warning("container %s: its addresses inside: %s; trying again", tenant.name, outcome.failed[0])
        (self._failed.add if outcome.failed else self._failed.discard)(tenant)

    def _leave(self, tenant: Tenant, fd: int) -> Job | None:
        """The job that removes what there is; None if there is nothing. @fd is closed."""
        if not _has_any(tenant) or self.is_hosts(tenant.netns):
            os.close(fd)
            return None
        device = "" if tenant.device == LO else tenant.device
        return partial(_clear, fd, Order({}, shown(tenant), device), tenant.name)


def _has_any(tenant: Tenant) -> bool:
    return bool(tenant.shown) or tenant.device not in ("", LO)


# -- in threads --


def _find_outward(know: Callable[[dict[bool, Address] | None], None]) -> Then:
    try:
        return partial(know, outward())
    except OSError as error:
        log.warning("the host's addresses: %s", error)
        return partial(know, None)


def _put(fd: int, order: Order, note: Callable[[Outcome], None]) -> Then:
    try:
        return partial(note, nowhere.put(fd, order))
    except OSError as error:
        return partial(note, Outcome(order.old, failed=(reason(error),)))
    finally:
        os.close(fd)


def _clear(fd: int, order: Order, name: str) -> Then:
    try:
        failed = nowhere.clear(fd, order)
    except OSError as error:
        failed = (reason(error),)
    finally:
        os.close(fd)
    return partial(_tell_left, name, failed)


def _tell_left(name: str, failed: tuple[str, ...]) -> None:
    if failed:
        log.warning("container %s: left in its namespace: %s", name, failed[0])
