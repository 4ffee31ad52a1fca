"""bind() of a direct container: graft-sup prepares the socket (csrc/sup_bind.c), and graftd where it may need another."""

import itertools
import json
import os
import re
import signal
import socket
import struct
from pathlib import Path

import pytest

from graft.bench.lab import wait_for
from graft.kernel.linux import IPV6_FREEBIND
from graft.kernel.programs import Kernel
from graft.kernel.stamps import PREPARED, Stamper
from graft.trap import target
from graft.trap.sockets import IP_BIND_ADDRESS_NO_PORT
from tests.conftest import lack, python, quick_calls

KINDS = """
import socket, sys, threading
print('ready', flush=True)
sys.stdin.readline()
def binds():
  for family, address in ((2, '0.0.0.0'), (2, '127.0.0.1'), (10, '::'), (10, '::1')):
    for kind in (1, 2):
        for port in (0, 7000):
            with socket.socket(family, kind) as s:
                s.bind((address, port))
                assert s.getsockname()[:2] == (address, port or s.getsockname()[1])
                try: s.bind((address, 7001))
                except OSError as e: assert e.errno == 22, e
  with socket.socket(1) as s: s.bind('\\0name')
  for bad in (lambda s: s.bind(('192.0.2.1', 7000)), lambda s: (s.detach(), s.bind(('127.0.0.1', 7000)))):
    try: bad(socket.socket())
    except OSError as e: print(e.errno)
  print('bound', flush=True)
binds()
thread = threading.Thread(target=binds); thread.start(); thread.join()
"""
PORTS = "import socket; held = [socket.socket(f, 2) for f in (2, 10) for n in range(200)]\nfor s in held: s.bind(('', 0)); print(s.getsockname()[1])"
IP_LOCAL_PORT_RANGE, IP_FREEBIND = 51, 15
# Two threads bind one socket and a third listens, from one moment on; what listens is connected to.
AT_ONCE = """
import json, socket, sys, threading
ROUNDS = 400
barrier, now, seen = threading.Barrier(4), None, set()
def turns(act):
    for n in range(ROUNDS):
        barrier.wait()
        try: act(now); result = 'OK'
        except OSError as e: result = e.errno
        seen.add((act.__name__, result))
        barrier.wait()
def first(s): s.bind(('', 8000))
def second(s): s.bind(('', 8000))
def listens(s): s.listen()
threads = [threading.Thread(target=turns, args=(act,)) for act in (first, second, listens)]
for thread in threads: thread.start()
for n in range(ROUNDS):
    now = socket.socket(*((2, 1) if n % 2 else (10, 1)))
    barrier.wait(); barrier.wait()
    if now.getsockopt(1, 30):
        try: socket.create_connection(('127.0.0.1', now.getsockname()[1]), 5).close()
        except ConnectionRefusedError: pass
    print('asked', flush=True); sys.stdin.readline()
    now.close()
print(json.dumps(sorted(seen, key=str)), flush=True)
"""


@pytest.mark.core
def test_graft_sup_prepares_it(own_lab):
    """Whatever it is, in any thread, and while graftd does nothing."""
    lab = own_lab
    process = lab.spawn_graft("--direct", *python(KINDS), stdin=-1, stdout=-1)
    assert process.stdout.readline() == "ready\n"
    before, graftd = quick_calls(lab), lab.daemon_pid()
    os.kill(graftd, signal.SIGSTOP)
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        said = [process.stdout.readline() for _ in range(6)]
    finally:
        os.kill(graftd, signal.SIGCONT)
    assert said == 2 * ["99\n", "9\n", "bound\n"]
    assert quick_calls(lab) >= before + 2 * (2 * 16 + 4)
    assert process.wait(20) == 0


def test_a_preparation_that_was_cut_off(lab):
    """Whoever marks a socket may be killed before it has set all, or before it takes the mark away."""
    code = "import socket, sys; s = socket.socket({}); print(s.fileno(), flush=True); sys.stdin.readline(); s.bind(('', 80)); print(s.getsockname()[1], flush=True); sys.stdin.readline()"
    keeps = lab.spawn_graft("--direct", *python("print('ready', flush=True); import time; time.sleep(60)"), stdout=-1)
    assert keeps.stdout.readline() == "ready\n"  # graftd has its maps
    kernel = Kernel(lab.pins())
    kernel._open_pinned()
    preparing = kernel.maps["prepared"]
    for kind, prepared in itertools.product(("2, 1", "10, 1", "2, 2", "10, 2"), (False, True)):
        process = lab.spawn_graft("--name", "bound", "--direct", *python(code.format(kind)), stdin=-1, stdout=-1)
        number = int(process.stdout.readline())
        pid = json.loads(lab.graft("inspect", "bound", check=True).stdout)["pid"]
        with socket.socket(fileno=target.borrow_fd(pid, number)) as sock:
            preparing.update(struct.pack("=i", sock.fileno()), os.getpid().to_bytes(4, "little"))
            if prepared:
                if sock.type == socket.SOCK_STREAM:
                    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                if sock.family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
                helper = Path("/proc", str(max(lab.helper_pids())), "status").read_text()
                os.fchown(sock.fileno(), int(re.findall(r"Uid:\t(\d+)", helper)[0]), -1)
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "80\n"
            assert preparing.get(struct.pack("=i", sock.fileno())) == PREPARED
        lab.end(process)
        wait_for(lambda: "bound" not in lab.graft("ps").stdout, "its end")
    lab.end(keeps)


