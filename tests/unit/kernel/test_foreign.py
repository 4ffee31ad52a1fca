"""Sockets that another process may hold up, on this kernel."""

import contextlib
import errno
import os
import socket
import struct
import threading
import time

import pytest

from graft.kernel import foreign
from graft.kernel.foreign import ForeignSocket


@pytest.mark.parametrize(("family", "kind"), [(2, 1), (10, 1), (2, 2), (10, 2), (1, 1), (1, 2)])
def test_it_is_what_was_adopted(family, kind):
    with socket.socket(family, kind) as mine:
        if family != socket.AF_UNIX:
            mine.bind(("127.0.0.1" if family == 2 else "::1", 0))
        with ForeignSocket.adopt(os.dup(mine.fileno())) as sock:
            assert (sock.family, sock.type, sock.proto) == (mine.family, mine.type, mine.getsockopt(1, socket.SO_PROTOCOL))
            assert os.fstat(sock.fileno()).st_ino == os.fstat(mine.fileno()).st_ino
            assert not os.get_inheritable(sock.fileno())
            assert sock.getsockname() == mine.getsockname()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == bytes(8)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 7))
            assert mine.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("=ii", 1, 7)
            with pytest.raises(OSError, match="setsockopt") as refused:
                sock.setsockopt(250, 1, 1)
            assert refused.value.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)


def test_what_is_no_socket_stays_open():
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="getsockopt") as refused:
        ForeignSocket.adopt(reading)
    assert refused.value.errno == errno.ENOTSOCK
    for fd in (reading, writing):
        os.close(fd)


def test_a_close_that_lingers_is_cut_short():
    foreign.watch_closes()
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while client.send(bytes(1 << 16)):  # what nobody reads is still to be sent
                pass
        client.setblocking(True)
        sock = ForeignSocket.adopt(client.detach())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 30000))
        thread = threading.Thread(target=sock.close, daemon=True)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive(), "it does not linger"
        time.sleep(foreign.CLOSE_SECONDS)
        foreign.end_long_closes()
        thread.join(5)
        assert not thread.is_alive()
        accepted.close()


def test_what_is_a_netns(tmp_path):
    for path in ("/proc/self/ns/net", "/proc/thread-self/ns/net"):
        with open(path, "rb") as file:
            foreign.check_netns(file.fileno())
    (tmp_path / "file").touch()
    for path in ("/proc/self/ns/mnt", "/proc/self/status", tmp_path / "file", "/dev/null"):
        with open(path, "rb") as file, pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            foreign.check_netns(file.fileno())
    with socket.socket() as sock, pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        foreign.check_netns(sock.fileno())
