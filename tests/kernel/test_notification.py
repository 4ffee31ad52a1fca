"""What the supervisor takes for granted about seccomp_unotify(2), one fact a test."""

import errno
import os
import signal
import socket
import time

import pytest

from graft.kernel import linux
from graft.trap import filter as seccomp
from graft.trap.journal import Journal
from graft.trap.listener import NOTIFICATION, Listener, parse
from tests.conftest import need_root

pytestmark = pytest.mark.kernel


@pytest.fixture
def target():
    """A child under the filter that calls socket() and exits with the errno, or 100 + the descriptor."""
    need_root()
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            listener = linux.seccomp_listener(seccomp.program(), wait_killable=True)
        except OSError:
            listener = linux.seccomp_listener(seccomp.program(), wait_killable=False)
        socket.send_fds(theirs, [b"x"], [listener])
        os.close(listener)
        try:
            os._exit(100 + socket.socket().fileno())
        except OSError as error:
            os._exit(error.errno or 255)
    (fd,) = socket.recv_fds(ours, 1, 1)[1]
    yield pid, fd
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def receive(fd):
    buffer = bytearray(NOTIFICATION.size)
    assert Listener(fd, 1).receive(memoryview(buffer))
    return parse(buffer)


def test_inject_and_answer(target):
    pid, fd = target
    call = receive(fd)
    assert (call.nr, call.pid, call.args[:2]) == (linux.NR_SOCKET, pid, (2, 1 | socket.SOCK_CLOEXEC))
    listener = Listener(fd, 1)
    number = listener.inject(call.id, os.open("/dev/null", os.O_RDONLY), os.O_CLOEXEC)
    assert number is not None
    assert listener.answer(call.id, number)
    assert status(pid) == 100 + number


def test_an_errno_is_an_answer(target):
    pid, fd = target
    call = receive(fd)
    assert Listener(fd, 1).answer(call.id, error=errno.EMFILE)
    assert status(pid) == errno.EMFILE


def test_a_successor_answers_what_was_received(target):
    """The receiver dies between; whoever holds the descriptor and knows the id goes on."""
    pid, fd = target
    journal = Journal()
    slot = journal.take()
    assert slot is not None
    if os.fork() == 0:
        Listener(fd, 7).receive(journal.raw(slot.number))
        os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    ((_, call, _, _),) = Journal(journal.fd).pending(held=False)
    assert Listener(fd, 7).valid(call.id)
    assert Listener(fd, 7).answer(call.id, error=errno.EPERM)
    assert status(pid) == errno.EPERM


def test_a_descriptor_that_was_injected_stays_found(target):
    """The sender dies after ADDFD: the call still waits, and the target has the descriptor."""
    pid, fd = target
    call = receive(fd)
    sock = socket.socket()
    number = Listener(fd, 1).inject(call.id, sock.fileno(), 0)
    assert number is not None
    from graft.trap.dispatch import find_socket

    assert find_socket(call.pid, os.fstat(sock.fileno()).st_ino) == number
    assert Listener(fd, 1).answer(call.id, number)
    assert status(pid) == 100 + number


def test_without_a_holder_calls_fail_at_once(target):
    pid, fd = target
    receive(fd)
    os.close(fd)
    assert status(pid) == errno.ENOSYS


def test_the_end_of_the_target_is_a_hang_up(target):
    import select

    pid, fd = target
    call = receive(fd)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + 5
    while not any(events & select.POLLHUP for _, events in poll.poll(1000)):
        assert time.monotonic() < deadline
    assert not Listener(fd, 1).answer(call.id)
    assert Listener(fd, 1).inject(call.id, 0, 0) is None


def test_one_listener_a_process():
    need_root()
    pid = os.fork()
    if pid == 0:
        linux.seccomp_listener(seccomp.program(), wait_killable=False)
        try:
            linux.seccomp_listener(seccomp.program(), wait_killable=False)
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    assert status(pid) == errno.EBUSY
