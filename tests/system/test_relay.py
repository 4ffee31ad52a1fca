"""graft-relay by itself, with a channel of the test's own: what it takes, tells and may not do."""

import contextlib
import signal
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from graft.bench.lab import ROOT, wait_for
from graft.daemon.relay import END, PAIR, PROGRAM, QUESTION, REPORT
from graft.process.title import RELAY
from tests.conftest import need, need_root

UID = 0x70000FFF
FEW = 600  # descriptors (csrc/relay_cage.c)


class Channel:
    """graftd's end of the channel of one graft-relay, in this process's cgroup."""

    def __init__(self):
        (own,) = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
        root = Path("/sys/fs/cgroup/unified")
        cgroup = (root if root.is_dir() else Path("/sys/fs/cgroup")) / own[4:]
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(10)
        with theirs:
            command = (RELAY, "test", str(UID), str(cgroup))
            self.process = subprocess.Popen(command, executable=PROGRAM, stdin=theirs.fileno())

    def pair(self):
        """Give it a pair; returns the far ends of both connections."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            clients = [socket.create_connection(server.getsockname()) for _ in range(2)]
            given = [server.accept()[0] for _ in range(2)]
        for client in clients:
            client.settimeout(10)
        socket.send_fds(self.sock, [PAIR], [sock.fileno() for sock in given])
        for sock in given:
            sock.close()
        return clients

    def told(self):
        return REPORT.unpack(self.sock.recv(100))


@pytest.fixture
def channel():
    need_root()
    made = Channel()
    yield made
    made.process.kill()
    made.process.wait(10)
    made.sock.close()


def passes(pair):
    one, another = pair
    one.sendall(b"there")
    assert another.recv(5) == b"there"
    another.sendall(b"back")
    return one.recv(4) == b"back"


def test_it_tells_what_it_has(channel):
    channel.sock.send(QUESTION)
    assert channel.told() == (0, 0, 1)
    first, second = channel.pair(), channel.pair()
    assert passes(first)
    assert passes(second)
    for sock in first:
        sock.shutdown(socket.SHUT_WR)
    assert channel.told() == (2, 1, 1)
    channel.sock.send(QUESTION)
    assert channel.told() == (2, 1, 2)
    channel.sock.send(END)
    assert channel.process.wait(10) == 0
    assert second[0].recv(1) == b""


def test_a_pair_too_many(channel):
    """Where it has no descriptor left, the pair that comes ends, and the others go on."""
    room = (FEW - 4) // 2  # but for the channel, /dev/null twice, and epoll
    pairs = [channel.pair() for _ in range(room)]
    assert passes(pairs[-1])
    late = channel.pair()
    assert channel.told() == (room + 1, 1, 0)
    for sock in late:
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert passes(pairs[0])
    for sock in (sock for pair in pairs for sock in pair):
        sock.close()


def test_no_graftd_is_left(channel):
    """It goes on with what it has, for a minute (alarm(2)), and ends with the last pair."""
    pair = channel.pair()
    assert passes(pair)
    channel.sock.shutdown(socket.SHUT_RDWR)
    wait_for(lambda: not wakes_for(channel.process.pid, 0), "that it leaves the channel")
    assert passes(pair)
    assert channel.process.poll() is None
    for sock in pair:
        sock.shutdown(socket.SHUT_WR)
    assert channel.process.wait(10) == 0


def wakes_for(pid, fd):
    """Does a process's epoll watch this descriptor of its own?"""
    infos = [info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir()]
    return any(line.split()[:2] == ["tfd:", str(fd)] for info in infos for line in info.splitlines())


def test_a_reset_passes_after_what_came_before_it(channel):
    one, another = channel.pair()
    one.sendall(b"x" * 100000)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
    wait_for(lambda: len(another.recv(1 << 20, socket.MSG_PEEK)) == 100000, "all")
    one.close()
    wait_for(lambda: another.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR), "the reset")
    assert channel.told() == (1, 1, 0)


@pytest.mark.parametrize(
    ("call", "status"),
    [
        *((call, 0) for call in ("linger", "send")),
        *((call, -signal.SIGSYS) for call in ("mark", "level", "sendto", "high", "socket", "connect")),
    ],
)
def test_what_its_filter_lets_through(tmp_path_factory, call, status):
    need("gcc")
    program = tmp_path_factory.getbasetemp() / "relay_calls"
    if not program.exists():
        sources = (ROOT / "tests/programs/relay_calls.c", ROOT / "csrc/relay_cage.c")
        command = ("gcc", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *sources, "-static", "-o", program)
        subprocess.run(command, check=True, timeout=60)
    assert subprocess.run((program, call), timeout=10).returncode == status
