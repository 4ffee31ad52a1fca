"""Sysctls of a container: sockets follow those that an option carries, the others are refused by name."""

import json
import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from graft.bench.lab import GRAFT, HOST4, wait_for
from graft.rules import sysctl
from tests.conftest import python
from tests.system.test_helper import without_helper

# name: the value that a container is given, and what getsockopt() shows of it
CARRIED = {
    "net.ipv4.tcp_keepalive_time": ("300", 300),
    "net.ipv4.tcp_keepalive_intvl": ("11", 11),
    "net.ipv4.tcp_keepalive_probes": ("4", 4),
    "net.ipv4.tcp_syn_retries": ("2", 2),
    "net.ipv4.tcp_fin_timeout": ("20", 20),
    "net.ipv4.tcp_notsent_lowat": ("16384", 16384),
    "net.ipv4.tcp_thin_linear_timeouts": ("1", 1),
    "net.ipv4.tcp_rto_max_ms": ("5000", 5000),
    "net.ipv4.tcp_rto_min_us": ("100000", 100000),
    "net.ipv4.ip_default_ttl": ("33", 33),
    "net.ipv4.ip_no_pmtu_disc": ("1", 0),
    "net.ipv6.bindv6only": ("1", 1),
}
# On standard input: [[kinds, level, name], ...]. Many sockets of a kind, because the first ones are made by graftd,
# then by graft-sup, then ahead of the call, or 64 at a time for the library of --accel.
SHOW = """
import json, os, socket, sys
asked = json.load(sys.stdin)
found = [set() for _ in asked]
for kind, (family, type) in enumerate(((2, 1), (10, 1), (2, 2), (10, 2))):
    for _ in range(100):
        s = socket.socket(family, type)
        for (kinds, level, name), values in zip(asked, found):
            if kinds >> kind & 1: values.add(s.getsockopt(level, name))
told = [sorted(values) for values in found]
told.append(socket.socket(2, 1, 262).getsockopt(6, 4))
told.append(socket.socket().getsockopt(1, 9))
print(json.dumps(told))
"""
LISTEN = """
import ctypes, socket, sys
for family, sets, backlog in ((2, 0, 100), (10, 4, 3), (2, 0, -1)):
    s = socket.socket(family)
    if sets: s.setsockopt(6, 7, sets)
    s.bind(('', 80 + backlog % 7)); ctypes.CDLL(None).listen(s.fileno(), backlog)
    print(s.getsockopt(6, 7), flush=True)
    globals()[f's{backlog}'] = s
sys.stdin.read()
"""
PORTS = """
import socket, sys
kept = []
for family, any in ((2, '0.0.0.0'), (10, '::')):
    for kind in (1, 2):
        for _ in range(5):
            s = socket.socket(family, kind); s.bind((any, 0)); kept.append(s)
            print(s.getsockname()[1])
for kind in (1, 2):
    for _ in range(5):
        s = socket.socket(2, kind); s.connect((sys.argv[1], int(sys.argv[2]))); kept.append(s)
        print(s.getsockname()[1])
"""


def have(name):
    return Path("/proc/sys", *name.split(".")).exists()


def words(values):
    return [word for name, value in values.items() for word in ("--sysctl", f"{name}={value}")]


@pytest.mark.parametrize("options", [(), ("--accel",)])
def test_sockets_follow(lab, options):
    """Of both families, TCP and UDP, whoever makes them; keepalive itself stays off, and MPTCP becomes such a TCP."""
    carried = {name: CARRIED[name] for name in sysctl.CARRIERS if have(name)}
    assert len(carried) >= 9
    values = {name: value for name, (value, _) in carried.items()}
    asked = json.dumps([sysctl.CARRIERS[name][:3] for name in carried])
    done = lab.graft("run", *options, *words(values), *python(SHOW), input=asked)
    assert json.loads(done.stdout) == [*([shown] for _, shown in carried.values()), 300, 0], done.stderr
    plain = lab.graft("run", *options, *python(SHOW), input=asked)
    for shown, told in zip(carried.values(), json.loads(plain.stdout), strict=False):
        assert shown[1] not in told
    files = [f"/proc/sys/{name.replace('.', '/')}" for name in values]
    assert lab.graft("run", *words(values), "cat", *files).stdout.split() == list(values.values())


