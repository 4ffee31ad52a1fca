"""Trapped calls, from the listener to the answer.

Every listener has a journal, memory that outlives graftd (graft/notify.py). Where graft-sup runs beside the
container, it receives, answers socket() and forwards the rest; graftd then watches the listener for its end alone.
Where it does not, or has died, graftd receives itself, and first answers what is in the journal.

A call is decided and answered by a thread, at most SLOW_CALLS at a time for a container (or an unprivileged user's
wrappers together): another program may serve the memory that it reads, or hold the socket's lock, and never come
back, and a descriptor is added when the target runs again, which others may keep it from. More of them wait their
turn.
"""

import contextlib
import errno
import hmac
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from functools import partial
from pathlib import Path
from typing import Protocol

from graft import linux, seal
from graft.actions import Action, Answer, Inject, Replace
from graft.helper import Helper, available
from graft.log import log
from graft.loop import Loop
from graft.notify import ANSWER_NUMBER, ANSWER_PROCEED, Described, Journal, Listener, Notification, Slot
from graft.registry import Registry, Tenant
from graft.scope import SCOPE_SLACK
from graft.store import Store
from graft.supervisor import Supervisor
from graft.target import watch_again
from graft.workers import Workers

SLOW_CALLS = 4
SLOW_CALLS_ALL = 512
RESTARTS = 5
RESTARTS_SECONDS = 60.0


class Host(Protocol):
    """What the calls need of graftd."""

    loop: Loop
    store: Store
    registry: Registry
    supervisor: Supervisor

    def ended(self, tenant: Tenant) -> None:
        """The last process under the tenant's listeners is gone."""


class Watched:
    """A listener, its journal, whose it is, and who receives from it. @trusted: root handed it over."""

    def __init__(self, listener: Listener, journal: Journal, tenant: Tenant, *, trusted: bool) -> None:
        self.listener = listener
        self.journal = journal
        self.tenant = tenant
        self.trusted = trusted
        self.helper: Helper | None = None
        self.claimed: set[int] = set()  # slots that graftd is busy with
        self.full = False
        self.restarts: list[float] = []

    @property
    def stored(self) -> str:
        """The name of the listener in the descriptor store."""
        return f"{'listener' if self.trusted else 'foreign'}-{self.listener.number}-{self.tenant.id}"

    @property
    def account(self) -> tuple[str, int]:
        """Whose share of the slow calls its calls take."""
        return ("tenant", self.tenant.id) if self.trusted else ("uid", self.tenant.uid)


