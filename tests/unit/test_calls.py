"""Trapped calls from the listener to the answer: who decides them, in which thread, and what a successor finds."""

import errno
import os
import queue
import select
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from graft.bench.lab import wait_for
from graft.kernel import linux
from graft.process.loop import Loop
from graft.trap import dispatch, listeners
from graft.trap.actions import PROCEED, Answer, Inject, Replace
from graft.trap.dispatch import SLOW_CALLS, Watched, find_socket
from graft.trap.journal import ANSWER_NUMBER, ANSWER_PROCEED, SLOTS, Journal, Slot
from graft.trap.listener import NOTIFICATION
from graft.trap.listeners import RESTARTS, RESTARTS_SECONDS, Listeners
from tests.unit.fakes import make_registry, make_tenant

SECONDS = 10
GONE = 404  # the id of a call whose target has died


class FakeListener:
    """A seccomp listener: `incoming` are calls to be received, `sent` what it was told to do, in order."""

    def __init__(self, number):
        self.number = number
        self.fd, self.other = (end.detach() for end in socket.socketpair())
        self.incoming: Any = queue.SimpleQueue()
        self.sent: Any = queue.SimpleQueue()
        self.fails = []  # errnos of the next injections
        self.on_inject = lambda: None

    def receive(self, buffer):
        call = self.incoming.get(timeout=SECONDS)
        if call is None:
            return False
        buffer[:] = NOTIFICATION.pack(call.id, call.pid, 0, call.nr, 0, 0, *([0] * 6))
        return True

    def valid(self, number):
        return number != GONE

    def answer(self, number, value=0, error=0):
        self.sent.put(("answer", number, value, error))
        return number != GONE

    def proceed(self, number):
        self.sent.put(("proceed", number))
        return True

    def inject(self, number, fd, flags, place=None):
        self.on_inject()
        if self.fails:
            raise OSError(self.fails.pop(0), "inject")
        self.sent.put(("inject", number, os.fstat(fd).st_ino, flags, place))
        return None if number == GONE else 42 if place is None else place

    def next(self):
        return self.sent.get(timeout=SECONDS)

    def nothing(self):
        return self.sent.empty()


class FakeStore:
    def __init__(self):
        self.names = []

    def put(self, name, fd):
        self.names.append(name)

    def remove(self, name):
        if name in self.names:
            self.names.remove(name)


class FakeSupervisor:
    """Does with a call what the test has put into `actions` for its id; PROCEED if nothing."""

    def __init__(self):
        self.sockets = SimpleNamespace(v6_flags=0)
        self.actions = {}
        self.handled: Any = queue.SimpleQueue()  # (id, the tenant's name)

    def handle(self, call, tenant, valid):
        self.handled.put((call.id, tenant.name))
        action = self.actions.get(call.id, PROCEED)
        return action() if callable(action) else action


class FakeHelper:
    def __init__(self):
        self.control, self.other = socket.socketpair()
        self.slots = []
        self.over = False

    def forwarded(self):
        return self.slots.pop(0) if self.slots else -1

    def ended(self):
        return self.over

    def end(self):
        self.over = True


class Graftd:
    """What `listeners.Graftd` asks for."""

    def __init__(self, registry):
        self.loop, self.store, self.registry, self.supervisor = Loop(), FakeStore(), registry, FakeSupervisor()
        self.over = []

    def ended(self, tenant):
        self.over.append(tenant.name)


def call(number, pid=0, nr=linux.NR_BIND):
    return SimpleNamespace(id=number, pid=pid, nr=nr)


