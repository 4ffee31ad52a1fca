"""What is written to a caller's memory reaches that caller or nobody."""

import ctypes
import errno
import mmap
import os
import signal
import struct

import pytest

from graft.trap import caller
from graft.trap.caller import Caller
from graft.trap.listener import Notification
from tests.conftest import lack

NR_CLONE3 = 435
BEFORE, AFTER = b"before", b"after!"


def made(pid, waiting=lambda: True):
    return Caller(Notification(1, pid, 51, 0xC000003E, (0,) * 6), waiting)


def stop(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture
def memory():
    """A page with the same address and text in this process and its children, but a copy in each."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    page.write(BEFORE)
    return page, ctypes.addressof(ctypes.c_char.from_buffer(page))


@pytest.fixture
def child(memory):
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    yield pid
    if os.path.exists(f"/proc/{pid}"):
        stop(pid)


def test_read_and_write(child, memory):
    _, address = memory
    made(child).write((address, AFTER), (address + 100, b"x"))
    assert made(child).read(address, len(AFTER)) == AFTER
    assert made(child).read(address + 100, 1) == b"x"


def test_a_value_is_cut_to_the_room_that_there_is(child, memory):
    _, address = memory
    made(child).write((address + 64, struct.pack("=i", 3)))
    made(child).write_value(address, address + 64, AFTER)
    assert made(child).read(address, 6) == AFTER[:3] + BEFORE[3:]
    assert made(child).read(address + 64, 4) == struct.pack("=i", 6)


def test_who_does_not_wait_is_left_alone(child, memory):
    _, address = memory
    gone = made(child, lambda: False)
    for work in (lambda: gone.write((address, AFTER)), lambda: gone.read(address, 6), gone.owner):
        with pytest.raises(ProcessLookupError):
            work()
    assert made(child).read(address, 6) == BEFORE


def reuse(pid):
    """A process with the PID that another one had; its own copy of our memory."""
    wanted = (ctypes.c_int * 1)(pid)
    # struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, its size
    arguments = struct.pack("=10Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = libc.syscall(ctypes.c_long(NR_CLONE3), arguments, ctypes.c_size_t(len(arguments)))
    if number == 0:
        while True:
            libc.pause()
    if number < 0 and ctypes.get_errno() == errno.EPERM:
        lack("giving a process a PID needs CAP_SYS_ADMIN")
    assert number == pid, os.strerror(ctypes.get_errno())


def test_the_next_process_with_the_same_pid_is_not_written_to(child, memory):
    """The caller is killed, and its PID is another process's, right after the kernel said that it waits."""
    _, address = memory

    def waiting():
        stop(child)
        reuse(child)
        return True

    with pytest.raises(OSError) as raised:  # noqa: PT011 - any errno: the answer is dropped
        made(child, waiting).write((address, AFTER))
    assert raised.value.errno in (errno.EFAULT, errno.ESRCH, errno.EIO)
    assert made(child).read(address, 6) == BEFORE


def test_what_the_caller_may_not_write_is_not_written(child, memory):
    """/proc/PID/mem alone would write to read-only pages, too."""
    _, address = memory
    with open(f"/proc/{child}/maps") as maps:
        code = next(line for line in maps if " r-xp " in line and "/" in line)
    start = int(code.split("-")[0], 16)
    text = made(child).read(start, 6)
    for place in (start, 0, (1 << 64) - 2, 1 << 63):
        with pytest.raises(OSError, match="Bad address"):
            made(child).write((address, AFTER), (place, AFTER))
    assert made(child).read(address, 6) == BEFORE, "nothing is written if one part cannot be"
    assert made(child).read(start, 6) == text


def test_a_page_that_cannot_be_had(tmp_path):
    """Beyond the end of its file a mapping is writable, and the write fails."""
    with open(tmp_path / "file", "w+b") as file:
        file.truncate(mmap.PAGESIZE)
        page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
    with pytest.raises(OSError, match="Bad address"):
        made(os.getpid()).write((ctypes.addressof(ctypes.c_char.from_buffer(page)), AFTER))


def test_both_ways_to_know_what_is_writable(child):
    os.kill(child, signal.SIGSTOP)  # what it does after its fork changes its mappings
    os.waitpid(child, os.WUNTRACED)
    with open(f"/proc/{child}/maps", "rb") as maps:
        lines = maps.readlines()
        spans = [[int(edge, 16) for edge in line.split()[0].split(b"-")] for line in lines]
        assert len(spans) > 10
        for start, end in spans:
            for part in ((start, end - start), (start, 1), (end - 1, 1), (end - 1, 2), (start - 1, 2)):
                maps.seek(0)
                assert caller.writable(maps, [part]) == caller.writable_by_lines(lines, [part]), part


def test_a_look_at_the_mappings_ends():
    """A caller with tens of thousands of mappings does not hold up the others."""
    mapping = b"%x-%x rw-p 00000000 00:00 0\n"
    lines = [mapping % (n << 12, (n + 1) << 12) for n in range(caller.LINES_MAX + 1)]
    last = caller.LINES_MAX << 12
    assert caller.writable_by_lines(lines, [(last - 8, 8)])
    assert not caller.writable_by_lines(lines, [(last, 8)])
