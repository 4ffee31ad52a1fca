"""Trapped calls from their slot in the journal to the answer.

A call is decided and answered in a worker thread, because that may block for ever: another program may serve the
memory that is read (userfaultfd(2), FUSE) or hold the lock of the socket, and ADDFD waits until the target runs
again. So that one container cannot take all threads, an account has at most SLOW_CALLS of them, and all accounts
together SLOW_CALLS_ALL. An account is a container, or all wrappers of one unprivileged user. A user may have many
uids (subuid(5)), so all accounts of users together have at most SLOW_CALLS_USERS: the rest is for containers. Further
calls wait in the account's queue.

Each call takes some 0.1 ms of one interpreter. So that a user's storm of calls does not make those of others wait, a
user has USER_RATE of them a second while others make calls as well, and all that there is while nobody does.

graft/trap/listeners.py says which thread may touch what.
"""

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from functools import partial

from graft.kernel import linux
from graft.log import log
from graft.process.bucket import Bucket
from graft.process.workers import Workers
from graft.tenants.registry import Registry
from graft.tenants.tenant import Tenant
from graft.trap.actions import Action, Answer, Inject, InjectPair, Replace
from graft.trap.epoll import watch_again
from graft.trap.journal import ANSWER_NUMBER, ANSWER_PROCEED, Journal, Slot
from graft.trap.listener import Listener, Notification
from graft.trap.nested import SCOPE_SLACK
from graft.trap.numbers import Turns, free_number, is_socket
from graft.trap.spent import Spent
from graft.trap.sup import Helper
from graft.trap.supervisor import Supervisor

SLOW_CALLS = 4
SLOW_CALLS_ALL = 512
SLOW_CALLS_USERS = SLOW_CALLS_ALL // 2
USER_RATE, USER_BURST = 500.0, 200.0  # calls of one user a second, and at once
OTHERS_SECONDS = 0.2  # since when another account has made calls
THROTTLED_SECONDS = 0.002  # until it is looked again whether a call may go on that waits for the rate


class Watched:
    """A listener with its journal, its tenant, and the graft-sup that receives from it, if one runs.

    @trusted: root handed the listener over, so nobody else can receive from it. `pid`: the process that it was handed
    over for, 0 if a predecessor of this graftd had it. `claimed` is guarded by
    Dispatcher.lock, as is `ended`; the other attributes belong to the loop's thread, but release() resets `full` in
    any thread.
    """

    def __init__(self, listener: Listener, journal: Journal, tenant: Tenant, *, trusted: bool) -> None:
        self.listener = listener
        self.journal = journal
        self.tenant = tenant
        self.trusted = trusted
        self.pid = 0
        self.helper: Helper | None = None
        self.claimed: set[int] = set()  # numbers of the slots that threads of graftd work on
        self.full = False  # it is not polled, because its journal has no free slot
        self.ended = False  # it hung up: its descriptor is closed with its last call
        self.restarts: list[float] = []

    @property
    def stored(self) -> str:
        """The name of the listener in the descriptor store."""
        return f"{'listener' if self.trusted else 'foreign'}-{self.listener.number}-{self.tenant.id}"

    @property
    def account(self) -> tuple[str, int]:
        """The account whose share of the worker threads its calls use."""
        return ("tenant", self.tenant.id) if self.trusted else ("uid", self.tenant.uid)