def test_the_hosts_programs_keep_ports(lab):
    """graft-sup lives in the container's netns, and has the host's ports from graftd."""
    with socket.socket() as sock:
        try:
            sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", 0, 0))
        except OSError:
            lack("Linux before 6.3 has no IP_LOCAL_PORT_RANGE")
    low, high = map(int, lab.host("cat", "/proc/sys/net/ipv4/ip_local_port_range").stdout.split())
    ports = list(map(int, lab.graft("run", "--direct", *python(PORTS), check=True).stdout.split()))
    assert len(ports) == 400
    assert low <= min(ports) <= max(ports) <= low + (high - low) // 2


def test_an_endpoint_that_needs_another_socket_is_graftds(lab):
    path = lab.work / "served.sock"
    lab.graft("endpoint", "add", "served", "type", "unix", "path", str(path), check=True)
    code = "import socket; s = socket.create_server(('0.0.0.0', 80)); print('ready', flush=True); s.accept()[0].sendall(b'hello')"
    server = lab.spawn_graft("--direct", "-i", "0.0.0.0:80=served", *python(code), stdout=-1)
    assert server.stdout.readline() == "ready\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert client.recv(9) == b"hello"
    lab.end(server)
    lab.graft("endpoint", "del", "served", check=True)


@pytest.mark.parametrize("published", [False, True], ids=["private", "published"])
def test_threads_that_bind_and_listen_at_once(lab, published):
    """What listens is at the container's own port, never at one that the kernel has chosen on the host.

    If a bind comes while listen() is decided, the listener may be out of reach of everybody: at a device that is none.
    """
    options = ("-p", "8001:8000") if published else ()
    process = lab.spawn_graft("--direct", *options, *python(AT_ONCE), stdin=-1, stdout=-1)
    shown = set()
    while (line := process.stdout.readline()) == "asked\n":
        shown |= {row.split()[3] for row in lab.host("ss", "-tlnH").stdout.splitlines()}
        process.stdin.write("\n")
        process.stdin.flush()
    process.wait(20)
    addresses = {where.rsplit(":", 1)[0] for where in shown}
    assert bool(addresses & {"*", "0.0.0.0", "[::]"}) == published, shown
    outcomes = {(what, result) for what, result in json.loads(line)}
    assert {("first", "OK"), ("second", "OK"), ("listens", "OK")} <= outcomes


def test_nobody_else_sets_its_makers_options(lab):
    """While they are set for a bind, the program's other threads have the same socket."""
    code = """
import errno, socket, struct, sys
for kind in ((2, 1), (10, 1), (2, 2), (10, 2)):
    s = socket.socket(*kind); print(s.fileno(), flush=True); sys.stdin.readline(); told = []
    for level, name, value in ((0, 51, struct.pack('=HH', 40000, 40000)), (0, 15, 1), (41, 78, 1)):
        if level == 41 and kind[0] == 2: continue
        try: s.setsockopt(level, name, value); told.append('OK')
        except OSError as e: told.append(errno.errorcode[e.errno])
    print(*told, flush=True)
"""
    process = lab.spawn_graft("--name", "races", "--direct", *python(code), stdin=-1, stdout=-1)
    kernel = None
    for family in (2, 10, 2, 10):
        number = int(process.stdout.readline())
        if not kernel:  # graftd has its maps by now
            kernel = Kernel(lab.pins())
            kernel._open_pinned()
        pid = json.loads(lab.graft("inspect", "races", check=True).stdout)["pid"]
        with socket.socket(fileno=target.borrow_fd(pid, number)) as sock:
            assert Stamper(kernel.maps["stamps"]).begin(sock)
            kernel.maps["prepared"].update(struct.pack("=i", sock.fileno()), os.getpid().to_bytes(4, "little"))
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline().split() == ["EPERM"] * (2 if family == 2 else 3)
            sock.setsockopt(socket.IPPROTO_IP, IP_FREEBIND, 1)  # its maker does
    assert process.wait(20) == 0