def test_congestion_control(lab):
    """One that the host allows a container, as the kernel does with namespaces."""
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    code = "import socket; print({socket.socket().getsockopt(6, 13, 16).rstrip(bytes(1)).decode() for _ in range(99)})"
    for name in allowed:
        done = lab.graft("run", "--sysctl", f"net.ipv4.tcp_congestion_control={name}", *python(code))
        assert done.stdout == f"{ {name} }\n", done.stderr
    wrong = (GRAFT, "run", "--sysctl", "net.ipv4.tcp_congestion_control=nonesuch", "true")
    lab.refused(wrong, 1, f"sysctl net.ipv4.tcp_congestion_control=nonesuch: the host allows a container {' '.join(allowed)}")


def test_a_programs_own_choice_holds(lab):
    code = "import socket; s = socket.socket(); s.setsockopt(6, 4, 99); s.setsockopt(0, 2, 9); print(s.getsockopt(6, 4), s.getsockopt(0, 2))"
    assert lab.graft("run", "--sysctl", "net.ipv4.tcp_keepalive_time=300", "--sysctl", "net.ipv4.ip_default_ttl=33", *python(code)).stdout == "99 9\n"


def test_what_is_accepted_inherits(lab):
    code = """
import socket
s = socket.socket(); s.bind(('', 0)); s.listen()
c = socket.create_connection(('127.0.0.1', s.getsockname()[1])); a = s.accept()[0]
print(a.getsockopt(6, 4), a.getsockopt(0, 2), c.getsockopt(6, 4), c.getsockopt(0, 2))
"""
    values = {"net.ipv4.tcp_keepalive_time": "300", "net.ipv4.ip_default_ttl": "33"}
    assert lab.graft("run", *words(values), *python(code)).stdout == "300 33 300 33\n"


def test_the_backlog_is_bounded(lab):
    """somaxconn bounds listen(); tcp_syn_retries is not what a listener answers by, and a program's own count stays."""
    values = {"net.core.somaxconn": "7", "net.ipv4.tcp_syn_retries": "2", "net.ipv4.tcp_synack_retries": "3"}
    published = ("-p", "8651-8657:80-86")
    running = lab.spawn_graft(*published, *words(values), *python(LISTEN), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert [running.stdout.readline() for _ in range(3)] == ["3\n", "4\n", "3\n"]
    shown = {line.split()[3].rpartition(":")[2]: line.split()[2] for line in lab.host("ss", "-tlnH").stdout.splitlines()}
    assert (shown["8653"], shown["8654"], shown["8657"]) == ("7", "3", "7")
    running.communicate("")
    lone = lab.graft("run", "--sysctl", "net.ipv4.tcp_syn_retries=2", *python(LISTEN), input="")
    host = Path("/proc/sys/net/ipv4/tcp_synack_retries").read_text()
    assert lone.stdout.splitlines(keepends=True) == [host, "4\n", host]


def test_ports_of_a_range(lab):
    """Those that a bind to port 0 gets, and those that a connection or a datagram leaves from."""
    if not supports(sysctl.IP_LOCAL_PORT_RANGE):
        pytest.skip("Linux before 6.3 has no IP_LOCAL_PORT_RANGE")
    server = lab.spawn(*python("import socket,time; s=socket.create_server(('', 8658)); time.sleep(60)"))
    lab.wait_listening(8658)
    wide, narrow = (lab.graft("run", *words(v), *python(PORTS), HOST4, 8658) for v in ({}, {"net.ipv4.ip_local_port_range": "40000 41023"}))
    ports = [int(port) for port in narrow.stdout.split()]
    assert len(ports) == 30, narrow.stderr
    assert all(40000 <= port <= 41023 for port in ports)
    assert any(not 40000 <= int(port) <= 41023 for port in wide.stdout.split())
    lab.end(server)


def supports(name):
    with socket.socket() as s, suppress(OSError):
        s.getsockopt(socket.IPPROTO_IP, name)
        return True
    return False


HOST = "the host's, whose value is"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("net.ipv4.tcp_sack=0", f"it acts on no socket: those are {HOST} 1"),
        ("net/ipv4/tcp_window_scaling=0", f"it acts on no socket: those are {HOST} 1"),
        ("net.ipv6.conf.all.disable_ipv6=1", f"it acts on no socket: those are {HOST} 0"),
        ("net.ipv4.tcp_rmem=4096 8192 16384", "it acts on no socket"),
        ("net.core.somaxconn=1000000", "the host's bound acts as well, which is lower ("),
        ("net.ipv4.tcp_fin_timeout=121", "a container's may be 1 to 120; beyond, the host's value acts (60)"),
        ("net.ipv4.tcp_keepalive_time=x", "a container's may be 1 to 32767"),
        ("net.ipv4.tcp_synack_retries=0", "a container's may be 1 to 127"),
        ("net.ipv4.ip_local_port_range=1024 65000", "a container's may be 1024 ports or more within 32768 and 59234, from 45860 at most"),
        ("net.ipv4.ip_local_port_range=41641 41641", "a container's may be 1024 ports or more within"),
        ("net.ipv4.ip_local_port_range=50000 51100", "a container's may be 1024 ports or more within 32768 and 59234, from 45860 at most"),
        ("net.ipv4.nonesuch=1", "it acts on no socket: those are the host's, which has no such sysctl"),
    ],
)
def test_what_acts_on_nothing_is_refused(lab, text, reason):
    name, _, value = text.replace("/", ".").partition("=")
    done = lab.refused((GRAFT, "run", "--name", "none", "--sysctl", text, "true"), 1, f"graft: sysctl {name}={value}: {reason}")
    assert "(leave it out, or set the host's; graft.sysctl=ignore, or --sysctl ignore, lets it pass)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert lab.containers() == []


