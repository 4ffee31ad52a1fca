"""A run that is stopped ends each process that it has started, wherever the stop comes."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from graft.bench.stop import SIGNALS, Stop, Stopped


@pytest.fixture
def stop():
    numbers = (*SIGNALS, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    yield Stop()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def children():
    """The processes that this one has started and not waited for."""
    return set(Path("/proc/self/task", str(os.getpid()), "children").read_text().split())


def run(at_line):
    """Run a command, and call @at_line at each line of subprocess.py until it waits for the command's end."""
    left = 10  # of the lines that wait

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != subprocess.__file__ or not left:
            return None
        if event == "line":
            if frame.f_code.co_name in ("communicate", "wait", "_wait"):
                left -= 1
            at_line(frame, last=not left)
        return trace

    sys.settrace(trace)
    try:
        subprocess.run(("sleep", "60.5"), env={})
    finally:
        sys.settrace(None)


def test_a_stop_at_any_line_leaves_no_process(stop):
    """It comes at each line of subprocess.run() in turn; where that would leave a process it comes a moment later."""
    before = children()
    for moment in range(1, 10_000):
        lines = 0

        def at_line(frame, *, last, moment=moment):
            nonlocal lines
            lines += 1
            if lines == moment or last:
                stop._on_signal(signal.SIGTERM, frame)

        signal.setitimer(signal.ITIMER_REAL, 0)  # of the stop before
        stop.number, stop.raised = 0, False
        with contextlib.suppress(Stopped), stop.breakable():
            run(at_line)
        assert children() == before, moment
        if lines < moment:
            break
    assert moment > 60
