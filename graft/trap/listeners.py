"""The listeners of this graftd: watched, kept over its death, and given to a graft-sup.

Theory of operation

Every listener has a journal, memory that outlives graftd (graft/trap/journal.py). While a graft-sup runs for the
listener, it receives the calls, answers socket() itself, lets bind() proceed in most direct containers, and forwards
the others; graftd then polls the listener only for its end. Without a graft-sup, graftd receives the calls itself. If
a graft-sup or the graftd before has died, graftd first answers what is left in the journal.

A pod's pause container makes no call as a rule, so its listener is idle: graftd receives its first call, and has a
graft-sup started then. A graft-sup of the pod's other containers keeps a copy of such a listener and its journal, and
shows both after its own (csrc/sup.c), so that they outlive graftd and the keeper as well.

Which thread may touch what

The loop's thread (graft/process/loop.py, graft/daemon/main.py) serves five kinds of sockets: graftd.sock, agent.sock,
helpers.sock, Docker's plugin socket, and the resolver's for UDP and TCP. It also polls the listeners and the
graft-sups, and receives from the listeners that root has handed over. Nobody else may change the registry, its
tenants, the BPF maps of rules, the descriptor store, or which descriptors the loop watches. It alone takes slots from
journals. It must not block.

Worker threads (graft/trap/dispatch.py, at most SLOW_CALLS_ALL) run Supervisor.handle(), then answer. They read
tenants and the registry's `scopes` and `places` without a lock, while the loop's thread may change them, so they read
an attribute once and may see the state before or after a change. What they change: sockets and stamps that they made
or borrowed, the paths and probes of a tenant (Tenant.bound_path, Tenant.probe), `registry.saved`, and the slot of
their call. A thread may enter another netns, since only that thread moves (linux.inside_netns). Changes of
credentials, umask or the descriptor table need a thread of their own (target.apart).

Receiving threads (Listeners.receivers) each wait in one RECV for a listener that a user has handed over, because that
user may have kept a copy and have received the call first. Then they dispatch it.

So the Dispatcher's methods and _listen() run in any thread. Dispatcher.lock guards what these share: `claimed`,
`slow`, `queues`, the counts, the release of claimed slots, and the removal of a listener from `watched`. Nobody
blocks while holding it. A listener's descriptor is closed by the last thread that has one of its slots claimed. From
other threads, only _listen() calls the loop, and it checks under the lock that the listener's number is still
watched.

There are four more kinds of threads, which touch nothing of the above: those that close foreign descriptors
(graft/process/closing.py), those that add addresses in containers' netns (graft/tenants/interfaces.py), those for the
resolver's TCP clients, which only read the registry (graft/engines/resolver.py), and those of target.apart(), for
which their starter waits.
"""

import contextlib
import hmac
import os
import select
import socket
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from graft.kernel.maps import Map
from graft.log import log
from graft.process.key import token
from graft.process.loop import Loop
from graft.process.store import Store
from graft.process.workers import Workers
from graft.rules.sysctl import socket_options
from graft.tenants.direct import DirectContainers
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant
from graft.trap.dispatch import SLOW_CALLS_ALL, Dispatcher, Watched
from graft.trap.journal import SUP_BESIDE, Described, Journal, Slot
from graft.trap.listener import Listener
from graft.trap.spent import Spent
from graft.trap.sup import Direct, Helper, available
from graft.trap.supervisor import Supervisor

RESTARTS = 5
RESTARTS_SECONDS = 60.0
ENDING_SECONDS = 10.0  # a graft-sup takes milliseconds


class Graftd(Protocol):
    """What Listeners needs of graftd (graft/daemon/main.py)."""

    loop: Loop
    store: Store
    registry: Registry
    supervisor: Supervisor

    @property
    def direct(self) -> DirectContainers:
        """Those of this graftd."""

    def ended(self, tenant: Tenant) -> None:
        """Called in the loop's thread when the last process under the tenant's listeners is gone."""

    def left(self, tenant: Tenant, member: str) -> None:
        """Called likewise for one of an engine's containers in it, while others run."""


