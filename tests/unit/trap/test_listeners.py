"""The listeners: what a predecessor left, their end, and their graft-sups."""

import errno
import os
import select
import socket
import time

import pytest

from graft.bench.lab import wait_for
from graft.kernel import linux
from graft.trap.dispatch import find_socket
from graft.trap.journal import ANSWER_NUMBER, ANSWER_PROCEED, FLAGS_OFFSET, SLOTS, SUP_BIND, SUP_FORWARD, Journal
from graft.trap.listener import NOTIFICATION
from graft.trap.listeners import RESTARTS, RESTARTS_SECONDS
from tests.unit.fakes import make_tenant
from tests.unit.trap.bench import FakeHelper, call

SECONDS = 10
GONE = 404  # the id of a call whose target has died


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


def test_whose_binds_graft_sup_prepares(bench):
    """A direct container's, if each is of one kind: its endpoints say so, and the wrappers inside it."""
    def flags(tenant):
        watched.tenant = tenant
        bench.listeners.divide(tenant)
        return watched.journal.map[FLAGS_OFFSET]

    watched = bench.listen()
    tenant = watched.tenant
    assert flags(tenant) == 0
    tenant.cgroup = "/sys/fs/cgroup/web"
    assert flags(tenant) == SUP_FORWARD | SUP_BIND
    for attribute, value in (("traps_addresses", True), ("place", 1)):
        before = getattr(tenant, attribute)
        setattr(tenant, attribute, value)
        assert flags(tenant) == SUP_FORWARD
        setattr(tenant, attribute, before)
    inner = bench.listen("inner", 2).tenant
    inner.parent, inner.scope = tenant, 1
    bench.registry.scopes[1] = inner
    assert flags(tenant) == SUP_FORWARD
    del bench.registry.scopes[1]
    inner.parent = None
    assert flags(tenant) == SUP_FORWARD | SUP_BIND


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
