"""Jobs that may block, in threads: those of one key in their order, and what comes of each is done in the loop.

For what waits for a lock of the kernel's, such as the rtnl lock of its network devices. A job that waits keeps the
jobs of its own key waiting, and a thread busy. The loop goes on.
"""

import os
import queue
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from functools import partial

from graft.log import log
from graft.process.loop import Loop
from graft.process.workers import Workers

Then = Callable[[], None]  # in the loop, when the job has ended
Job = Callable[[], Then]  # in a thread; it touches nothing of the loop's
Begin = Callable[[], Job | None]  # in the loop, when its turn comes; None: nothing is to be done


class Lines:
    """A line of jobs for each key. All methods are for the loop's thread."""

    def __init__(self, loop: Loop, most: int, changed: Callable[[], None]) -> None:
        """@most: how many threads. @changed is called after what has come of a job is done."""
        self._workers = Workers(most)
        self._changed = changed
        self._lines: dict[Hashable, deque[Begin]] = {}  # of the keys that are busy
        self._results: queue.SimpleQueue[tuple[Hashable, Then]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        loop.add(self._wake, lambda _events: self._collect())

    def __len__(self) -> int:
        """How many keys are busy."""
        return len(self._lines)

    def is_busy(self, key: Hashable) -> bool:
        """Has a job of this key not ended, or not begun?"""
        return key in self._lines

    def push(self, key: Hashable, begin: Begin) -> None:
        """Have @begin called after the jobs of @key that are in line. One that waits there already comes once."""
        line = self._lines.get(key)
        if line is None:
            self._lines[key] = deque([begin])
            self._next(key)
        elif begin not in line:
            line.append(begin)

    def wait(self, key: Hashable, seconds: float) -> None:
        """Wait until the jobs of @key have ended, for @seconds at most. The loop does nothing else meanwhile."""
        self._take_until(lambda: key not in self._lines, seconds)

    def finish(self, seconds: float) -> None:
        """Wait until all jobs have ended, for @seconds at most, when the loop has ended."""
        self._take_until(lambda: not self._lines, seconds)

    def _take_until(self, done: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not done() and (left := until - time.monotonic()) > 0:
            with suppress(queue.Empty):
                self._take(*self._results.get(timeout=left))

    def _next(self, key: Hashable) -> None:
        line = self._lines[key]
        while line:
            try:
                job = line.popleft()()
            except Exception:  # what is wrong with one must not stop the others
                log.exception("a job was not begun")
                continue
            if job:
                try:
                    self._workers.run(partial(self._work, key, job))
                except RuntimeError:  # no thread can be made: to block is better than to leave it undone
                    self._work(key, job)
                return
        del self._lines[key]

    def _work(self, key: Hashable, job: Job) -> None:
        then: Then = _nothing
        try:
            then = job()
        except Exception:
            log.exception("a job failed")
        self._results.put((key, then))
        os.eventfd_write(self._wake, 1)

    def _collect(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        with suppress(queue.Empty):
            while True:
                self._take(*self._results.get_nowait())

    def _take(self, key: Hashable, then: Then) -> None:
        try:
            then()
        except Exception:
            log.exception("what has come of a job could not be done")
        self._next(key)
        self._changed()


def _nothing() -> None:
    """What comes of a job that failed."""