@pytest.mark.parametrize("text", ["net.ipv4.tcp_sack", "kernel.shmmax=1", "net.core=1", "net.ipv4..x=1", "net/ipv4/../x=1", "net/ipv4/.././x=1", "net.ipv4.x=", ""])
def test_what_is_no_sysctl_of_a_network(lab, text):
    lab.refused((GRAFT, "run", "--sysctl", text, "true"), 2, f"--sysctl: sysctl '{text}' is not NAME=VALUE (one of net.*")


def test_two_values(lab):
    both = ("--sysctl", "net.ipv4.tcp_fin_timeout=20", "--sysctl", "net.ipv4.tcp_fin_timeout=21")
    lab.refused((GRAFT, "run", *both, "true"), 2, "sysctl net.ipv4.tcp_fin_timeout has two values, 20 and 21 (give one)")


def test_ignored(lab):
    """It is in /proc, and acts on nothing; what does not exist is the kernel's to refuse."""
    read = ("cat", "/proc/sys/net/ipv4/tcp_sack")
    assert lab.graft("run", "--sysctl", "net.ipv4.tcp_sack=0", "--sysctl", "ignore", *read).stdout == "0\n"
    wrong = (GRAFT, "run", "--sysctl", "ignore", "--sysctl", "net.ipv4.nonesuch=1", "true")
    lab.refused(wrong, 1, "--sysctl net.ipv4.nonesuch=1: No such file or directory")


def test_the_hosts_own_value_passes(lab):
    """Also of what no option carries: there is nothing to be done."""
    name = Path("/proc/sys/net/ipv4/tcp_sack").read_text().strip()
    code = "import sys; sys.stdout.write(open('/proc/sys/net/ipv4/tcp_sack').read())"
    assert lab.graft("run", "--sysctl", f"net.ipv4.tcp_sack={name}", *python(code)).stdout == f"{name}\n"
    lab.host("sysctl", "-qw", "net.ipv4.tcp_sack=0", check=True)
    try:
        assert lab.graft("run", "--sysctl", "net.ipv4.tcp_sack=0", *python(code)).stdout == "0\n"
    finally:
        lab.host("sysctl", "-qw", f"net.ipv4.tcp_sack={name}", check=True)


