"""One container takes all that it gets of a resource; a program of the host and another container do not feel it.

Each taker of programs/exhaustion.py takes one resource. Beside it two bystanders make calls, which are counted: none
fails, and none takes twice as long as before.
"""

import contextlib
import json
import shutil
import socket
from pathlib import Path

import pytest

from graft.bench.lab import CLIENT4, HOST4, SLOWNESS, laboratory
from tests.attack.programs import exhaustion
from tests.conftest import need_root, python

PROGRAMS = Path(__file__).parent / "programs"
LOW, HIGH = 42000, 43499  # a host with few ephemeral ports: 1500
SLACK = 0.004 * SLOWNESS  # of a median: this machine has other work
# why a taker ends, and after how many at the most
ENDS = {
    "private_tcp_ports": ("OK", exhaustion.ENOUGH),
    "private_tcp_ports_6": ("OK", exhaustion.ENOUGH),
    "private_udp_ports": ("ENFILE", 4096),
    "udp_ports_of_the_host": ("EADDRINUSE", 200),
    "udp_ports_by_sending": ("ENFILE", 400),
    "udp_ports_by_connecting": ("EADDRNOTAVAIL", 200),
    "accepted_sockets_that_listen": ("EADDRNOTAVAIL", 0),
    "connections": ("EADDRNOTAVAIL", HIGH - LOW),
    "time_waits": ("EADDRNOTAVAIL", HIGH - LOW),
    "connections_to_itself": ("OK", exhaustion.ENOUGH),
    "dynamic_endpoints": ("EADDRINUSE", 100),
    "sockets": ("OK", exhaustion.ENOUGH),
    "slots_and_threads": ("OK", 0),
    "log_and_reports": ("OK", 0),
}
# A direct container's own TCP sockets take ports from all that the host has: only a program that makes a socket, or
# graftd at its bind, sets IP_LOCAL_PORT_RANGE, and neither sees these (docs/security.md, "Limits").
OPEN_IN_DIRECT = ("connections", "time_waits")
# what a container may have of so few ports, as 4096 are of 14116
LIMITS = {
    "udp_ports_of_the_host": "ports=200",
    "udp_ports_by_sending": "udp=400",
    "udp_ports_by_connecting": "ports=200",
    "dynamic_endpoints": "ports=100",
}
SERVE = f"""
import resource, socket, threading
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
def accept(port):
    s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(("", port)); s.listen(4096); kept = []
    while True:
        kept.append(s.accept()[0])
        if port != {exhaustion.ACCEPTS}: kept.pop().close()
for port in range({exhaustion.ACCEPTS}, {exhaustion.UNASKED + 2}):
    threading.Thread(target=accept, args=(port,), daemon=True).start()
u = socket.socket(2, 2); u.bind(("", {exhaustion.ECHO})); print("up", flush=True)
while True:
    data, peer = u.recvfrom(9); u.sendto(data, peer)
"""

pytestmark = pytest.mark.alone


class Started:
    """A program that is up. A bystander's calls are counted."""

    def __init__(self, process):
        self.process = process
        assert process.stdout.readline() == "up\n"

    def told(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@contextlib.contextmanager
def made():
    """A laboratory, and the bystanders in it. What a taker leaves in TIME_WAIT stays there for a minute."""
    need_root()
    with laboratory("exhaust") as lab:
        lab.host("sysctl", "-q", f"net.ipv4.ip_local_port_range={LOW} {HIGH}", check=True)
        shutil.copytree(PROGRAMS, lab.work / "programs", ignore=shutil.ignore_patterns("__pycache__"))
        Started(lab.spawn(*python(SERVE), client=True, stdout=-1))
        lab.add_endpoints({"ep-any": f"type ipv4 addr {HOST4} port dynamic"})
        host = lab.spawn(*program(lab, "host"), stdin=-1, stdout=-1)
        other = lab.spawn_graft("--name", "bystander", *program(lab, "container"), stdin=-1, stdout=-1)
        yield lab, Started(host), Started(other)
        lab.delete_endpoints(["ep-any"])


@pytest.fixture(scope="module")
def world():
    with made() as one:
        yield one


@pytest.fixture(scope="module")
def another_world():
    with made() as one:
        yield one


def program(lab, what):
    code = f"import sys; sys.path.insert(0, {str(lab.work)!r})\nfrom programs.exhaustion import main; main()"
    return (*python(code), what, HOST4, CLIENT4)


def options(what):
    """Of the taker's container: with the host's egress where it has to send, else with none."""
    given = ["--egress", "host" if "host" in what or "by_" in what or what in ("connections", "time_waits") else "none"]
    if what == "dynamic_endpoints":
        given += ["-i", "0.0.0.0:1-65535=ep-any"]
    return [*given, "--limit", LIMITS[what]] if what in LIMITS else given


@pytest.mark.parametrize("what", ENDS)
def test_nobody_else_feels_it(world, what):
    take(world, what)


@pytest.mark.parametrize("what", [what for what in ENDS if what not in OPEN_IN_DIRECT])
def test_nobody_else_feels_a_direct_one(another_world, what):
    take(another_world, what, "--direct")


def take(world, what, *mode):
    """Let a container take it whole, and look at the bystanders."""
    lab, *bystanders = world
    before = [one.told() for one in bystanders]
    words = ("--name", what, *mode, *options(what), *program(lab, what))
    taker = lab.spawn_graft(*words, stdin=-1, stdout=-1)
    count, why = taker.stdout.readline().split()
    reason, most = ENDS[what]
    assert why == reason
    assert int(count) <= most
    try:
        for one, earlier in zip(bystanders, before, strict=True):
            now = one.told()
            assert not earlier["failed"]
            assert not now["failed"], now["failed"][:3]
            for name, seconds in now["times"].items():
                assert seconds <= 2 * earlier["times"][name] + SLACK, name
    finally:
        taker.stdin.close()
        lab.end(taker)


PORTS = """
import resource, socket, sys
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for kind in (1, 2):
    kept = []
    while len(kept) < 1500:
        kept.append(socket.socket(2, kind))
        try: kept[-1].connect((%r, %d))
        except OSError as error: kept.pop().close(); break
    print(len(kept), min(s.getsockname()[1] for s in kept), max(s.getsockname()[1] for s in kept))
"""


@pytest.mark.parametrize("accel", [(), ("--accel",)], ids=["trap", "accel"])
def test_the_host_has_ports_of_its_own(world, accel):
    """The kernel chooses for containers out of 15/16 of the ephemeral ports for TCP, out of half of them for UDP.

    The program takes all that there are, to a server of its own: an end that is too high by one would be seen.
    """
    lab = world[0]
    with socket.socket() as probe:
        try:
            probe.setsockopt(socket.IPPROTO_IP, 51, bytes(4))  # IP_LOCAL_PORT_RANGE
        except OSError:
            pytest.skip("Linux before 6.3")
    server = exhaustion.UNASKED + bool(accel)
    told = lab.graft("run", "--limit", "ports=1500", *accel, *python(PORTS % (CLIENT4, server)))
    tcp, udp = ([int(word) for word in line.split()] for line in told.stdout.splitlines())
    ends = LOW + (HIGH - LOW) * 15 // 16, LOW + (HIGH - LOW) // 2
    assert (tcp[1:], udp[1:]) == ([LOW, ends[0]], [LOW, ends[1]]), told.stderr
    # other sockets of the host have a few
    assert tcp[0] > 0.95 * (ends[0] - LOW)
    assert udp[0] > 0.95 * (ends[1] - LOW)
