"""Messages: what is taken, what is refused, and where a document ends."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graft import protocol
from graft.errors import UsageError
from graft.trap import listener
from graft.trap.journal import ANSWER_NUMBER, ANSWER_PROCEED, SLOT, SLOT_HELD, SLOTS, Journal

RUNC = {
    "ociVersion": "1.0.2-dev",
    "fds": ["seccompFd"],
    "pid": 4242,
    "metadata": '{"publish": ["8080:80"]}',
    "state": {"ociVersion": "1.0.2-dev", "id": "web", "status": "creating", "pid": 4242, "bundle": "/b"},
}


def test_requests():
    line = json.dumps({"op": "endpoint-add", "version": "1", "endpoints": [{"name": "a", "words": ["type", "ipv4"]}]})
    assert isinstance(protocol.decode_request(line.encode()), protocol.EndpointAdd)
    for bad in (
        b"",
        b"{}\n",
        b'{"op":"no-such","version":"1"}',
        b'{"op":"ps"}',
        b'{"op":"ps","version":1}',
        b"[" * 9999,
    ):
        with pytest.raises(UsageError):
            protocol.decode_request(bad)
    with pytest.raises(UsageError, match="unknown field"):
        protocol.decode_request(b'{"op":"ps","version":"1","surprise":1}')


def test_runtime_state():
    state = protocol.decode_state(json.dumps(RUNC).encode())
    assert (state.state.id, state.pid, state.fds) == ("web", 4242, ["seccompFd"])
    assert protocol.decode_metadata(state.metadata).request.publish == ("8080:80",)
    assert protocol.decode_metadata("").request.publish == ()
    with pytest.raises(UsageError):
        protocol.decode_metadata('{"publsh": []}')


def test_document_end():
    whole = json.dumps(RUNC, indent=1).encode()
    for cut in range(1, len(whole)):
        assert not protocol.complete(whole[:cut]) or cut == len(whole), whole[:cut][-20:]
    assert protocol.complete(whole)
    assert protocol.complete(whole + b"\n")
    assert protocol.complete(b"hello there")
    assert protocol.complete(b'{"argv": ["awk", "{ print"]}\n'), "a bracket in a text is none of the document's"
    assert protocol.complete(b'{"a": 1} trailing')


@given(st.binary(max_size=200))
def test_garbage_is_a_usage_error(data):
    protocol.complete(data)
    for decode in (protocol.decode_request, protocol.decode_state):
        with contextlib.suppress(UsageError):
            decode(data)


def fill(slot, number):
    slot.journal.raw(slot.number)[:] = listener.NOTIFICATION.pack(number, 4242, 0, 41, 0xC000003E, 0, 2, 1, 0, 0, 0, 0)


def test_journal_survives():
    journal = Journal()
    slot, done = journal.take(), journal.take()
    assert slot is not None
    assert done is not None
    fill(slot, 77)
    slot.injecting(4711, ANSWER_PROCEED)
    fill(done, 78)
    done.release()
    successor = Journal(journal.fd)
    ((again, call, inode, answer),) = successor.pending(held=False)
    assert (inode, answer) == (4711, ANSWER_PROCEED)
    assert (again.number, call.id, call.pid, call.nr, call.args[:2]) == (slot.number, 77, 4242, 41, (2, 1))
    again.release()
    assert Journal(journal.fd).pending(held=False) == []


def test_what_a_living_helper_holds_is_its_own():
    journal = Journal()
    slots = [slot for slot in (journal.take(), journal.take(), journal.take()) if slot]
    for slot in slots[:2]:
        fill(slot, 90 + slot.number)
    for slot in slots[1:]:  # as graft-sup does: one call is its own, one it still waits for
        SLOT.pack_into(journal.map, journal._at(slot.number), SLOT_HELD, 0, 11)
    assert [p.call.id for p in journal.pending(held=False)] == [90]
    assert [(p.call.id, p.inode, p.answer) for p in journal.pending(held=True)] == [
        (90, 0, ANSWER_NUMBER),
        (91, 11, ANSWER_NUMBER),
    ]
    assert journal.take() == slots[2]  # what it waited for is free again


def test_journal_is_bounded():
    journal = Journal()
    assert len([journal.take() for _ in range(SLOTS)]) == SLOTS
    assert journal.take() is None