def test_those_that_are_the_containers_own(lab):
    """The bind hook reads ip_unprivileged_port_start, the kernel the others: ping and unix sockets are in the netns."""
    code = "import socket; s = socket.socket(2, 2, 1); socket.socket().bind(('', 80)); print('made')"
    own = {"net.ipv4.ip_unprivileged_port_start": "80", "net.ipv4.ping_group_range": "0 2147483647", "net.unix.max_dgram_qlen": "3"}
    assert set(own) == set(sysctl.OWN)
    assert lab.graft("run", "--user", "nobody", *words(own), *python(code)).stdout == "made\n"
    other = own | {"net.ipv4.ping_group_range": "1 0"}
    assert "PermissionError" in lab.graft("run", "--user", "nobody", *words(other), *python(code)).stderr
    queue = "import socket; a, b = socket.socket(1, 2), socket.socket(1, 2); a.bind(chr(0) + 'a'); b.connect(chr(0) + 'a'); b.setblocking(False)\nfor n in range(99):\n  try: b.send(b'x')\n  except BlockingIOError: break\nprint(n)"
    assert lab.graft("run", *words(own), *python(queue)).stdout == "4\n"  # unix_recvq_full(): more than the bound


TOLD = "import socket, sys\nfor line in sys.stdin: print({socket.socket().getsockopt(6, 4) for _ in range(99)}, flush=True)"


def test_they_are_kept(own_lab):
    """By the next graftd, by the next graft-sup, and shown by inspect; a second command has them, or is refused."""
    lab, text = own_lab, "net.ipv4.tcp_keepalive_time=300"
    running = lab.spawn_graft("--name", "kept", "--sysctl", text, *python(TOLD), stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def told():
        running.stdin.write("\n")
        running.stdin.flush()
        return running.stdout.readline()

    assert told() == "{300}\n"
    before = lab.daemon_pid()
    os.kill(before, signal.SIGKILL)
    assert told() == "{300}\n"
    wait_for(lambda: lab.daemon_pid() not in (0, before) and lab.containers() == ["kept"], "the next graftd")
    helpers = wait_for(lab.helper_pids, "graft-sup")
    os.kill(helpers[0], signal.SIGKILL)
    assert told() == "{300}\n"
    wait_for(lambda: lab.helper_pids() not in ([], helpers), "the next graft-sup")
    assert told() == "{300}\n"
    assert json.loads(lab.graft("inspect", "kept").stdout)["asked"] == {"sysctl": [text]}
    own = ("--sysctl", "net.ipv4.ip_unprivileged_port_start=0")
    for options in ((), ("--sysctl", text), ("--sysctl", text.replace(".", "/")), own, ("--sysctl", "ignore")):
        assert lab.graft("run", "--netns", "kept", *options, *python(TOLD), input="\n").stdout == "{300}\n"
    join = (GRAFT, "run", "--netns", "kept", "--sysctl", "net.ipv4.tcp_keepalive_time=301", "true")
    lab.refused(join, 1, "container 'kept' runs without sysctl net.ipv4.tcp_keepalive_time=301 (one namespace has one policy; omit --sysctl)")
    lab.end(running)


def test_a_wrapper_inside(lab):
    """It is in the container's netns, and has the container's sysctls."""
    lab.add_endpoints({"ep-a": f"type ipv4 addr {HOST4} port 8659"})
    inner = (GRAFT, "-i", "0.0.0.0:80=ep-a", "--")
    done = lab.graft("run", "-i", "0.0.0.0:1=ep-a", "--sysctl", "net.ipv4.tcp_keepalive_time=300", *inner, *python(TOLD), input="\n")
    lab.delete_endpoints(["ep-a"])
    assert done.stdout == "{300}\n", done.stderr


def test_without_graft_sup(own_lab, tmp_path):
    """graftd makes the same sockets."""
    name = "net.ipv4.tcp_notsent_lowat"
    asked = json.dumps([sysctl.CARRIERS[name][:3]])
    done = own_lab.host(without_helper(tmp_path), "run", "--sysctl", f"{name}=4294967294", *python(SHOW), input=asked)
    assert json.loads(done.stdout)[0] == [-2], done.stderr
    assert not own_lab.helper_pids()