class Calls:
    """The listeners and what comes from them."""

    def __init__(self, daemon: Host, stamps: int, directory: Path) -> None:
        self.daemon = daemon
        self.loop = daemon.loop
        self.store = daemon.store
        self.stamps = stamps
        self.directory = directory
        self.helpers = directory / "helpers.sock"
        self.watched: dict[int, Watched] = {}
        self.next_number = 1
        self.lock = threading.Lock()
        self.workers = Workers(SLOW_CALLS_ALL)
        self.receivers = Workers(SLOW_CALLS_ALL)
        self.slow: Counter[tuple[str, int]] = Counter()
        self.queues: dict[tuple[str, int], deque[tuple[Watched, Slot]]] = {}
        self.starting: list[tuple[float, Watched]] = []  # from when on
        self.ending: list[Helper] = []
        self.calls = 0
        self.ns = 0

    # -- listeners --

    def adopt(self, tenant: Tenant, fd: int, *, trusted: bool) -> None:
        """Keep a new listener of a tenant safe, then listen."""
        number = self.next_number
        self.next_number += 1
        journal = Journal()
        watched = Watched(Listener(fd, number), journal, tenant, trusted=trusted)
        self.store.put(watched.stored, fd)
        self.store.put(f"journal-{number}", journal.fd)
        self._watch(watched)
        journal.describe(
            tenant=tenant.id,
            owner=tenant.owner,
            flags6=self.daemon.supervisor.v6_flags,
            netns=tenant.netns,
            forward=self._forwarded_whole(tenant),
            number=number,
            trusted=trusted,
            token=self._token(tenant.id, number, trusted),
        )
        self._want_helper(watched)

    def _want_helper(self, watched: Watched) -> None:
        """graft-sup makes sockets in graftd's own netns alone; beside a tenant of another it forwards and keeps."""
        if available():
            self.starting.append((0.0, watched))

    def _token(self, tenant: int, number: int, trusted: bool) -> bytes:
        return seal.token(f"listener {tenant} {number} {trusted:d}", self.directory)

    def is_ours(self, found: Described) -> bool:
        """Did a graftd of this run directory write this journal's head?"""
        return hmac.compare_digest(found.token, self._token(found.tenant, found.number, found.trusted))

    def _forwarded_whole(self, tenant: Tenant) -> bool:
        """Is every socket() call graftd's: depends what it gives on who calls, or is it made in another netns?"""
        return bool(tenant.place or self.daemon.registry.inner(tenant))

    def divide(self, tenant: Tenant) -> None:
        """Wrappers inside a tenant have come or gone."""
        for number in tenant.listeners:
            self.watched[number].journal.forward(self._forwarded_whole(tenant))

    def restore(self, named: dict[str, int], name: str, fd: int) -> None:
        """Listen again on what a predecessor had stored as @name; @named is all that it had stored."""
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
        else:
            self._want_helper(watched)

    def take_over(self, found: Described, listener: int, journal: int, control: int) -> bool:
        """Go on with what a graft-sup has kept alone; False if its tenant is gone, or somebody else supervises it."""
        tenant = self.daemon.registry.tenants.get(found.tenant)
        known = {os.fstat(watched.journal.fd).st_ino for watched in self.watched.values()}
        if tenant is None or found.inode in known:
            return False
        number = self.next_number
        self.next_number += 1
        watched = Watched(Listener(listener, number), Journal(journal), tenant, trusted=found.trusted)
        watched.journal.renumber(number, self._token(tenant.id, number, found.trusted))
        helper = Helper(socket.socket(fileno=control))
        self.store.put(watched.stored, listener)
        self.store.put(f"journal-{number}", journal)
        self.store.put(f"sup-{number}", control)
        if not tenant.listeners:
            self.store.put(f"netns-{tenant.id}", tenant.netns_fd)
        self._watch(watched)
        self._attach(watched, helper)
        self.answer_pending(watched, helper_died=False)
        log.info("container %s has its supervisor again", tenant.name)
        return True

    def end_helpers(self) -> None:
        """Nobody is to come after this graftd."""
        for watched in self.watched.values():
            if watched.helper:
                watched.helper.end()

    def forget_strays(self, named: dict[str, int]) -> None:
        """Journals and helpers whose listener ended while no graftd was there to see it."""
        for name, fd in named.items():
            kind, _, number = name.partition("-")
            if kind in ("journal", "sup") and int(number) not in self.watched:
                self.store.remove(name)
                os.close(fd)

    def held(self) -> list[tuple[str, int]]:
        """Everything that a successor needs, by name."""
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
            slot = watched.journal.take()
            if slot is None:
                watched.full = True
                self.loop.modify(watched.listener.fd, 0)
            elif watched.trusted:
                self._receive(watched, slot)
            else:
                with self.lock:
                    watched.claimed.add(slot.number)
                self._receive_apart(watched, slot)

    def _receive_apart(self, watched: Watched, slot: Slot) -> None:
        """Whoever kept a copy of its listener may receive first; then RECV waits, and must not wait in the loop."""
        self.loop.modify(watched.listener.fd, 0)

        def work() -> None:
            try:
                self._receive(watched, slot)
            finally:
                self._listen(watched)

        try:
            self.receivers.run(work)
        except RuntimeError:  # no thread to be had: tried again with the listener's next event
            self._forget(watched, slot)
            self._listen(watched)

    def _listen(self, watched: Watched) -> None:
        """Receive in the loop, if nobody else does; from any thread."""
        with self.lock, contextlib.suppress(OSError):  # its end is being noticed
            if watched.listener.number in self.watched:  # else the number may be another's by now
                self.loop.modify(watched.listener.fd, 0 if watched.helper else select.EPOLLIN)

    def _gone(self, watched: Watched) -> None:
        listener, tenant = watched.listener, watched.tenant
        self.loop.remove(listener.fd)
        self._detach(watched)
        calls, ns = watched.journal.counted
        self.calls, self.ns = self.calls + calls, self.ns + ns
        tenant.listeners.discard(listener.number)
        self.store.remove(watched.stored)
        self.store.remove(f"journal-{listener.number}")
        with self.lock:
            del self.watched[listener.number]
            idle = not watched.claimed
        if idle:  # else a thread has an answer under way, and closes them
            self._close(watched)
        if not tenant.listeners:
            self.daemon.ended(tenant)

    @staticmethod
    def _close(watched: Watched) -> None:
        os.close(watched.listener.fd)
        watched.journal.close()

    def reap(self) -> None:
        """Notice containers that ended a moment ago, before a new one asks for their name or ports."""
        own = {watched.listener.fd: watched for watched in self.watched.values()}
        for fd, events in self.loop.epoll.poll(0):
            if fd in own and events & ~select.EPOLLIN:
                self._gone(own[fd])

    def counted(self) -> tuple[int, int]:
        """Quick calls answered so far, and the nanoseconds that they took, graft-sup's included."""
        each = [watched.journal.counted for watched in self.watched.values()]
        return self.calls + sum(calls for calls, _ in each), self.ns + sum(ns for _, ns in each)

    # -- graft-sup --

    def tick(self) -> None:
        """Start what is to be started, after its listener's owner has had its answer; reap what has ended."""
        if self.starting:
            now = time.monotonic()
            due = [watched for when, watched in self.starting if when <= now]
            self.starting = [entry for entry in self.starting if entry[0] > now]
            for watched in due:
                if watched.listener.number in self.watched and not watched.helper:
                    self._start(watched)
        self.ending = [helper for helper in self.ending if not helper.ended()]
        if self.queues:
            self._next(None)

    def _start(self, watched: Watched) -> None:
        helper = Helper.start(
            watched.tenant.name,
            (watched.listener.fd, watched.journal.fd, self.stamps),
            self.helpers,
            watched.tenant.pid,
            lambda control: self.store.put(f"sup-{watched.listener.number}", control),
        )
        if helper:
            self._attach(watched, helper)
        else:
            self.store.remove(f"sup-{watched.listener.number}")

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
            self.ending.append(helper)

    def _forwarded(self, watched: Watched, helper: Helper) -> None:
        number = helper.forwarded()
        if number is None:
            self._lost(watched)
        elif number >= 0:
            with self.lock:  # a slot that is released and claimed yet has the next call already
                waiting = number not in watched.claimed and watched.journal.forwarded(number)
            if waiting:
                self._dispatch(watched, Slot(watched.journal, number))

    def _lost(self, watched: Watched) -> None:
        """graft-sup has died: answer what it had, receive in its place, start another."""
        self._detach(watched)
        now = time.monotonic()
        watched.restarts = [t for t in watched.restarts if now - t < RESTARTS_SECONDS] + [now]
        self.answer_pending(watched, helper_died=True)
        self._listen(watched)
        often = len(watched.restarts) > RESTARTS
        if often:
            log.error("graft-sup of %s ends again and again: graftd answers for a while", watched.tenant.name)
        self.starting.append((now + RESTARTS_SECONDS if often else 0.0, watched))

    def answer_pending(self, watched: Watched, *, helper_died: bool) -> None:
        """Answer what a predecessor, or a graft-sup that has died, had received and not answered."""
        with self.lock:  # a thread releases a slot, and then gives up its claim
            claimed = frozenset(watched.claimed)
        for slot, call, inode, answer in watched.journal.pending(held=helper_died, besides=claimed):
            given = find_socket(call.pid, inode) if inode else None
            if given is None:
                self._dispatch(watched, slot)
                continue
            if answer == ANSWER_PROCEED:
                watched.listener.proceed(call.id)
            else:
                watched.listener.answer(call.id, given if answer == ANSWER_NUMBER else 0, max(answer, 0))
            slot.release()

    # -- calls --

    def _receive(self, watched: Watched, slot: Slot) -> None:
        try:
            received = watched.listener.receive(slot.journal.raw(slot.number))
        except OSError as error:
            log.error("receive from %s: %s", watched.tenant.name, error)
            received = False
        if received:
            self._dispatch(watched, slot)
        else:
            self._forget(watched, slot)

    def _dispatch(self, watched: Watched, slot: Slot) -> None:
        call, tenant = slot.call(), watched.tenant
        scopes = self.daemon.registry.scopes
        if scopes:
            inner = scopes.get(scope_of(call.pid))
            if inner and inner.parent is tenant:
                tenant = inner
        with self.lock:
            watched.claimed.add(slot.number)
        account = watched.account
        with self.lock:
            if self.slow[account] >= SLOW_CALLS or self.slow.total() >= SLOW_CALLS_ALL:
                self.queues.setdefault(account, deque()).append((watched, slot))
                return
            self.slow[account] += 1
        try:
            self.workers.run(partial(self._work, account, watched, slot, call, tenant))
        except RuntimeError:  # the next tick tries again
            with self.lock:
                self.slow[account] -= 1
                self.queues.setdefault(account, deque()).appendleft((watched, slot))

    def _work(
        self, account: tuple[str, int], watched: Watched, slot: Slot, call: Notification, tenant: Tenant
    ) -> None:
        """A call, and then one that waits for its end."""
        began = time.perf_counter_ns()
        try:
            self._answer(watched, slot, call, tenant)
        finally:
            with self.lock:
                if call.nr == linux.NR_SOCKET:
                    self.calls += 1
                    self.ns += time.perf_counter_ns() - began
                self.slow[account] -= 1
                self.slow += Counter()  # drops what is zero
            self._next(account)

    def _next(self, account: tuple[str, int] | None) -> None:
        """Let one go on that waits: of this account, else of another that has its share free."""
        with self.lock:
            free = [key for key, waiting in self.queues.items() if waiting and self.slow[key] < SLOW_CALLS]
            key = account if account in free else next(iter(free), None)
            following = self.queues[key].popleft() if key else None
            self.queues = {key: waiting for key, waiting in self.queues.items() if waiting}
        if following:
            self._dispatch(*following)

    def _answer(self, watched: Watched, slot: Slot, call: Notification, tenant: Tenant) -> None:
        """Decide a call and answer it."""
        try:
            action = self._decide(watched.listener, call, tenant)
            self._carry_out(watched.listener, call, action, slot)
        finally:
            self._forget(watched, slot)

    def _forget(self, watched: Watched, slot: Slot) -> None:
        with self.lock:
            slot.release()
            watched.claimed.discard(slot.number)
            last = not watched.claimed and watched.listener.number not in self.watched
            full, watched.full = watched.full, False
        if last:
            self._close(watched)
        elif full:
            self._listen(watched)

    def _decide(self, listener: Listener, call: Notification, tenant: Tenant) -> Action:
        try:
            return self.daemon.supervisor.handle(call, tenant, lambda: listener.valid(call.id))
        except Exception:
            log.exception("call %d of pid %d in %s", call.nr, call.pid, tenant.name)
            return Answer(error=errno.EIO)

    def _carry_out(self, listener: Listener, call: Notification, action: Action, slot: Slot) -> None:
        try:
            if isinstance(action, Inject | Replace):
                try:
                    if isinstance(action, Inject):
                        self._inject(listener, call, action, slot)
                    else:
                        self._replace(listener, call, action, slot)
                except OSError as error:  # EMFILE: the target's table is full
                    listener.answer(call.id, error=error.errno or errno.EIO)
                finally:
                    os.close(action.fd)
            elif isinstance(action, Answer):
                listener.answer(call.id, action.value, action.error)
            else:
                listener.proceed(call.id)
        except OSError as error:
            log.error("answer call %d of pid %d: %s", call.nr, call.pid, error)

    @staticmethod
    def _inject(listener: Listener, call: Notification, action: Inject, slot: Slot) -> None:
        slot.injecting(os.fstat(action.fd).st_ino)
        flags = os.O_CLOEXEC if action.cloexec else 0
        try:
            number = listener.inject(call.id, action.fd, flags, action.number)
        except OSError as error:
            if action.number is None or error.errno != errno.EBADF:
                raise
            number = listener.inject(call.id, action.fd, flags)  # beyond the target's RLIMIT_NOFILE
        if number is not None:
            listener.answer(call.id, number)

    def _replace(self, listener: Listener, call: Notification, action: Replace, slot: Slot) -> None:
        then = action.then
        slot.injecting(os.fstat(action.fd).st_ino, then.error if isinstance(then, Answer) else ANSWER_PROCEED)
        with socket.socket(fileno=os.dup(action.fd)) as new:
            watch_again(call.pid, new, action.watches)
        for number, cloexec in action.numbers:
            listener.inject(call.id, action.fd, os.O_CLOEXEC if cloexec else 0, number)
        self.daemon.registry.saved = False  # a unix socket may be its tenant's to remove; the next tick writes it
        if isinstance(then, Answer):
            listener.answer(call.id, then.value, then.error)
        else:
            listener.proceed(call.id)


def scope_of(pid: int) -> int:
    """The number of the wrapper inside a container that a thread belongs to; 0 or nonsense for others."""
    try:
        return linux.timer_slack(pid) - SCOPE_SLACK
    except OSError:
        return 0


def find_socket(pid: int, inode: int) -> int | None:
    """The descriptor by which a thread has this socket (proc(5), /proc/PID/fd)."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return int(entry.name)
    return None