class Listeners:
    """All listeners of this graftd, and the calls that come from them.

    The public methods belong to the loop's thread. @maps: the BPF maps, by name; @directory: run_dir().
    """

    def __init__(self, daemon: Graftd, maps: Mapping[str, Map], directory: Path) -> None:
        self.daemon = daemon
        self.loop = daemon.loop
        self.store = daemon.store
        self.stamps, self.preparing = maps["stamps"].fd, maps["prepared"].fd
        self.directory = directory
        self.helpers = directory / "helpers.sock"
        self.watched: dict[int, Watched] = {}
        self.next_number = 1
        self.dispatcher = Dispatcher(daemon.supervisor, daemon.registry, self._listen)
        self.lock = self.dispatcher.lock
        self.receivers = Workers(SLOW_CALLS_ALL)
        self.starting: list[tuple[float, Watched]] = []  # (monotonic seconds, start a graft-sup for it then)
        self.ending: list[tuple[float, Helper]] = []  # until when they may take, in monotonic seconds

    # -- listeners --

    def adopt(
        self, tenant: Tenant, fd: int, *, trusted: bool, pid: int = 0, idle: bool = False, member: str = ""
    ) -> None:
        """Store a new listener of a tenant, then watch it. Takes over @fd.

        @trusted: root handed it over. @pid: the process that has it. Its graft-sup is charged to that one's cgroups,
        and has to end with it: of containers that share a netns, each may be removed before the others, and its
        cgroup with it. @idle: no call is expected. @member: of which of an engine's containers in the netns it is.
        """
        idle = idle and not tenant.cgroup  # the /proc/net of a direct container is that of its graft-sup
        number = self.next_number
        self.next_number += 1
        tenant.heard[str(number)] = member
        journal = Journal()
        watched = Watched(Listener(fd, number), journal, tenant, trusted=trusted)
        watched.pid = pid
        self.store.put(watched.stored, fd)
        self.store.put(f"journal-{number}", journal.fd)
        self._watch(watched)
        journal.describe(
            tenant=tenant.id,
            owner=tenant.owner,
            netns=tenant.netns,
            home=self.daemon.registry.home if tenant.cgroup and tenant.netns_fd >= 0 else 0,
            forward=self._forwarded_whole(tenant),
            binds=self._prepares_binds(tenant),
            number=number,
            trusted=trusted,
            token=self._token(tenant.id, number, trusted),
            idle=idle,
            maker=tenant.maker,
        )
        if not idle:
            self._want_helper(watched)

    def _want_helper(self, watched: Watched) -> None:
        """Have a graft-sup started at the next tick, if it is installed.

        graft-sup makes sockets only in graftd's own netns. For a tenant of another place it just forwards the calls,
        and keeps the listener and the journal.
        """
        if available() and watched.tenant.cgroup and watched.tenant.netns_fd >= 0:
            self._start(watched)  # at once: the container's /proc/net is that of graft-sup
        elif available():
            self.starting.append((0.0, watched))

    def _token(self, tenant: int, number: int, trusted: bool) -> bytes:
        return token(f"listener {tenant} {number} {trusted:d}", self.directory)

    def is_ours(self, found: Described) -> bool:
        """Did a graftd of this run directory write the head of this journal? Checks its token."""
        return hmac.compare_digest(found.token, self._token(found.tenant, found.number, found.trusted))

    def _forwarded_whole(self, tenant: Tenant) -> bool:
        """Must graft-sup forward socket() too? Yes if the tenant's netns is another, or it has wrappers inside, or is
        direct.
        """
        return bool(tenant.place or tenant.cgroup or self.daemon.registry.inner(tenant))

    def _prepares_binds(self, tenant: Tenant) -> bool:
        """Does graft-sup prepare the sockets that are about to be bound? Yes for a direct container, unless it may
        have endpoints to which another socket is bound, or has wrappers inside.
        """
        inner = self.daemon.registry.inner(tenant)
        return bool(tenant.cgroup and not tenant.place and not tenant.traps_addresses and not inner)

    def divide(self, tenant: Tenant) -> None:
        """Tell a tenant's graft-sups which calls to forward, after a wrapper inside it has come or gone."""
        for number in tenant.listeners:
            self.watched[number].journal.forward(self._forwarded_whole(tenant))
            self.watched[number].journal.prepare_binds(self._prepares_binds(tenant))

    def restore(self, named: dict[str, int], name: str, fd: int) -> None:
        """Watch a listener that a predecessor had stored as @name; @named is all that it had stored, by name."""
        kind, number, owner = name.split("-")
        self.next_number = max(self.next_number, int(number) + 1)
        tenant = self.daemon.registry.tenants.get(int(owner))
        kept = named.get(f"journal-{number}")
        if tenant is None:
            self.store.remove(name)
            os.close(fd)
            return
        watched = Watched(Listener(fd, int(number)), Journal(kept), tenant, trusted=kind == "listener")
        self._watch(watched)
        if f"sup-{number}" in named:
            self._attach(watched, Helper(socket.socket(fileno=named[f"sup-{number}"])))
        elif not watched.journal.idle:
            self._want_helper(watched)

    def take_over(self, found: Described, listener: int, journal: int, control: int | None) -> bool:
        """Adopt the listener, the journal and the control socket of a graft-sup that has lost its graftd.

        @control: None for an idle listener, of which that graft-sup kept a copy. Returns False, and takes over no
        descriptor, if the tenant is gone, the listener is watched already, or it is idle no more and has its own.
        """
        tenant = self.daemon.registry.tenants.get(found.tenant)
        known = {os.fstat(watched.journal.fd).st_ino for watched in self.watched.values()}
        if tenant is None or found.inode in known or (control is None and not found.idle):
            return False
        number = self.next_number
        self.next_number += 1
        member = tenant.heard.pop(str(found.number), None)
        if member is not None:
            tenant.heard[str(number)] = member
        watched = Watched(Listener(listener, number), Journal(journal), tenant, trusted=found.trusted)
        watched.journal.renumber(number, self._token(tenant.id, number, found.trusted))
        self.store.put(watched.stored, listener)
        self.store.put(f"journal-{number}", journal)
        if control is not None:
            self.store.put(f"sup-{number}", control)
        if not tenant.listeners:
            self.store.put(f"netns-{tenant.id}", tenant.netns_fd)
        self._watch(watched)
        if control is not None:
            self._attach(watched, Helper(socket.socket(fileno=control)))
        self.dispatcher.answer_pending(watched, helper_died=control is None)
        if control is not None:
            log.info("container %s has its supervisor again", tenant.name)
        return True

    def end_helpers(self) -> None:
        """Tell all graft-sups to end, because no graftd will follow this one."""
        for watched in self.watched.values():
            if watched.helper:
                watched.helper.end()

    def forget_strays(self, named: dict[str, int]) -> None:
        """Remove the journals and helpers whose listener ended while no graftd ran. @named: as for restore()."""
        for name, fd in named.items():
            kind, _, number = name.partition("-")
            if kind in ("journal", "sup") and int(number) not in self.watched:
                self.store.remove(name)
                os.close(fd)

    def held(self) -> list[tuple[str, int]]:
        """The (name, descriptor) pairs that a successor needs."""
        found = []
        for number, watched in self.watched.items():
            found.append((watched.stored, watched.listener.fd))
            found.append((f"journal-{number}", watched.journal.fd))
            if watched.helper:
                found.append((f"sup-{number}", watched.helper.control.fileno()))
        return found

    def _watch(self, watched: Watched) -> None:
        self.watched[watched.listener.number] = watched
        watched.tenant.listeners.add(watched.listener.number)
        self.loop.add(watched.listener.fd, lambda events: self._ready(watched, events))

    def _ready(self, watched: Watched, events: int) -> None:
        if events & ~select.EPOLLIN:  # EPOLLHUP: every process of the filter is gone
            self._gone(watched)
        elif watched.helper:
            return
        else:
            if watched.journal.idle:
                watched.journal.woken()
                self._want_helper(watched)
            with self.lock:  # a slot that is released meanwhile has it polled again
                slot = watched.journal.take()
                if slot is None:
                    watched.full = True
                    self.loop.modify(watched.listener.fd, 0)
                elif not watched.trusted:
                    watched.claimed.add(slot.number)
            if slot and watched.trusted:
                self._receive(watched, slot)
            elif slot:
                self._receive_apart(watched, slot)

    def _receive_apart(self, watched: Watched, slot: Slot) -> None:
        """Receive in a thread, because RECV blocks if a user who kept a copy of the listener has received first."""
        self.loop.modify(watched.listener.fd, 0)

        def work() -> None:
            try:
                self._receive(watched, slot)
            finally:
                self._listen(watched)

        try:
            self.receivers.run(work)
        except RuntimeError:  # no thread can be made: the listener's next event tries again
            self.dispatcher.release(watched, slot)
            self._listen(watched)

    def _listen(self, watched: Watched) -> None:
        """Poll the listener for calls again, unless a graft-sup receives them. Any thread may call this."""
        with self.lock, contextlib.suppress(OSError):  # its end is just being handled
            if watched.listener.number in self.watched:  # or the descriptor may be another file by now
                self.loop.modify(watched.listener.fd, 0 if watched.helper else select.EPOLLIN)

    def _gone(self, watched: Watched) -> None:
        listener, tenant = watched.listener, watched.tenant
        self.loop.remove(listener.fd)
        self._detach(watched)
        tenant.listeners.discard(listener.number)
        self.store.remove(watched.stored)
        self.store.remove(f"journal-{listener.number}")
        with self.lock:
            del self.watched[listener.number]
        self.dispatcher.end(watched)
        member = tenant.heard.pop(str(listener.number), "")
        if tenant.listeners:
            self.daemon.direct.follow(tenant)
            others = [tenant.heard.get(str(number)) for number in tenant.listeners]  # None: an earlier graftd's
            if member and member not in others and None not in others:
                self.daemon.left(tenant, member)
        else:
            self.daemon.ended(tenant)

    def reap(self) -> None:
        """Handle the end of containers now, so that a new one can have their names and ports at once."""
        own = {watched.listener.fd: watched for watched in self.watched.values()}
        for fd, events in self.loop.epoll.poll(0):
            if fd in own and events & ~select.EPOLLIN:
                self._gone(own[fd])

    def counted(self) -> tuple[int, int]:
        """How many calls graft-sups have answered, and graftd of socket(), and the nanoseconds they took in all."""
        each = [watched.journal.counted for watched in self.watched.values()]
        done = self.dispatcher
        return done.calls + sum(calls for calls, _ in each), done.ns + sum(ns for _, ns in each)

    def spent(self) -> dict[int, Spent]:
        """How long the trapped calls of each tenant took, by its number."""
        found: defaultdict[int, Spent] = defaultdict(Spent)
        with self.lock:
            for number, spent in self.dispatcher.spent.items():
                found[number].add(spent.counts, spent.ns)
        for watched in self.watched.values():
            found[watched.tenant.id].add(watched.journal.spent, watched.journal.counted[1])
        return found

    def forget(self, tenant: Tenant) -> None:
        """Forget what was counted of a tenant that has ended."""
        with self.lock:
            self.dispatcher.spent.pop(tenant.id, None)

    # -- graft-sup --

    def tick(self) -> float:
        """Start the graft-sups that are due, reap those that have ended, and retry the queues. Run between rounds.

        Returns how many seconds the next round may wait.

        A graft-sup starts here instead of in adopt(), so that whoever handed the listener over has its answer first.
        That of a direct container starts there.
        """
        if self.starting:
            now = time.monotonic()
            due = [watched for when, watched in self.starting if when <= now]
            self.starting = [entry for entry in self.starting if entry[0] > now]
            for watched in due:
                if watched.listener.number in self.watched and not watched.helper:
                    self._start(watched)
        self.ending = [(until, helper) for until, helper in self.ending if not helper.ended()]
        for until, helper in self.ending:
            if until < time.monotonic():
                helper.kill()
        while self.dispatcher.resume(None):
            pass
        return self.dispatcher.wait()

    def _start(self, watched: Watched) -> None:
        helper = Helper.start(
            watched.tenant.name,
            (watched.listener.fd, watched.journal.fd, self.stamps),
            self.helpers,
            watched.pid or watched.tenant.pid,
            socket_options(watched.tenant.sysctls, self.daemon.registry.ephemeral),
            lambda control: self.store.put(f"sup-{watched.listener.number}", control),
            direct=self._direct(watched.tenant),
            beside=self._idle_beside(watched),
        )
        if helper:
            self._attach(watched, helper)
            self.daemon.direct.follow(watched.tenant)
        else:
            self.store.remove(f"sup-{watched.listener.number}")

    def _direct(self, tenant: Tenant) -> Direct | None:
        return Direct(tenant.netns_fd, self.preparing, self.daemon.registry.ephemeral) if tenant.cgroup else None

    def _idle_beside(self, watched: Watched) -> list[tuple[int, int]]:
        """The listener and the journal of each other listener of the tenant that is idle."""
        others = [self.watched[number] for number in watched.tenant.listeners if number != watched.listener.number]
        idle = [other for other in others if other.journal.idle]
        return [(other.listener.fd, other.journal.fd) for other in idle[:SUP_BESIDE]]

    def _attach(self, watched: Watched, helper: Helper) -> None:
        watched.helper = helper
        self.loop.modify(watched.listener.fd, 0)
        self.loop.add(helper.control.fileno(), lambda _events: self._forwarded(watched, helper))

    def _detach(self, watched: Watched) -> None:
        helper, watched.helper = watched.helper, None
        if helper:
            self.store.remove(f"sup-{watched.listener.number}")
            self.loop.remove(helper.control.fileno())
            helper.control.close()
            self.ending.append((time.monotonic() + ENDING_SECONDS, helper))

    def _forwarded(self, watched: Watched, helper: Helper) -> None:
        number = helper.forwarded()
        if number is None:
            self._lost(watched)
        elif number >= 0:
            with self.lock:  # a slot can be released, but still claimed, and hold the next call
                waiting = number not in watched.claimed and watched.journal.forwarded(number)
            if waiting:
                self.dispatcher.dispatch(watched, Slot(watched.journal, number))

    def _lost(self, watched: Watched) -> None:
        """A graft-sup has died: answer the calls that it had, receive in its place, and have another started."""
        self._detach(watched)
        now = time.monotonic()
        watched.restarts = [t for t in watched.restarts if now - t < RESTARTS_SECONDS] + [now]
        self.dispatcher.answer_pending(watched, helper_died=True)
        self._listen(watched)
        often = len(watched.restarts) > RESTARTS
        if often:
            log.error("graft-sup of %s keeps ending: graftd answers its calls for a minute", watched.tenant.name)
        self.starting.append((now + RESTARTS_SECONDS if often else 0.0, watched))

    # -- calls --

    def _receive(self, watched: Watched, slot: Slot) -> None:
        try:
            received = watched.listener.receive(slot.journal.raw(slot.number))
        except OSError as error:
            log.error("cannot receive a call of %s: %s", watched.tenant.name, error)
            received = False
        if received:
            self.dispatcher.dispatch(watched, slot)
        else:
            self.dispatcher.release(watched, slot)
