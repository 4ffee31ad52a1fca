"""Who may give orders. What is read of a peer that ends meanwhile is no reason to take it for a container's."""

import os
import socket
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

from graft.errors import Refused
from graft.kernel import linux
from graft.tenants import peers
from graft.tenants.peers import Peer, refuse_contained

HOME = 1
# about which the peer may end: after the second, before each of the others
QUESTIONS = ("in_our_user_namespace", "netns", "is_filtered", "administrates")


class Client:
    """A process that has connected, and waits."""

    def __init__(self, monkeypatch):
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(("sleep", "600"))
        self.pid = self.process.pid
        monkeypatch.setattr(linux, "credentials", lambda _sock: (self.pid, 0, 0))
        monkeypatch.setattr(linux, "peer_pidfd", lambda _sock, pid: os.pidfd_open(pid))
        self.peer = Peer(ours)
        ours.close()
        theirs.close()

    def end(self):
        self.process.kill()
        self.process.wait()
        self.pid = 0


@pytest.fixture
def client(monkeypatch):
    one = Client(monkeypatch)
    yield one
    one.end()
    one.peer.close()


def registry(netns: int, *kinds: str) -> Any:
    def netns_of(pid: int) -> int:
        os.kill(pid, 0)  # OSError if it has ended
        return netns

    tenants = [SimpleNamespace(kind=kind) for kind in kinds]
    return SimpleNamespace(home=HOME, netns_of=netns_of, of_netns=lambda _netns: tenants)


def refusal(client: Client, netns: int, *kinds: str) -> str:
    try:
        refuse_contained(registry(netns, *kinds), client.peer, "the door")
    except Refused as error:
        return error.code
    return ""


@pytest.mark.parametrize("netns", [HOME, HOME + 1])
@pytest.mark.parametrize("question", QUESTIONS)
def test_one_that_ends_meanwhile(client, monkeypatch, question, netns):
    """An OCI runtime ends as soon as it has sent its message. That it has ended is all that is said of it."""
    asked = getattr(Peer, question)

    def ends(peer: Peer, *arguments: Any) -> Any:
        if question == "netns":
            found = asked(peer, *arguments)
            client.end()
            return found
        client.end()
        return asked(peer, *arguments)

    monkeypatch.setattr(Peer, question, ends)
    kinds = ("container",) if netns != HOME else ()
    assert (refusal(client, netns, *kinds), client.pid) in (("ESRCH", 0), ("", client.pid))


@pytest.mark.parametrize(
    ("netns", "kinds", "filtered", "capable", "code"),
    [
        (HOME, (), False, False, ""),
        (HOME, (), True, True, ""),
        (HOME, (), True, False, "EPERM"),
        (HOME + 1, (), False, True, ""),
        (HOME + 1, (), False, False, "EPERM"),
        (HOME + 1, ("container",), False, True, ""),
        (HOME + 1, ("container",), True, True, "EPERM"),
        (HOME + 1, ("api",), True, True, ""),
    ],
)
def test_one_that_lives(client, monkeypatch, netns, kinds, filtered, capable, code):
    monkeypatch.setattr(Peer, "is_filtered", lambda _peer: filtered)
    monkeypatch.setattr(Peer, "administrates", lambda _peer: capable)
    assert refusal(client, netns, *kinds) == code


def test_one_in_another_user_namespace(client, monkeypatch):
    monkeypatch.setattr(Peer, "in_our_user_namespace", lambda _peer: False)
    assert refusal(client, HOME) == "EPERM"


def test_what_is_asked():
    """The questions of this test are all that are asked."""
    code = peers._contained.__code__.co_names
    assert set(QUESTIONS) == set(code) & {name for name in vars(Peer) if not name.startswith("_")}
