"""Ports that ask for a capability, and ports that are the node's."""

import json
import os
import signal

import pytest

from graft.bench.lab import GRAFT, GRAFTD, wait_for
from tests.conftest import need, python

BIND = """
import errno, socket, sys
for where in sys.argv[1:]:
    kind, host, port = where.split('_')
    s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, {'tcp': 1, 'udp': 2}[kind])
    try: s.bind((host, int(port))); print('bound')
    except OSError as error: print(errno.errorcode[error.errno])
"""
TAKEN_ALONG = """
import ctypes, errno, socket
made = [(socket.socket(), '0.0.0.0', 80), (socket.socket(socket.AF_INET, 2), '127.0.0.1', 80), (socket.socket(), '', 1024)]
assert ctypes.CDLL(None).unshare(0x50000000) == 0  # CLONE_NEWUSER | CLONE_NEWNET
for s, *where in made:
    try: s.bind(tuple(where)); print('bound')
    except OSError as error: print(errno.errorcode[error.errno])
"""
PLACES = (("--ip", "10.88.0.5"), ())


def told(lab, *words, **options):
    done = lab.host(*words, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("options", PLACES)
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_low_port_asks_for_the_capability(lab, options, kind):
    """As the kernel asks on any host: of the wildcard, the loopback and the own address, but not of what is published."""
    hosts = ("0.0.0.0", "127.0.0.1", "::", "::1", *options[1:])
    where = [f"{kind}_{host}_{port}" for host in hosts for port in (80, 1023, 1024)]
    assert told(lab, GRAFT, "run", *options, *python(BIND), *where) == ["bound"] * len(where)
    user = ("run", *options, "--user", "nobody")
    assert told(lab, GRAFT, *user, *python(BIND), *where) == ["EACCES", "EACCES", "bound"] * len(hosts)
    published = ("-p", f"8641:80/{kind}")
    assert told(lab, GRAFT, *user, *published, *python(BIND), f"{kind}_0.0.0.0_80", f"{kind}_0.0.0.0_81") == ["bound", "EACCES"]


def test_what_the_kernel_would_say_first(lab):
    """An address that is not the container's is no matter of capabilities."""
    assert told(lab, GRAFT, "run", "--user", "nobody", *python(BIND), "tcp_10.9.9.9_80") == ["EADDRNOTAVAIL"]


@pytest.mark.parametrize("start", [0, 80, 2000])
def test_the_containers_own_sysctl_counts(lab, start):
    """Docker sets net.ipv4.ip_unprivileged_port_start of its containers to 0, Kubernetes leaves it."""
    sysctl = f"net.ipv4.ip_unprivileged_port_start={start}"
    where = [f"tcp_{host}_{port}" for host in ("0.0.0.0", "127.0.0.1") for port in (79, 80, 1999, 2000)]
    expected = ["EACCES" if port < start else "bound" for port in (79, 80, 1999, 2000)] * 2
    command = ("setpriv", "--reuid", "65534", "--bounding-set", "-all", "--clear-groups", *python(BIND), *where)
    assert told(lab, GRAFT, "run", "--sysctl", sysctl, "--ip", "10.88.0.5", *command) == expected


@pytest.mark.parametrize("options", PLACES)
def test_capabilities_of_another_user_namespace(lab, options):
    """Whoever makes a user namespace has every capability in it, and none over the container's network."""
    need("unshare", "setpriv")
    where = ("tcp_0.0.0.0_80", "udp_127.0.0.1_80", "tcp_0.0.0.0_1024")
    plain = ("setpriv", "--reuid", "65534", "--clear-groups")
    assert told(lab, GRAFT, "run", *options, *plain, "unshare", "-Ur", *python(BIND), *where) == ["EACCES", "EACCES", "bound"]
    assert told(lab, GRAFT, "run", *options, *plain, *python(TAKEN_ALONG)) == ["EACCES", "EACCES", "bound"]
    bounded = ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service")
    assert told(lab, GRAFT, "run", *options, *bounded, *python(BIND), *where) == ["EACCES", "EACCES", "bound"]
    assert told(lab, GRAFT, "run", *options, "setpriv", "--reuid", "65534", "--clear-groups", "--inh-caps",
                "+net_bind_service", "--ambient-caps", "+net_bind_service", *python(BIND), *where) == ["bound"] * 3  # fmt: skip


SERVE = "import socket, sys, time; s = socket.socket(socket.AF_INET, 2); s.bind(('', int(sys.argv[1]))); print(flush=True); time.sleep(99)"


def test_ports_of_the_node(own_lab):
    """What is listed, and what has the wildcard when graftd begins, is no container's at its own address."""
    own_lab.config.write_text('reserved_ports = ["8650-8651"]\n')
    server = own_lab.spawn(*python(SERVE), "8652", stdout=-1)
    server.stdout.readline()
    run = (GRAFT, "run", "--ip", "10.88.0.5", *python(BIND))
    where = [f"udp_{host}_{port}" for host in ("0.0.0.0", "10.88.0.5") for port in (8649, 8650, 8651, 8652, 8653)]
    expected = ["bound", "EADDRINUSE", "EADDRINUSE", "EADDRINUSE", "bound"] * 2
    assert told(own_lab, *run, *where) == expected
    own_lab.end(server)  # it is being restarted
    assert told(own_lab, *run, *where) == expected
    assert told(own_lab, *run, "udp_127.0.0.1_8650", "tcp_127.0.0.1_8650", "udp_0.0.0.0_0") == ["bound"] * 3
    assert told(own_lab, GRAFT, "run", *python(BIND), "udp_0.0.0.0_8650") == ["bound"]  # of its loopback alone
    assert told(own_lab, GRAFT, "run", "-p", "8650:8650/udp", *python(BIND), "udp_0.0.0.0_8650") == ["bound"]  # root's word
    shown = {f["name"]: f["found"] for f in json.loads(own_lab.graft("doctor", "-j").stdout)}
    assert "reserved ports: 8650-8651, and what listens when graftd begins" in shown["in force"]
    own_lab.config.write_text("reserved_ports = []\nreserve_listening = false\n")
    own_lab.host(GRAFTD, "--replace", check=True)
    assert told(own_lab, *run, *where) == ["bound"] * 10


def test_a_containers_port_is_not_the_nodes(own_lab):
    """What a container has published on the wildcard is not reserved by the next graftd."""
    server = own_lab.spawn_graft("--name", "web", "--ip", "10.88.0.7", "-p", "8655:8655/udp", *python(SERVE), "8655", stdout=-1)
    server.stdout.readline()
    before = own_lab.daemon_pid()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: own_lab.daemon_pid() not in (0, before) and own_lab.containers() == ["web"], "the next graftd")
    assert told(own_lab, GRAFT, "run", "--ip", "10.88.0.6", *python(BIND), "udp_0.0.0.0_8655") == ["bound"]
    own_lab.end(server)