class Dispatcher:
    """Decides and answers calls, in worker threads. Any thread may call its methods.

    @supervisor decides. @registry knows the wrappers inside containers by the number that marks their processes.
    @listen has a listener polled for calls again. `lock` guards the claims of slots, `slow`, `queues`, the counts,
    and the end of a listener; nobody blocks while holding it.
    """

    def __init__(self, supervisor: Supervisor, registry: Registry, listen: Callable[[Watched], None]) -> None:
        self.supervisor = supervisor
        self.registry = registry
        self.listen = listen
        self.lock = threading.Lock()
        self.workers = Workers(SLOW_CALLS_ALL)
        self.slow: Counter[tuple[str, int]] = Counter()
        self.queues: dict[tuple[str, int], deque[tuple[Watched, Slot]]] = {}
        self.buckets: dict[tuple[str, int], Bucket] = {}  # of users
        self.latest: list[tuple[float, tuple[str, int]]] = []  # the two accounts that have called last, and when
        self.turns = Turns()
        self.calls = 0
        self.ns = 0
        self.spent: defaultdict[int, Spent] = defaultdict(Spent)  # by tenant, but for what journals have

    def answer_pending(self, watched: Watched, *, helper_died: bool) -> None:
        """Answer the calls that a predecessor, or with @helper_died a graft-sup, had received and not answered."""
        with self.lock:  # threads release a slot and its claim under the lock
            claimed = frozenset(watched.claimed)
        for slot, call, inode, answer in watched.journal.pending(held=helper_died, besides=claimed):
            given = find_socket(call.pid, inode) if inode else None
            if given is None:
                self.dispatch(watched, slot)
                continue
            if answer == ANSWER_PROCEED:
                watched.listener.proceed(call.id)
            else:
                watched.listener.answer(call.id, given if answer == ANSWER_NUMBER else 0, max(answer, 0))
            slot.release()

    def dispatch(self, watched: Watched, slot: Slot, *, again: bool = False) -> bool:
        """Have a worker thread answer the call in @slot, or let it wait while its account has all its share.

        @again: it has waited. Returns False if it waits.
        """
        call, tenant = slot.call(), watched.tenant
        scopes = self.registry.scopes
        if scopes:
            inner = scopes.get(scope_of(call.pid))
            if inner and inner.parent is tenant:
                tenant = inner
        with self.lock:
            watched.claimed.add(slot.number)
        account, now = watched.account, time.monotonic()
        with self.lock:
            if not again:
                self.latest = [(now, account), *(entry for entry in self.latest if entry[1] != account)][:2]
            if not self._has_room(account, now):
                self.queues.setdefault(account, deque()).append((watched, slot))
                return False
            self.slow[account] += 1
            if account in self.buckets:
                self.buckets[account].take(1)
        try:
            self.workers.run(partial(self._work, account, watched, slot, call, tenant))
        except RuntimeError:  # the next tick tries again
            with self.lock:
                self.slow[account] -= 1
                self.queues.setdefault(account, deque()).appendleft((watched, slot))
            return False
        return True

    def _has_room(self, account: tuple[str, int], now: float) -> bool:
        """May one more call of the account be at work? The caller holds the lock. @now: monotonic seconds."""
        if account[0] == "uid":
            if account not in self.buckets:
                self.buckets = {key: bucket for key, bucket in self.buckets.items() if bucket.level(now) < USER_BURST}
                self.buckets[account] = Bucket(USER_RATE, USER_BURST)
            level = self.buckets[account].level(now)
            if level < 1 and any(key != account and now - when < OTHERS_SECONDS for when, key in self.latest):
                return False
        users = sum(count for (kind, _), count in self.slow.items() if kind == "uid")
        return (
            self.slow[account] < SLOW_CALLS
            and self.slow.total() < SLOW_CALLS_ALL
            and (account[0] != "uid" or users < SLOW_CALLS_USERS)
        )

    def resume(self, account: tuple[str, int] | None) -> bool:
        """Dispatch one waiting call: of this account, or else of another one that has some of its share free.

        Returns whether there was one, and it waits no more.
        """
        now = time.monotonic()
        with self.lock:
            free = [key for key, waiting in self.queues.items() if waiting and self._has_room(key, now)]
            key = account if account in free else next(iter(free), None)
            following = self.queues[key].popleft() if key else None
            self.queues = {key: waiting for key, waiting in self.queues.items() if waiting}
        return following is not None and self.dispatch(*following, again=True)

    def wait(self) -> float:
        """For how many seconds the loop may wait before it calls resume()."""
        return THROTTLED_SECONDS if any(kind == "uid" for kind, _ in self.queues) else float("inf")

    def end(self, watched: Watched) -> None:
        """A listener hung up. The last thread that works on one of its calls closes it, or this one, if none does."""
        calls, ns = watched.journal.counted
        with self.lock:
            self.calls, self.ns = self.calls + calls, self.ns + ns
            self.spent[watched.tenant.id].add(watched.journal.spent, ns)
            watched.ended = True
            idle = not watched.claimed
        if idle:
            self._close(watched)

    def release(self, watched: Watched, slot: Slot) -> None:
        """Give a slot back, whose call is answered, or into which none was received."""
        with self.lock:
            slot.release()
            watched.claimed.discard(slot.number)
            last = not watched.claimed and watched.ended
            full, watched.full = watched.full, False
        if last:
            self._close(watched)
        elif full:
            self.listen(watched)

    @staticmethod
    def _close(watched: Watched) -> None:
        os.close(watched.listener.fd)
        watched.journal.close()

    def _work(
        self, account: tuple[str, int], watched: Watched, slot: Slot, call: Notification, tenant: Tenant
    ) -> None:
        """Answer a call in a worker thread, then dispatch one that waits in a queue."""
        began = time.perf_counter_ns()
        try:
            self._answer(watched, slot, call, tenant)
        finally:
            took = time.perf_counter_ns() - began
            with self.lock:
                if call.nr == linux.NR_SOCKET:
                    self.calls += 1
                    self.ns += took
                self.spent[watched.tenant.id].note(took)
                self.slow[account] -= 1
                self.slow += Counter()  # removes accounts without calls
            self.resume(account)

    def _answer(self, watched: Watched, slot: Slot, call: Notification, tenant: Tenant) -> None:
        """Decide a call, answer it, and release its slot."""
        try:
            action = self._decide(watched.listener, call, tenant)
            self._carry_out(watched.listener, call, action, slot)
        finally:
            self.release(watched, slot)

    def _decide(self, listener: Listener, call: Notification, tenant: Tenant) -> Action:
        try:
            return self.supervisor.handle(call, tenant, lambda: listener.valid(call.id))
        except Exception:
            log.exception("call %d of pid %d in %s failed", call.nr, call.pid, tenant.name)
            return Answer(error=errno.EIO)

    def _carry_out(self, listener: Listener, call: Notification, action: Action, slot: Slot) -> None:
        try:
            if isinstance(action, Inject | Replace):
                try:
                    if isinstance(action, Inject):
                        self._inject(listener, call, action, slot)
                    else:
                        self._replace(listener, call, action, slot)
                except OSError as error:  # EMFILE: the target's descriptor table is full
                    listener.answer(call.id, error=error.errno or errno.EIO)
            elif isinstance(action, InjectPair):
                self._inject_pair(listener, call, action)
            elif isinstance(action, Answer):
                listener.answer(call.id, action.value, action.error)
            else:
                listener.proceed(call.id)
        except OSError as error:
            log.error("cannot answer call %d of pid %d: %s", call.nr, call.pid, error)

    def _inject(self, listener: Listener, call: Notification, action: Inject, slot: Slot) -> None:
        slot.injecting(os.fstat(action.fd).st_ino)
        flags = os.O_CLOEXEC if action.cloexec else 0
        try:
            number = self._inject_numbered(listener, call, action.fd, flags) if action.numbered else None
            if number is None:
                number = listener.inject(call.id, action.fd, flags)
        finally:
            os.close(action.fd)
        if number is not None:
            listener.answer(call.id, number)

    def _inject_pair(self, listener: Listener, call: Notification, action: InjectPair) -> None:
        """What is injected and not answered, because this process is killed, the next one injects once more."""
        flags = os.O_CLOEXEC if action.cloexec else 0
        try:
            first, second = (listener.inject(call.id, fd, flags) for fd in action.pair)
            if first is None or second is None:
                return
            action.caller.write((action.address, struct.pack("=ii", first, second)))
        except OSError as error:
            listener.answer(call.id, error=error.errno or errno.EIO)
            return
        finally:
            for fd in action.pair:
                os.close(fd)
        listener.answer(call.id)

    def _inject_numbered(self, listener: Listener, call: Notification, fd: int, flags: int) -> int | None:
        """Add @fd at a number of AF_GRAFT's. Returns the number; None if none is safe, or the target is gone."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), self.turns.of(call.pid):
            wanted = free_number(call.pid)
            if wanted is not None:
                try:
                    return listener.inject(call.id, fd, flags, wanted)
                except OSError as error:
                    if error.errno != errno.EBADF:  # the number is beyond the target's RLIMIT_NOFILE
                        raise
        return None

    def _replace(self, listener: Listener, call: Notification, action: Replace, slot: Slot) -> None:
        then = action.then
        # closed before the answer: when the target closes its copies, the address is free again
        with socket.socket(fileno=action.fd) as new, self.turns.of(call.pid):
            slot.injecting(os.fstat(new.fileno()).st_ino, then.error if isinstance(then, Answer) else ANSWER_PROCEED)
            watch_again(call.pid, new, action.watches)
            for number, cloexec in action.numbers:
                if is_socket(call.pid, number, action.inode):  # its program may have closed it, and opened another
                    listener.inject(call.id, new.fileno(), os.O_CLOEXEC if cloexec else 0, number)
        self.registry.saved = False  # the tenant may have bound a unix socket; the next tick saves it
        if isinstance(then, Answer):
            listener.answer(call.id, then.value, then.error)
        else:
            listener.proceed(call.id)


def scope_of(pid: int) -> int:
    """The number of the wrapper inside a container that a thread belongs to (graft/trap/nested.py).

    For other threads it is 0, or a number that no wrapper has.
    """
    try:
        return linux.timer_slack(pid) - SCOPE_SLACK
    except OSError:
        return 0


def find_socket(pid: int, inode: int) -> int | None:
    """The number of the first descriptor by which a thread has the socket @inode (proc(5), /proc/PID/fd), or None."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(entry.path) == f"socket:[{inode}]":
                    return int(entry.name)
    return None