class Bench:
    """As many listeners as a test wants."""

    def __init__(self, monkeypatch, directory):
        monkeypatch.setattr(listeners, "Listener", lambda _fd, number: FakeListener(number))
        monkeypatch.setattr(listeners, "available", lambda: True)
        self.registry = make_registry(monkeypatch, directory)
        self.graftd = Graftd(self.registry)
        graftd: Any = self.graftd
        self.listeners = Listeners(graftd, -1, directory)
        self.dispatcher = self.listeners.dispatcher
        self.actions = self.graftd.supervisor.actions
        self.made = []

    def listen(self, name="web", netns=1000, *, trusted=True, tenant=None):
        tenant = tenant or make_tenant(self.registry, name, netns)
        self.listeners.adopt(tenant, -1, trusted=trusted)
        watched = self.listeners.watched[self.listeners.next_number - 1]
        self.made.append(watched)
        return watched

    def receive(self, watched, *calls):
        """The listener becomes readable, and graftd receives one call after the other."""
        for each in calls:
            watched.listener.incoming.put(each)
            self.listeners._ready(watched, select.EPOLLIN)

    def hold(self, *numbers):
        """Calls with these ids are not decided until the returned event is set."""
        go = threading.Event()
        for number in numbers:
            self.actions[number] = lambda: Answer(0) if go.wait(SECONDS) else Answer(error=errno.ETIMEDOUT)
        return go

    def idle(self, watched):
        wait_for(lambda: not watched.claimed, "the end of all calls")
        return [watched.journal.map[watched.journal._at(n)] for n in range(SLOTS)] == [0] * SLOTS


@pytest.fixture
def bench(monkeypatch, tmp_path):
    made = Bench(monkeypatch, tmp_path)
    yield made
    for watched in made.made:
        os.close(watched.listener.other)


# -- one call --


def test_an_answer(bench):
    watched = bench.listen()
    bench.actions.update({1: Answer(7), 2: Answer(error=errno.EACCES)})
    bench.receive(watched, call(1), call(2), call(3))
    told = sorted(watched.listener.next() for _ in range(3))
    assert told == [("answer", 1, 7, 0), ("answer", 2, 0, errno.EACCES), ("proceed", 3)]
    assert bench.idle(watched)


def test_a_target_that_is_gone_before_it_is_received(bench):
    watched = bench.listen()
    bench.receive(watched, None)
    assert bench.idle(watched)
    assert watched.listener.nothing()


def test_a_fault_in_the_decision_is_an_io_error(bench):
    def fault():
        raise ValueError("a fault")

    watched = bench.listen()
    bench.actions[1] = fault
    bench.receive(watched, call(1))
    assert watched.listener.next() == ("answer", 1, 0, errno.EIO)
    assert bench.idle(watched)


