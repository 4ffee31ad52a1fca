"""What the kernel half reports: how much of it, the process and the time, and what is allowed where somebody reads."""

import contextlib
import os
import socket
import time

from graft.kernel import linux
from graft.kernel.denials import ALLOWED, Event
from graft.kernel.reports import Reports
from graft.rules import tables
from tests.kernel.harness import TENANT_ID, World, isolated

CLONE_NEWPID = 0x20000000  # linux/sched.h
SHARE = 64  # csrc/report.bpf.h, REFUSED_MAX


def refuse(world, count):
    """Be refused that often."""
    sock = world.sock(socket.AF_INET, socket.SOCK_DGRAM)
    for _ in range(count):
        with contextlib.suppress(OSError):
            sock.bind(("203.0.113.1", 5))


def told(world):
    """All events that are in the ring."""
    events: list[Event] = []
    world.kernel.reports.open(events.append)
    while True:
        before = len(events)
        world.kernel.reports.drain()
        if len(events) == before:
            return events


@isolated
def test_who_and_when(world: World):
    before = time.time()
    refuse(world, 1)
    (event,) = told(world)
    assert (event.tenant, event.op, event.pid) == (TENANT_ID, "bind", os.getpid())
    assert before - 1 < event.when < time.time() + 1


def in_a_pidns(call):
    """Call @call in a process that is the first of a new pid namespace."""
    parent = os.fork()
    if parent == 0:
        status = 1
        try:
            linux.unshare(CLONE_NEWPID)
            child = os.fork()
            if child == 0:
                call()
                status = 0
            else:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 0


@isolated
def test_processes_are_numbered_as_the_reader_s_pid_namespace_does(world: World):
    def reader():
        Reports(world.kernel.lib, world.kernel.maps)  # graftd, in a pid namespace that is not the first
        refuse(world, 1)
        in_a_pidns(lambda: refuse(world, 1))

    in_a_pidns(reader)
    refuse(world, 1)  # a process that the reader cannot see
    events = told(world)
    assert [event.pid for event in events] == [1, 3, 0]


@isolated
def test_a_tenant_has_its_share_and_what_is_beyond_is_counted(world: World):
    refuse(world, 5000)
    events = told(world)
    assert SHARE <= len(events) <= 10 * SHARE
    assert len(events) + world.kernel.reports.dropped(TENANT_ID) == 5000
    assert world.kernel.counters(TENANT_ID) == {("bind", "no ingress rule"): 5000}
    time.sleep(0.15)  # the next window
    refuse(world, 1)
    assert world.kernel.reports.dropped(TENANT_ID) == 5000 - len(events)


@isolated
def test_what_is_allowed_is_told_where_somebody_reads(world: World):
    world.tenant(tables.TENANT_EGRESS)

    def bind():
        with world.sock(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.bind(("127.0.0.1", 7))

    bind()
    world.tenant(tables.TENANT_EGRESS | tables.TENANT_WATCHED)
    bind()  # `config` says that nobody reads
    assert told(world) == []
    world.kernel.tell(watched=True)
    bind()
    (event,) = told(world)
    assert (event.op, event.reason, event.port) == ("bind", ALLOWED, 7)
    assert event.real_port >= 61440
    world.tenant(tables.TENANT_EGRESS)
    bind()
    assert told(world) == []
