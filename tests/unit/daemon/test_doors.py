"""Which entrances of a predecessor are taken over: whole ones, of containers that may have one."""

import os
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from graft.daemon import doors
from graft.daemon.doors import Doors

MAP = 77


class FakeStore:
    def __init__(self):
        self.removed = []

    def remove(self, name):
        self.removed.append(name)


@pytest.fixture
def made(monkeypatch):
    """Doors, and the tenants 5 (may have one) and 6 (may not)."""
    monkeypatch.setattr(doors, "belongs_here", lambda _fd: True)
    store: Any = FakeStore()
    nothing: Any = None
    programs: Any = SimpleNamespace(common=lambda: MAP)
    tenants = {
        number: SimpleNamespace(id=number, kind="container", trusted=True, netns_made=good, netns_fd=9, netns=number)
        for number, good in ((5, True), (6, False))
    }
    return Doors(store, nothing, programs, lambda netns: netns == 1, ipv6=True), tenants


class Stored:
    """Descriptors by name, as a store gives them back."""

    def __init__(self):
        self.pairs = []

    def listener(self, name, *, listens=True):
        sock = socket.create_server(("127.0.0.1", 0)) if listens else socket.socket()
        self.pairs.append((name, sock.detach()))

    def link(self, name):
        self.pairs.append((name, os.open(os.devnull, os.O_RDONLY)))

    def closed(self):
        return [name for name, fd in self.pairs if not os.path.exists(f"/proc/self/fd/{fd}")]


def test_a_whole_one(made):
    ours, tenants = made
    stored = Stored()
    stored.link(f"entrance-5-{MAP}")
    stored.listener("inside-5")
    found = ours.restore(tenants, stored.pairs)
    assert list(found) == [5]
    assert [found[5].link, found[5].listener.fileno()] == [fd for _, fd in stored.pairs]
    assert not ours.store.removed
    found[5].listener.close()
    os.close(found[5].link)


@pytest.mark.parametrize(
    ("listeners", "links"),
    [
        (["inside-5"], []),
        ([], [f"entrance-5-{MAP}"]),
        (["inside-5", "inside-5"], [f"entrance-5-{MAP}"]),
        (["inside-5"], [f"entrance-5-{MAP}", f"entrance-5-{MAP}"]),
        (["inside-5"], [f"entrance-5-{MAP + 1}"]),
        (["inside-5"], ["entrance-5"]),
        (["inside-6"], [f"entrance-6-{MAP}"]),
        (["inside-8"], [f"entrance-8-{MAP}"]),
    ],
)
def test_what_is_not_whole_is_closed(made, listeners, links):
    ours, tenants = made
    stored = Stored()
    for name in listeners:
        stored.listener(name)
    for name in links:
        stored.link(name)
    assert not ours.restore(tenants, stored.pairs)
    assert sorted(ours.store.removed) == sorted(stored.closed()) == sorted([*listeners, *links])


def test_a_listener_that_was_destroyed(made):
    ours, tenants = made
    stored = Stored()
    stored.listener("inside-5", listens=False)
    stored.link(f"entrance-5-{MAP}")
    assert not ours.restore(tenants, stored.pairs)
    assert len(stored.closed()) == 2


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("kind", "wrapper"), ("trusted", False), ("netns_made", False), ("netns_fd", -1), ("netns", 1)],
)
def test_who_may_have_one(made, attribute, value):
    ours, tenants = made
    assert ours.may_be(tenants[5])
    setattr(tenants[5], attribute, value)
    assert not ours.may_be(tenants[5])


def test_a_netns_of_another_user_namespace(made, monkeypatch):
    ours, tenants = made
    monkeypatch.setattr(doors, "belongs_here", lambda _fd: False)
    assert not ours.may_be(tenants[5])
