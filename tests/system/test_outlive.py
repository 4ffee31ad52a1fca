"""Sockets that were passed out of a container (SCM_RIGHTS) and outlive it, its graftd and graftd's programs."""

import json
import subprocess

import pytest

from graft.bench.lab import GRAFTD, HOST4, wait_for
from tests.conftest import need, python

GIVE = """
import os, socket, sys
out = socket.socket(socket.AF_UNIX); out.connect(sys.argv[1])
server = socket.socket(); server.bind(('0.0.0.0', 80)); server.listen()
client = socket.create_connection(('10.77.0.1', 8080)); accepted, _ = server.accept()
udp, tcp, six = socket.socket(type=2), socket.socket(), socket.socket(10)
socket.send_fds(out, [b'x'], [s.fileno() for s in (tcp, udp, six, server, accepted, client)])
out.recv(1)
"""
# outside, by a process of the host that has no policy of its own
TAKE = """
import ctypes, errno, json, os, socket, struct, sys
NAMES = ('tcp', 'udp', 'six', 'server', 'accepted', 'client')
own = socket.socket(socket.AF_UNIX); own.bind(sys.argv[1]); own.listen()
print('up', flush=True)
peer, _ = own.accept()
_, fds, _, _ = socket.recv_fds(peer, 1, 16)
held = dict(zip(NAMES, (socket.socket(fileno=fd) for fd in fds)))
peer.send(b'x'); peer.close()
libc = ctypes.CDLL(None, use_errno=True)
def disconnect(sock):
    if libc.connect(sock.fileno(), struct.pack('H14x', 0), 16): raise OSError(ctypes.get_errno(), '')
def attempt(call):
    try: call(); return 'OK'
    except OSError as error: return errno.errorcode[error.errno]
def reuse(sock, port):
    attempt(lambda: disconnect(sock))
    host = '::' if sock.family == 10 else '0.0.0.0'
    told = [attempt(lambda: sock.bind((host, port)))]
    if sock.type & 1:
        told.append(attempt(lambda: sock.listen()) if told[0] == 'OK' else told[0])
        told.append(attempt(lambda: sock.connect(('10.77.0.2', 1) if sock.family == 2 else ('2001:db8:77::2', 1))))
    else:
        told.append(attempt(lambda: sock.sendto(b'x', ('10.77.0.2', 1))))
        told.append(attempt(lambda: sock.connect(('10.77.0.2', 1))))
    told.append(attempt(lambda: sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 1)))
    return told
print('held', flush=True)
for line in sys.stdin:
    if line.strip() == 'close':
        for sock in held.values(): sock.close()
        print('closed', flush=True)
        continue
    print(json.dumps({name: reuse(sock, 7000 + n) for n, (name, sock) in enumerate(held.items())}), flush=True)
"""
REFUSED = {"EPERM", "EADDRNOTAVAIL", "ENETUNREACH", "EINVAL"}  # EINVAL: what is bound may not be bound again


def programs(*where):
    """The ids of programs: of all, or of those attached to a cgroup."""
    command = ("bpftool", "-j", *(("cgroup", "show", *where) if where else ("prog", "list")))
    return {p["id"] for p in json.loads(subprocess.run(command, capture_output=True, check=True).stdout)}


@pytest.fixture
def outside(own_lab):
    """A process of the host that holds a container's sockets, when the container has ended."""
    path = own_lab.work / "out"
    taker = own_lab.spawn(*python(TAKE), path, stdin=-1, stdout=-1)
    assert taker.stdout.readline() == "up\n"
    giver = own_lab.spawn_graft("-p", "8080:80", *python(GIVE), path)
    assert taker.stdout.readline() == "held\n"
    assert giver.wait(10) == 0
    wait_for(lambda: not own_lab.containers(), "the container's end")

    def say(word):
        taker.stdin.write(word + "\n")
        taker.stdin.flush()
        return taker.stdout.readline()

    return say


def refused(told):
    for name, words in json.loads(told).items():
        assert set(words) <= REFUSED, f"{name}: {words}"


def gone(lab):
    return not lab.pins().exists() and not lab.cgroup().exists() and not (lab.run_dir / "graftd.sock").exists()


def test_graftd_ends(own_lab, outside):
    """Nothing of graft's is to be seen on the host, and yet the policy holds as long as one of the sockets lives."""
    need("bpftool")
    first = programs(own_lab.cgroup())
    own_lab.host(GRAFTD, "--stop", check=True)
    wait_for(lambda: gone(own_lab), "graftd's end")
    assert first <= programs()
    refused(outside("reuse"))
    own_lab.graft("run", "true", check=True)  # another graftd, with programs of its own
    refused(outside("reuse"))
    own_lab.host(GRAFTD, "--stop", check=True)
    wait_for(lambda: gone(own_lab), "the second graftd's end")
    refused(outside("reuse"))
    assert outside("close") == "closed\n"
    wait_for(lambda: not first & programs(), "the kernel to free the programs")


def test_graftd_ends_while_containers_run(own_lab, outside):
    """Another cgroup of graftd's: the programs of the one before stay with its sockets."""
    runs = own_lab.spawn_graft("--name", "web", "-p", "8081:80", "sleep", "60")
    wait_for(lambda: own_lab.containers() == ["web"], "the container")
    own_lab.host(GRAFTD, "--stop", "--force", check=True)
    wait_for(lambda: not (own_lab.run_dir / "graftd.sock").exists(), "graftd's end")
    wait_for(lambda: not (own_lab.cgroup() / "cgroup.procs").read_text(), "its helpers' end")
    own_lab.cgroup().rmdir()  # as a service manager does
    refused(outside("reuse"))
    own_lab.graft("run", "true", check=True)
    refused(outside("reuse"))
    own_lab.end(runs)
    assert own_lab.host("ss", "-tlnH", "sport = :7000").stdout == "", HOST4
