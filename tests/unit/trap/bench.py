"""Listeners and a dispatcher on fakes: a graftd without a kernel, for units."""

import errno
import os
import queue
import select
import socket
import threading
from types import SimpleNamespace
from typing import Any

from graft.bench.lab import wait_for
from graft.kernel import linux
from graft.process.loop import Loop
from graft.trap import listeners
from graft.trap.actions import PROCEED, Answer
from graft.trap.journal import SLOTS
from graft.trap.listener import NOTIFICATION
from graft.trap.listeners import Listeners
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
        self.direct = SimpleNamespace(follow=lambda tenant: None)
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
        maps: Any = {name: SimpleNamespace(fd=-1) for name in ("stamps", "prepared")}
        self.listeners = Listeners(graftd, maps, directory)
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
