"""The journal's slots against the tables in csrc/sup.h: what pending() finds of an owner that was killed."""

import pytest

from graft.trap.journal import (
    ANSWER_NUMBER,
    ANSWER_PROCEED,
    EMPTY,
    SLOT,
    SLOT_FORWARDED,
    SLOT_FREE,
    SLOT_HELD,
    SLOTS,
    Journal,
)
from graft.trap.listener import NOTIFICATION

CALL = NOTIFICATION.pack(77, 4711, 0, 41, 0xC000003E, 0, 2, 1, 0, 0, 0, 0)


class Killed(BaseException):
    """Nothing that the journal's code could catch."""


@pytest.fixture
def journal():
    made = Journal()
    yield made
    made.close()


def put(journal: Journal, number: int, state: int, answer: int, inode: int, call: bytes) -> None:
    """Leave a slot as some owner left it."""
    journal.raw(number)[:] = call
    SLOT.pack_into(journal.map, journal._at(number), state, answer, inode)


def kept(journal: Journal, number: int) -> tuple[int, int, int]:
    """State, answer and inode of a slot."""
    state, answer, inode = SLOT.unpack_from(journal.map, journal._at(number))
    return state, answer, inode


@pytest.mark.parametrize("held", [False, True])
def test_a_free_slot_is_nobodys(journal, held):
    assert journal.pending(held=held) == []


@pytest.mark.parametrize(("state", "held"), [(SLOT_HELD, True), (SLOT_FORWARDED, False), (SLOT_FORWARDED, True)])
@pytest.mark.parametrize("inode", [0, 99])
def test_a_slot_without_a_call_is_freed(journal, state, held, inode):
    """Its owner waited for a call, or was releasing the slot."""
    put(journal, 3, state, 0, inode, EMPTY)
    assert journal.pending(held=held) == []
    assert kept(journal, 3) == (SLOT_FREE, ANSWER_NUMBER, 0)


@pytest.mark.parametrize("inode", [0, 99])
def test_a_call_of_a_dead_graft_sup_becomes_graftds(journal, inode):
    """It returns a number: graft-sup writes no answer, and memory that nobody wrote to says 0."""
    put(journal, 3, SLOT_HELD, 0, inode, CALL)
    (found,) = journal.pending(held=True)
    assert (found.slot.number, found.call.id, found.inode, found.answer) == (3, 77, inode, ANSWER_NUMBER)
    assert kept(journal, 3) == (SLOT_FORWARDED, ANSWER_NUMBER, inode)


def test_a_call_of_a_graft_sup_that_lives_is_its_own(journal):
    put(journal, 3, SLOT_HELD, 0, 99, CALL)
    assert journal.pending(held=False) == []
    assert kept(journal, 3) == (SLOT_HELD, 0, 99)


@pytest.mark.parametrize("answer", [ANSWER_NUMBER, ANSWER_PROCEED, 0, 111])
def test_a_call_of_a_killed_graftd_is_its_successors(journal, answer):
    put(journal, SLOTS - 1, SLOT_FORWARDED, answer, 99, CALL)
    (found,) = journal.pending(held=False)
    assert (found.slot.number, found.inode, found.answer) == (SLOTS - 1, 99, answer)


def test_a_slot_that_a_thread_is_busy_with_is_skipped(journal):
    put(journal, 3, SLOT_FORWARDED, ANSWER_NUMBER, 0, CALL)
    assert journal.pending(held=True, besides={3}) == []
    assert kept(journal, 3) == (SLOT_FORWARDED, ANSWER_NUMBER, 0)


def test_slots_are_taken_once(journal):
    put(journal, 1, SLOT_HELD, 0, 0, EMPTY)
    taken = [journal.take() for _ in range(SLOTS)]
    assert [slot.number for slot in taken[:-1]] == [0, *range(2, SLOTS)]
    assert taken[-1] is None
    assert kept(journal, 0) == (SLOT_FORWARDED, ANSWER_NUMBER, 0)


def test_a_slot_is_free_only_when_it_is_empty(journal, monkeypatch):
    """graft-sup may take it at once: what graftd wrote after that would be over what graft-sup noted there."""
    slot = journal.take()
    journal.raw(slot.number)[:] = CALL
    slot.injecting(99, 111)

    def killed(*_: int) -> None:
        raise Killed

    monkeypatch.setattr(journal, "_set_state", killed)
    with pytest.raises(Killed):
        slot.release()
    assert kept(journal, slot.number) == (SLOT_FORWARDED, ANSWER_NUMBER, 0)
    assert bytes(journal.raw(slot.number)) == EMPTY
    monkeypatch.undo()
    assert journal.pending(held=False) == []
    assert journal.take() == slot


def test_a_call_is_graftds_only_with_its_answer(journal, monkeypatch):
    """A successor believes the answer of a forwarded slot: 0 there would be returned for a descriptor's number."""
    put(journal, 3, SLOT_HELD, 0, 99, CALL)

    def killed(*_: int) -> None:
        raise Killed

    monkeypatch.setattr(journal, "_set_state", killed)
    with pytest.raises(Killed):
        journal.pending(held=True)
    assert kept(journal, 3) == (SLOT_HELD, ANSWER_NUMBER, 99)
