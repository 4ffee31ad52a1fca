"""What a graft-relay reports is not believed where it cannot be."""

import socket
from typing import Any

import pytest

from graft.daemon.relay import QUESTION, REPORT, Relay
from graft.daemon.shares import EACH


class Running:
    """A process that the relay would be."""

    killed = False

    def kill(self):
        self.killed = True

    def poll(self):
        return None


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def started(pair):
    """One that this graftd has started, with three pairs of which one has ended; and its own end."""
    ours, theirs = pair
    process: Any = Running()
    relay = Relay(ours, process)
    for _ in range(3):
        relay.join(ours, theirs)
    theirs.send(REPORT.pack(3, 1, 0))
    assert relay.count()
    assert relay.open == 2
    return relay, theirs


@pytest.mark.parametrize("report", [(3, 4, 0), (4, 1, 0), (3, 0, 0), (2**64 - 1, 2**64 - 1, 0), (1, 2, 0)])
def test_numbers_that_cannot_be(started, report):
    relay, theirs = started
    theirs.send(REPORT.pack(*report))
    assert not relay.count()
    assert relay.open == 2


@pytest.mark.parametrize("message", [b"x", bytes(REPORT.size - 1), bytes(REPORT.size + 1)])
def test_another_message(started, message):
    relay, theirs = started
    theirs.send(message)
    assert not relay.count()


def test_numbers_that_can_be(started):
    relay, theirs = started
    theirs.send(REPORT.pack(2, 1, 0))
    assert relay.count(), "it has not read the last pair yet"
    theirs.send(REPORT.pack(3, 3, 0))
    assert relay.count()
    assert relay.open == 0
    assert relay.count(), "there is no message"
    theirs.shutdown(socket.SHUT_RDWR)
    assert not relay.count()


def test_one_of_an_earlier_graftd(pair):
    """It is asked what it has; a report that is older than the answer says nothing."""
    ours, theirs = pair
    relay = Relay(ours)
    assert theirs.recv(10) == QUESTION
    theirs.send(REPORT.pack(50, 20, 0))
    assert relay.count()
    assert not relay.known
    theirs.send(REPORT.pack(60, 21, 1))
    assert relay.count()
    assert relay.known
    assert relay.open == 39
    theirs.send(REPORT.pack(60, 22, 2))
    assert relay.count()
    assert relay.open == 38


def test_one_of_an_earlier_graftd_that_claims_too_much(pair):
    """Else it would use up what all containers have in common."""
    ours, theirs = pair
    relay = Relay(ours)
    theirs.send(REPORT.pack(EACH + 1, 0, 1))
    assert not relay.count()


def test_the_end(started):
    relay, _ = started
    relay.end()
    assert relay.process.killed
    assert not relay.ended()
