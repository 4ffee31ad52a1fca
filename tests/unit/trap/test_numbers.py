"""A number of AF_GRAFT's range: one call of a process at a time, and nothing that the program has."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from graft.kernel.traps import FAMILY_FIRST, FAMILY_LAST
from graft.trap.numbers import MARGIN, Turns, free_number, is_socket

PROGRAM = """
import os, resource, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))
for n in map(int, sys.argv[2].split()): os.dup2(0, n)
for _ in range(int(sys.argv[1])): threading.Thread(target=sys.stdin.readline, daemon=True).start()
print(flush=True)
sys.stdin.readline()
"""


def number(threads, taken):
    argv = (sys.executable, "-c", PROGRAM, str(threads), " ".join(map(str, taken)))
    with subprocess.Popen(argv, stdin=-1, stdout=-1) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            return free_number(process.pid)
        finally:
            process.kill()


LOWEST = range(3, FAMILY_FIRST - MARGIN + 1)


@pytest.mark.parametrize(
    ("threads", "taken", "found"),
    [
        (0, (), FAMILY_FIRST),
        (0, (FAMILY_FIRST,), FAMILY_FIRST + 1),
        (0, range(FAMILY_FIRST, FAMILY_LAST + 1), None),
        (0, range(3, FAMILY_FIRST), FAMILY_FIRST),  # the only thread waits for the answer
        (3, (), FAMILY_FIRST),
        (3, LOWEST[:-1], FAMILY_FIRST),
        (3, LOWEST, None),  # the next files that a thread opens may come there
        (3, range(3, FAMILY_LAST + 1), None),
    ],
)
def test_a_free_number(threads, taken, found):
    assert number(threads, taken) == found


def test_a_table_is_not_listed(monkeypatch):
    """It may be as long as the program likes."""
    monkeypatch.setattr(os, "listdir", None)
    monkeypatch.setattr(os, "scandir", None)
    assert free_number(os.getpid()) == FAMILY_FIRST
    with pytest.raises(FileNotFoundError):
        free_number(1 << 22)


def test_one_process_at_a_time():
    """The threads of a process take turns; those of another one do not wait for them."""
    turns, inside, worst = Turns(), [], []

    def work():
        for _ in range(200):
            with turns.of(os.getpid()):
                inside.append(1)
                worst.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    with turns.of(os.getppid()):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (max(worst), len(worst), turns.turns) == (1, 1600, {})


def test_a_process_that_is_gone():
    with pytest.raises(FileNotFoundError), Turns().of(1 << 22):
        pass


def test_what_a_number_is():
    with socket.socket() as one, open(os.devnull) as other:
        inode = os.fstat(one.fileno()).st_ino
        assert is_socket(os.getpid(), one.fileno(), inode)
        assert not is_socket(os.getpid(), one.fileno(), inode + 1)
        assert not is_socket(os.getpid(), other.fileno(), inode)
        assert not is_socket(os.getpid(), 1 << 20, inode)
