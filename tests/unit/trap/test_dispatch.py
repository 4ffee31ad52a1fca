"""Trapped calls from the listener to the answer: who decides them, in which thread, and what a successor finds."""

import errno
import os
import select
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from graft.bench.lab import wait_for
from graft.kernel import linux
from graft.trap import dispatch
from graft.trap.actions import PROCEED, Answer, Inject, Replace
from graft.trap.dispatch import SLOW_CALLS, Watched
from graft.trap.journal import ANSWER_NUMBER, ANSWER_PROCEED, SLOTS, Journal, Slot
from tests.unit.fakes import make_tenant
from tests.unit.trap.bench import call

SECONDS = 10
GONE = 404  # the id of a call whose target has died


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
    bench.actions[1] = Inject(os.dup(0), cloexec=False, numbered=True)
    bench.receive(watched, call(1, pid=os.getpid()))
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
def test_a_socket_in_the_place_of_another(bench, monkeypatch, then, told, noted):
    watched, found = bench.listen(), []
    made = socket.socket()
    inode, fd = os.fstat(made.fileno()).st_ino, os.dup(made.fileno())
    watched.listener.on_inject = lambda: found.extend(watched.journal.pending(held=False))
    bench.actions[1] = Replace(fd, 77, [(5, False), (6, False), (9, True)], [], then)
    # 6 is another file by now
    monkeypatch.setattr(dispatch, "is_socket", lambda pid, number, inode: (pid, inode) == (os.getpid(), 77) and number != 6)
    bench.receive(watched, call(1, pid=os.getpid()))
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


def test_users_leave_threads_to_containers(bench, monkeypatch):
    """One person may have many uids."""
    monkeypatch.setattr(dispatch, "SLOW_CALLS_USERS", 2)
    watched = [bench.listen(tenant=make_tenant(bench.registry, f"u{uid}", uid, uid=uid), trusted=False) for uid in (1, 2, 3)]
    container = bench.listen("container", 4)
    go, handled = bench.hold(1, 2, 3), bench.graftd.supervisor.handled
    for number, each in enumerate(watched[:2], 1):
        bench.receive(each, call(number))
        handled.get(timeout=SECONDS)
    bench.receive(watched[2], call(3))
    wait_for(lambda: bench.dispatcher.queues, "the queue")
    bench.dispatcher.resume(None)
    assert (list(bench.dispatcher.queues), handled.empty()) == ([("uid", 3)], True)
    bench.receive(container, call(4))
    assert container.listener.next() == ("proceed", 4)
    go.set()
    assert all(bench.idle(each) for each in watched)
    wait_for(lambda: not bench.dispatcher.queues, "the queue's end")


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


def test_the_loop_does_not_wait_for_a_thread(bench, monkeypatch):
    """Where none can be made, a call is tried again at the next tick, and not before."""

    def run(_job):
        raise RuntimeError("can't start new thread")

    watched = bench.listen()
    monkeypatch.setattr(bench.dispatcher.workers, "run", run)
    bench.receive(watched, call(1))
    wait_for(lambda: bench.dispatcher.queues, "the queue")
    assert not bench.dispatcher.resume(None)
    monkeypatch.undo()
    assert bench.dispatcher.resume(None)
    assert not bench.dispatcher.resume(None)
    assert watched.listener.next() == ("proceed", 1)
