"""Descriptor numbers of a target: chosen, and kept while a socket is put there.

Theory of operation

Goal: a socket of AF_GRAFT gets a number between FAMILY_FIRST and FAMILY_LAST, and nothing that the program has is
closed for it.

Facts: SECCOMP_IOCTL_NOTIF_ADDFD adds a descriptor at the lowest free number, or at a given one (ADDFD_FLAG_SETFD),
where it closes what is there, as dup2(2) does. There is no way to say "there, if it is free". Between a look at
/proc/PID/fd and the injection two others may take the number: another thread of graftd, for another call of the same
process, and the program itself.

Solution: against the first, one process's numbers are chosen and filled by one thread at a time (Turns). The second
cannot happen while the caller is the process's only thread, since that one waits. A process with more threads gets a
number of the range only if its lowest free number is far below: open(2), socket(2), accept(2) and dup(2) take the
lowest, and would have to fill MARGIN of them first. Else the socket gets the lowest free number: nothing is closed.

For a socket that replaces another one (Replace), each number is looked at again just before it is filled.

What still fails: a thread that names a number of the range itself (dup2(2), F_DUPFD), or closes and reuses the one
that another thread is binding or connecting, in the microseconds between look and injection.
"""

import contextlib
import os
import threading
from collections.abc import Iterator

from graft.kernel.traps import FAMILY_FIRST, FAMILY_LAST
from graft.trap import target

MARGIN = 256


class Turns:
    """Locks by a number, each of which exists while somebody has it or waits for it. For any thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.turns: dict[int, tuple[threading.Lock, int]] = {}  # the lock, and how many threads have or want it

    def of(self, pid: int) -> contextlib.AbstractContextManager[None]:
        """Run the body while no other thread does so for the process of thread @pid. Raises OSError if it is gone."""
        return self.at(target.thread_group(pid))

    @contextlib.contextmanager
    def at(self, number: int) -> Iterator[None]:
        """Run the body while no other thread does so for this @number."""
        with self.lock:
            turn, count = self.turns.get(number, (threading.Lock(), 0))
            self.turns[number] = turn, count + 1
        try:
            with turn:
                yield
        finally:
            with self.lock:
                turn, count = self.turns[number]
                if count == 1:
                    del self.turns[number]
                else:
                    self.turns[number] = turn, count - 1


def free_number(pid: int) -> int | None:
    """A number of AF_GRAFT's range that is free in the thread's table and safe to fill; None if there is none.

    It looks at single numbers: a table may have a million, and to list that takes a second of graftd's time. Raises
    OSError if the thread is gone.
    """
    table = os.open(f"/proc/{pid}/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        number = _first_free(table, FAMILY_FIRST, FAMILY_LAST)
        if number is None or target.threads(pid) == 1:
            return number
        return number if _first_free(table, 0, FAMILY_FIRST - MARGIN) is not None else None
    finally:
        os.close(table)


def _first_free(table: int, first: int, last: int) -> int | None:
    """The first number that is not in /proc/PID/fd, which @table is, of @first to @last; None if there is none."""
    for number in range(first, last + 1):
        try:
            os.stat(str(number), dir_fd=table, follow_symlinks=False)
        except FileNotFoundError:
            return number
    return None


def is_socket(pid: int, number: int, inode: int) -> bool:
    """Is the thread's descriptor @number the socket with this inode, right now?"""
    return target.link(pid, number) == f"socket:[{inode}]"