def test_a_socket_is_injected_in_two_steps(bench):
    """The journal has its inode before the target may have it: a successor answers with its number."""
    watched, noted = bench.listen(), []
    made = socket.socket()
    inode, fd = os.fstat(made.fileno()).st_ino, os.dup(made.fileno())
    watched.listener.on_inject = lambda: noted.extend(watched.journal.pending(held=False))
    bench.actions[1] = Inject(fd, cloexec=True)
    bench.receive(watched, call(1, nr=linux.NR_SOCKET))
    assert watched.listener.next() == ("inject", 1, inode, os.O_CLOEXEC, None)
    assert watched.listener.next() == ("answer", 1, 42, 0)
    assert bench.idle(watched)
    assert [(p.call.id, p.inode, p.answer) for p in noted] == [(1, inode, ANSWER_NUMBER)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    wait_for(lambda: bench.listeners.counted()[0] == 1, "the count")
    assert bench.listeners.counted()[1] > 0


def test_a_number_beyond_the_targets_limit(bench):
    watched = bench.listen()
    watched.listener.fails = [errno.EBADF]
    bench.actions[1] = Inject(os.dup(0), cloexec=False, number=5000)
    bench.receive(watched, call(1))
    assert watched.listener.next()[3:] == (0, None)
    assert watched.listener.next() == ("answer", 1, 42, 0)


def test_a_target_whose_table_is_full(bench):
    watched = bench.listen()
    watched.listener.fails = [errno.EMFILE]
    fd = os.dup(0)
    bench.actions[1] = Inject(fd, cloexec=False)
    bench.receive(watched, call(1))
    assert watched.listener.next() == ("answer", 1, 0, errno.EMFILE)
    assert bench.idle(watched)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_target_that_dies_during_an_injection(bench):
    watched = bench.listen()
    bench.actions[GONE] = Inject(os.dup(0), cloexec=False)
    bench.receive(watched, call(GONE))
    assert watched.listener.next()[:2] == ("inject", GONE)
    assert bench.idle(watched)
    assert watched.listener.nothing()


@pytest.mark.parametrize(
    ("then", "told", "noted"), [(PROCEED, ("proceed", 1), ANSWER_PROCEED), (Answer(0, errno.EINPROGRESS), ("answer", 1, 0, errno.EINPROGRESS), errno.EINPROGRESS)]
)
def test_a_socket_in_the_place_of_another(bench, then, told, noted):
    watched, found = bench.listen(), []
    made = socket.socket()
    inode, fd = os.fstat(made.fileno()).st_ino, os.dup(made.fileno())
    watched.listener.on_inject = lambda: found.extend(watched.journal.pending(held=False))
    bench.actions[1] = Replace(fd, [(5, False), (9, True)], [], then)
    bench.receive(watched, call(1))
    assert watched.listener.next() == ("inject", 1, inode, 0, 5)
    assert watched.listener.next() == ("inject", 1, inode, os.O_CLOEXEC, 9)
    assert watched.listener.next() == told
    assert bench.idle(watched)
    assert {(p.inode, p.answer) for p in found} == {(inode, noted)}
    assert not bench.registry.saved  # a unix socket may be its tenant's to remove


# -- whose call it is --


def test_a_wrapper_inside_is_known_by_its_scope(bench, monkeypatch):
    outer = bench.listen("outer")
    inner = make_tenant(bench.registry, "inner", parent=outer.tenant)
    other = make_tenant(bench.registry, "other", 2000)
    elsewhere = make_tenant(bench.registry, "elsewhere", 2000, parent=other)
    for tenant in (inner, elsewhere):
        bench.registry.take_scope(tenant)
    scopes = {11: inner.scope, 12: elsewhere.scope, 13: 0}
    monkeypatch.setattr(dispatch, "scope_of", scopes.__getitem__)
    for pid, name in ((11, "inner"), (12, "outer"), (13, "outer")):  # who claims another container's gets nothing by it
        bench.receive(outer, call(pid, pid))
        assert bench.graftd.supervisor.handled.get(timeout=SECONDS) == (pid, name)
    assert bench.idle(outer)
    assert outer.journal.map[24] == 0
    bench.listeners.divide(outer.tenant)
    assert outer.journal.map[24] == 1  # from now on graft-sup leaves every call to graftd


# -- many calls --


def test_slow_calls_of_one_container_wait_for_each_other(bench):
    first, second = bench.listen("first", 1), bench.listen("second", 2)
    numbers = range(1, SLOW_CALLS + 3)
    go = bench.hold(*numbers)
    bench.receive(first, *map(call, numbers))
    handled = bench.graftd.supervisor.handled
    assert {handled.get(timeout=SECONDS)[0] for _ in range(SLOW_CALLS)} == set(range(1, SLOW_CALLS + 1))
    bench.receive(second, call(100))
    assert second.listener.next() == ("proceed", 100)
    assert handled.get(timeout=SECONDS) == (100, "second")
    assert (handled.empty(), first.listener.nothing()) == (True, True)
    assert first.claimed == set(range(SLOW_CALLS + 2))
    go.set()
    assert {first.listener.next()[1] for _ in numbers} == set(numbers)
    assert bench.idle(first)
    wait_for(lambda: not bench.dispatcher.slow, "the account's end")
    assert bench.dispatcher.queues == {}


def test_listeners_of_a_user_share_one_account(bench):
    """However many wrappers somebody starts, they have the slow calls of one container."""
    tenants = [make_tenant(bench.registry, f"w{n}", n + 1, uid=1000) for n in range(SLOW_CALLS + 1)]
    watched = [bench.listen(tenant=tenant, trusted=False) for tenant in tenants]
    go = bench.hold(*range(1, SLOW_CALLS + 2))
    handled = bench.graftd.supervisor.handled
    for n, each in enumerate(watched[:-1]):
        bench.receive(each, call(n + 1))
        handled.get(timeout=SECONDS)
    bench.receive(watched[-1], call(SLOW_CALLS + 1))
    wait_for(lambda: bench.dispatcher.queues, "the queue")
    assert (list(bench.dispatcher.queues), handled.empty()) == ([("uid", 1000)], True)
    go.set()
    assert handled.get(timeout=SECONDS) == (SLOW_CALLS + 1, f"w{SLOW_CALLS}")
    assert all(bench.idle(each) for each in watched)


def test_no_thread_to_be_had(bench, monkeypatch):
    """The call waits for the next tick."""
    watched = bench.listen()
    run = bench.dispatcher.workers.run

    def refuse(_job):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(bench.dispatcher.workers, "run", refuse)
    bench.receive(watched, call(1))
    assert (watched.listener.nothing(), watched.claimed, +bench.dispatcher.slow) == (True, {0}, {})
    monkeypatch.setattr(bench.dispatcher.workers, "run", run)
    bench.listeners.starting.clear()
    bench.listeners.tick()
    assert watched.listener.next() == ("proceed", 1)
    assert bench.idle(watched)


def test_a_journal_that_is_full(bench, monkeypatch):
    """graftd stops receiving until a slot is free."""
    watched, events = bench.listen(), []
    monkeypatch.setattr(bench.graftd.loop, "modify", lambda fd, wanted: events.append((fd, wanted)))
    taken = [watched.journal.take() for _ in range(SLOTS)]
    bench.listeners._ready(watched, select.EPOLLIN)
    assert (watched.full, events) == (True, [(watched.listener.fd, 0)])
    bench.dispatcher.release(watched, taken[0])
    assert (watched.full, events[1:]) == (False, [(watched.listener.fd, select.EPOLLIN)])
    bench.receive(watched, call(1))
    assert watched.listener.next() == ("proceed", 1)


# -- what a predecessor left --


def pending(journal, number, pid=0, inode=0, answer=ANSWER_NUMBER):
    slot = journal.take()
    slot.journal.raw(slot.number)[:] = NOTIFICATION.pack(number, pid, 0, linux.NR_SOCKET, 0, 0, *([0] * 6))
    if inode:
        slot.injecting(inode, answer)
    return slot


def test_a_socket_that_has_arrived_is_answered_with_its_number(bench):
    """It must not be given twice: the call would leak one."""
    watched = bench.listen()
    with socket.socket() as arrived, socket.socket() as lost:
        inode, pid = os.fstat(arrived.fileno()).st_ino, os.getpid()
        assert find_socket(pid, inode) == arrived.fileno()
        for number, answer in ((1, ANSWER_NUMBER), (2, ANSWER_PROCEED), (3, errno.EINPROGRESS), (4, 0)):
            pending(watched.journal, number, pid, inode, answer)
        gone = os.fstat(lost.fileno()).st_ino
        lost.close()
        pending(watched.journal, 5, pid, gone)
        pending(watched.journal, 6, pid)
        bench.dispatcher.answer_pending(watched, helper_died=False)
        told = [watched.listener.next() for _ in range(6)]
    assert told[:4] == [
        ("answer", 1, arrived_number := told[0][2], 0), ("proceed", 2), ("answer", 3, 0, errno.EINPROGRESS), ("answer", 4, 0, 0)
    ]  # fmt: skip
    assert arrived_number > 2
    assert sorted(told[4:]) == [("proceed", 5), ("proceed", 6)]  # decided anew
    assert bench.idle(watched)


def test_a_slot_that_a_thread_is_busy_with_is_left_alone(bench):
    watched = bench.listen()
    go = bench.hold(1)
    bench.receive(watched, call(1))
    bench.graftd.supervisor.handled.get(timeout=SECONDS)
    bench.dispatcher.answer_pending(watched, helper_died=True)
    assert bench.graftd.supervisor.handled.empty()
    go.set()
    assert watched.listener.next() == ("answer", 1, 0, 0)
    assert bench.idle(watched)
    assert watched.listener.nothing()


def test_restore(bench):
    tenant, number = make_tenant(bench.registry), 7
    journal = Journal()
    control, _other = socket.socketpair()
    named = {f"journal-{number}": journal.fd, f"sup-{number}": control.detach()}
    bench.listeners.restore(named, f"listener-{number}-{tenant.id}", -1)
    watched = bench.listeners.watched[number]
    assert (watched.tenant, watched.trusted, tenant.listeners) == (tenant, True, {number})
    assert watched.helper is not None
    assert bench.listeners.next_number == number + 1
    assert [name for name, _ in bench.listeners.held()] == [f"listener-7-{tenant.id}", "journal-7", "sup-7"]
    bench.made.append(watched)


def test_strays_are_let_go(bench):
    """A listener's tenant, or a journal's listener, has ended while no graftd was there."""
    reading, writing = os.pipe()
    bench.graftd.store.names = ["foreign-3-99", "journal-3", "netns-1"]
    bench.listeners.restore({"journal-3": writing}, "foreign-3-99", reading)
    bench.listeners.forget_strays({"journal-3": writing, "netns-1": -1})
    assert (bench.listeners.watched, bench.graftd.store.names) == ({}, ["netns-1"])
    for fd in (reading, writing):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


# -- a listener's end --


def test_the_end_of_a_listener(bench):
    watched = bench.listen()
    tenant, fd = watched.tenant, watched.listener.fd
    assert bench.graftd.store.names == [f"listener-1-{tenant.id}", "journal-1"]
    bench.listeners._ready(watched, select.EPOLLHUP)
    assert (bench.listeners.watched, tenant.listeners, bench.graftd.store.names) == ({}, set(), [])
    assert bench.graftd.over == ["web"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_tenant_ends_with_its_last_listener(bench):
    first = bench.listen()
    second = bench.listen(tenant=first.tenant)
    bench.listeners._ready(first, select.EPOLLHUP)
    assert bench.graftd.over == []
    bench.listeners._ready(second, select.EPOLLHUP)
    assert bench.graftd.over == ["web"]


def test_a_listener_that_ends_during_a_call_is_closed_by_its_thread(bench):
    watched = bench.listen()
    fd, go = watched.listener.fd, bench.hold(1)
    bench.receive(watched, call(1))
    bench.graftd.supervisor.handled.get(timeout=SECONDS)
    bench.listeners._ready(watched, select.EPOLLHUP)
    assert (bench.graftd.over, os.fstat(fd).st_ino > 0) == (["web"], True)
    go.set()
    assert watched.listener.next() == ("answer", 1, 0, 0)

    def closed():
        try:
            os.fstat(fd)
        except OSError:
            return True
        return False

    wait_for(closed, "the close")


# -- graft-sup --


def attached(bench, watched):
    helper = FakeHelper()
    bench.listeners._attach(watched, helper)
    return helper


def test_what_graft_sup_forwards(bench):
    watched = bench.listen()
    helper = attached(bench, watched)
    bench.listeners._ready(watched, select.EPOLLIN)  # its to receive
    slot = pending(watched.journal, 1)
    helper.slots = [slot.number, slot.number + 1, SLOTS + 5]  # the second has nothing, the third does not exist
    for _ in range(4):
        bench.listeners._forwarded(watched, helper)
    assert watched.listener.next() == ("proceed", 1)
    assert bench.idle(watched)
    assert watched.listener.nothing()


def test_a_graft_sup_that_dies_is_replaced(bench):
    """What it had received is answered, and graftd receives until the next one is there."""
    watched = bench.listen()
    bench.listeners.starting.clear()
    helper = attached(bench, watched)
    bench.graftd.store.put("sup-1", helper.control.fileno())
    slot = pending(watched.journal, 1)
    watched.journal.map[watched.journal._at(slot.number)] = 1  # SLOT_HELD: its own
    helper.forwarded = lambda: None
    bench.listeners._forwarded(watched, helper)
    assert watched.listener.next() == ("proceed", 1)
    assert (watched.helper, "sup-1" in bench.graftd.store.names) == (None, False)
    assert [(when, each) for when, each in bench.listeners.starting] == [(0.0, watched)]
    bench.receive(watched, call(2))
    assert watched.listener.next() == ("proceed", 2)
    assert bench.idle(watched)


def test_a_graft_sup_that_dies_again_and_again_is_started_later(bench):
    watched = bench.listen()
    for _ in range(RESTARTS + 1):
        bench.listeners.starting.clear()
        attached(bench, watched)
        bench.listeners._lost(watched)
        if len(watched.restarts) <= RESTARTS:
            assert bench.listeners.starting == [(0.0, watched)]
    ((when, each),) = bench.listeners.starting
    assert each is watched
    assert when > time.monotonic() + RESTARTS_SECONDS / 2


def test_accounts():
    """Root's listeners have an account each, those of a user one together."""
    tenant: Any = SimpleNamespace(id=3, uid=1000)
    listener: Any = SimpleNamespace(number=9)
    journal: Any = None
    names = [
        (watched.account, watched.stored)
        for watched in (Watched(listener, journal, tenant, trusted=trusted) for trusted in (True, False))
    ]
    assert names == [(("tenant", 3), "listener-9-3"), (("uid", 1000), "foreign-9-3")]


def test_slots_know_their_journal():
    journal = Journal()
    assert (journal.take(), journal.take()) == (Slot(journal, 0), Slot(journal, 1))
    journal.close()
