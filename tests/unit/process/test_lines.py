"""Jobs that block: those of one key in their order, the others beside them, and the loop goes on."""

import threading
import time

import pytest

from graft.process.lines import Lines
from graft.process.loop import Loop


@pytest.fixture
def loop():
    return Loop()


def turn(loop, condition):
    """Run the loop until @condition is true."""
    until = time.monotonic() + 10

    def tick():
        loop.running = not condition() and time.monotonic() < until
        return 0.02 if loop.running else 0

    loop.running = True
    loop.run(tick)
    assert condition()


def test_one_that_blocks_keeps_its_own_key_waiting(loop):
    told, gate = [], threading.Event()
    lines = Lines(loop, 2, lambda: told.append(("changed", True)))

    def job(name, wait=False):
        def begin():
            def work():
                assert not wait or gate.wait(10)
                return lambda: told.append((name, threading.current_thread() is threading.main_thread()))

            return work

        return begin

    lines.push("a", job("a1", wait=True))
    lines.push("a", job("a2"))
    lines.push("b", job("b1"))
    turn(loop, lambda: not lines.is_busy("b"))
    assert told == [("b1", True), ("changed", True)]
    assert lines.is_busy("a")
    gate.set()
    turn(loop, lambda: not len(lines))
    assert told[2::2] == [("a1", True), ("a2", True)]


def test_what_fails_ends_nothing(loop):
    told = []
    lines = Lines(loop, 1, lambda: told.append("changed"))

    def fail():
        raise ValueError

    lines.push("a", fail)  # it is not begun
    assert not lines.is_busy("a")
    lines.push("a", lambda: fail)  # in the thread
    lines.push("a", lambda: lambda: fail)  # in the loop
    lines.push("a", lambda: lambda: lambda: told.append("done"))
    turn(loop, lambda: not len(lines))
    assert told == ["changed", "changed", "done", "changed"]


def test_no_thread_can_be_made(loop, monkeypatch):
    def refuse(*_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    told = []
    lines = Lines(loop, 1, lambda: None)
    lines.push("a", lambda: lambda: lambda: told.append("done"))
    turn(loop, lambda: not len(lines))
    assert told == ["done"]


def test_the_same_waits_in_line_once(loop):
    begun, gate = [], threading.Event()
    lines = Lines(loop, 1, lambda: None)

    def begin():
        begun.append(1)

    lines.push("a", lambda: lambda: (gate.wait(10), lambda: None)[1])
    for _ in range(3):
        lines.push("a", begin)
    gate.set()
    turn(loop, lambda: not len(lines))
    assert begun == [1]


def test_the_end_waits_for_what_has_begun_but_not_for_ever(loop):
    told, gate = [], threading.Event()
    lines = Lines(loop, 2, lambda: None)
    lines.push("a", lambda: lambda: (threading.Event().wait(0.1), lambda: told.append("done"))[1])
    lines.push("b", lambda: lambda: (gate.wait(10), lambda: told.append("late"))[1])
    lines.finish(2)
    assert told == ["done"]
    gate.set()
    lines.finish(5)
    assert told == ["done", "late"]
