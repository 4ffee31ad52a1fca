"""What peers send is closed without a wait, wherever it is: on this kernel's sockets."""

import contextlib
import os
import socket
import struct
import time

import pytest

from graft.kernel import foreign
from graft.process import closing

QUICK = 0.3  # seconds


@pytest.fixture
def lingers():
    """Makes sockets whose last close waits for minutes, and the other ends, which see it."""
    foreign.watch_closes()
    kept = []
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # and nobody reads

        def make():
            made = socket.create_connection(server.getsockname())
            kept.append(server.accept()[0])
            made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            made.setblocking(False)
            for _ in range(2):
                with contextlib.suppress(BlockingIOError):
                    while made.send(bytes(1 << 16)):
                        pass
                time.sleep(0.001)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 300))
            return made.detach()

        yield make
        for sock in kept:
            sock.close()


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def end_within(seconds, before):
    """Tick as graftd does, until as many descriptors are open as before."""
    until = time.monotonic() + seconds
    while descriptors() > before or foreign._closing:  # a descriptor is gone before its close ends
        assert time.monotonic() < until, f"{descriptors() - before} are open"
        foreign.end_long_closes()
        time.sleep(0.1)


def in_a_queue(fds):
    a, b = socket.socketpair()
    socket.send_fds(a, [b"x"], fds)
    for fd in fds:
        os.close(fd)
    a.close()
    return b


@pytest.mark.parametrize("many", [1, 2, 600])
def test_what_lingers(lingers, many):
    before = descriptors()
    fds = [lingers() for _ in range(many)]
    before += many  # the other ends
    began = time.monotonic()
    for fd in fds:
        closing.close_foreign(fd)
    assert time.monotonic() - began < QUICK
    end_within(4, before)


def test_what_is_left_unread(lingers):
    before = descriptors()
    queue = in_a_queue([lingers(), lingers()])
    began = time.monotonic()
    closing.end(queue)
    assert time.monotonic() - began < QUICK
    end_within(4, before + 2)


def test_queues_in_queues(lingers):
    """The kernel has no more than four in one another in flight."""
    before = descriptors()
    made = []
    for _ in range(20):
        inner = in_a_queue([lingers()])
        for _ in range(3):
            inner = in_a_queue([inner.detach(), lingers()])
        made.append(inner.detach())
    began = time.monotonic()
    closing.close_foreign(*made)
    assert time.monotonic() - began < QUICK
    end_within(30, before + 80)


@pytest.mark.parametrize("flags", [0, socket.MSG_OOB], ids=["in band", "out of band"])
def test_a_message_is_received_whole(lingers, flags):
    """The last descriptor is one that nobody else has: where the kernel drops it, it waits."""
    before = descriptors()
    null = os.open("/dev/null", os.O_RDONLY)
    sending, receiving = socket.socketpair()
    with sending, receiving:
        closing.take_out_of_band(receiving)
        last = lingers()
        socket.send_fds(sending, [b"x"], [null] * (closing.MOST - 1) + [last], flags)
        os.close(last)
        began = time.monotonic()
        data, fds, told = closing.receive_fds(receiving)
        assert time.monotonic() - began < QUICK
        assert (data, len(fds), told & socket.MSG_CTRUNC) == (b"x", closing.MOST, 0)
        closing.close_foreign(*fds)
        assert time.monotonic() - began < QUICK
    os.close(null)
    end_within(4, before + 1)


def test_a_file_that_has_no_path(tmp_path, monkeypatch):
    """procfs shows no path that is longer than a page."""
    before = descriptors()
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    file = os.open("f", os.O_CREAT | os.O_RDWR)
    with pytest.raises(OSError, match="File name too long"):
        os.readlink(f"/proc/self/fd/{file}")
    reading, writing = os.pipe()
    closing.close_foreign(reading, file, writing)
    end_within(4, before)
    os.chdir(tmp_path)


def test_nothing_is_added_to_what_ends():
    sending, receiving = socket.socketpair()
    with sending:
        closing.end(receiving)
        assert receiving.fileno() == -1
        with pytest.raises(BrokenPipeError):
            sending.send(b"x")
