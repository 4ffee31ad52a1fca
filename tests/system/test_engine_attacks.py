"""Hostile containers on engines' networks, and what engines leave behind."""

import json
import os
import subprocess
import time

import pytest

from graft.bench.lab import CLIENT4, HOST4, wait_for
from tests.conftest import python
from tests.messages import query
from tests.system.cri import cni
from tests.system.engines import UNHOOKED, engine_version

pytestmark = pytest.mark.usefixtures("no_container_is_left")

SPOOF = """
import socket, struct, sys
peer, source = sys.argv[1:]
info = [(socket.IPPROTO_IP, 8, struct.pack('=i4s4s', 0, socket.inet_aton(source), bytes(4)))]  # IP_PKTINFO
for how in ('plain', 'bound', 'connected', 'both'):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if how in ('bound', 'both'): s.bind(('', 5353 + len(how)))
    if how in ('connected', 'both'): s.connect((peer, 53))
    to = [] if how in ('connected', 'both') else [(peer, 53)]
    s.sendmsg([how.encode()], info, 0, *to)
"""
HEAR = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 53)); s.settimeout(20); print('ready', '-', flush=True)
for _ in range(4):
    data, peer = s.recvfrom(99); print(data.decode(), peer[0], flush=True)
"""


def test_a_neighbours_address_is_no_source(docker, host, gnet):
    docker.run("-d", "--name", "victim", "--network", gnet, "--ip", "10.79.0.31", argv=("/busybox", "sleep", "60"))
    docker.run("-d", "--name", "ear", "--network", gnet, "--ip", "10.79.0.30", argv=python(HEAR))
    wait_for(lambda: docker("logs", "ear").stdout, "the ear")
    docker.run("--rm", "--network", gnet, "--ip", "10.79.0.32", argv=(*python(SPOOF), "10.79.0.30", "10.79.0.31"))
    heard = dict(line.split() for line in docker("logs", "ear").stdout.splitlines())
    assert heard == dict.fromkeys(("plain", "bound", "connected", "both"), "10.79.0.32") | {"ready": "-"}


BORROWER = """
import errno, socket, sys
victim, neighbour = sys.argv[1:]
for port in (0, 5353):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', port))
    try: s.connect((victim, 9)); s.send(b'x')
    except OSError: pass
    for where in (neighbour, '10.79.0.1', '10.77.0.1', '10.77.0.2'):
        for go in (lambda: s.connect((where, 53)) or s.send(b'connected'), lambda: s.sendto(b'sent', (where, 53))):
            try: go()
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.ENETUNREACH): print(where, error)
print(s.getsockname()[0])
"""


def test_a_neighbours_address_is_not_borrowed(docker, host, gnet):
    """The kernel gives a bound socket that connects to a neighbour the neighbour's address: it is good for nobody else."""
    docker.run("-d", "--name", "victim", "--network", gnet, "--ip", "10.79.0.31", argv=("/busybox", "sleep", "60"))
    docker.run("-d", "--name", "ear", "--network", gnet, "--ip", "10.79.0.30", argv=python(HEAR))
    wait_for(lambda: docker("logs", "ear").stdout, "the ear")
    beyond = host.spawn(*python(HEAR), client=True, stdout=subprocess.PIPE)
    wait_for(lambda: host.client("ss", "-ulnH", "sport = :53").stdout, "the ear beyond")
    thief = docker.run("--rm", "--network", gnet, "--ip", "10.79.0.32", argv=(*python(BORROWER), "10.79.0.31", "10.79.0.30"))
    docker.run("--rm", "--network", gnet, "--ip", "10.79.0.33", argv=(*python(SPOOF), "10.79.0.30", "10.79.0.31"))
    heard = wait_for(lambda: docker("logs", "ear").stdout.count("\n") >= 5 and docker("logs", "ear").stdout, "its word")
    host.end(beyond)
    assert "10.79.0.31" not in heard + beyond.stdout.read(), thief.stdout


SLEEPER = """
import os, socket, time
s = socket.socket(); s.bind(('', 80))
t = socket.socket(); t.bind(('', 81)); t.listen()
print('bound', flush=True)
while not os.path.exists('/tmp/go'): time.sleep(.02)
s.listen(); print('listening', flush=True)
while True: s.accept()[0].sendall(b'A')
"""
VICTIM = """
import socket
s = socket.socket(); s.bind(('', 80)); s.listen(64)
t = socket.socket(); t.bind(('', 81)); t.listen()
print('ready', flush=True)
while True: s.accept()[0].sendall(b'V')
"""


def test_sockets_do_not_outlive_an_address(docker, host, gnet):
    """Bound before the network was left, made to listen after somebody else has the address."""
    docker.run("-d", "--name", "sleeper", "--network", gnet, "--ip", "10.79.0.50", argv=python(SLEEPER))
    wait_for(lambda: "bound" in docker("logs", "sleeper").stdout, "the sleeper")
    docker("network", "disconnect", gnet, "sleeper")
    docker.run("-d", "--name", "owner", "--network", gnet, "--ip", "10.79.0.50", argv=python(VICTIM))
    wait_for(lambda: "ready" in docker("logs", "owner").stdout, "its new owner")
    docker("exec", "sleeper", "/busybox", "touch", "/tmp/go")
    wait_for(lambda: docker("logs", "sleeper").stdout == "bound\nlistening\n", "the sleeper, on its own loopback")
    host.client("ip", "route", "add", "10.79.0.0/24", "via", HOST4, check=True)
    try:
        code = "import socket\nfor _ in range(20): print(socket.create_connection(('10.79.0.50', 80), 5).recv(1).decode())"
        done = host.host(*python(code))
        assert done.stdout.split() == ["V"] * 20, done.stderr
        assert "ConnectionRefusedError" in host.client(*python(code)).stderr  # a network of this host alone
    finally:
        host.client("ip", "route", "del", "10.79.0.0/24")


ASK = """
import socket, sys
for text in sys.argv[1:]:
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3)
    s.connect(('127.0.0.11', 53)); s.send(bytes.fromhex(text))
    try: print(s.recv(600)[3] & 15)
    except OSError: print('-')
"""


def test_queries_that_are_none(docker, host, gnet):
    """Answered by an error or not at all, at once, and without a word in graftd's log."""
    good = query("probe")
    bad = {
        "a response": good[:2] + b"\x81" + good[3:],
        "short": good[:11],
        "two questions": good[:4] + b"\0\2" + good[6:] + good[12:],
        "a label too long": query("x" * 63).replace(b"\x3fxx", b"\x40xx"),
        "many records": good[:6] + b"\x0f\xa0" + good[8:] + bytes(400),
        "a pointer": good[:12] + b"\xc0\x0c\0\1\0\1",
        "huge": good + bytes(20000),
    }
    texts = [data.hex() for data in (*bad.values(), good)]
    done = docker.run("--rm", "--name", "probe", "--network", gnet, argv=(*python(ASK), *texts))
    assert done.stdout.split() == ["-", "-", "2", "2", "2", "2", "2", "0"]
    log = host.run_dir / "graftd.log"
    assert not log.exists() or "Traceback" not in log.read_text()


FLOOD = """
import os, socket, sys, time
how, query = sys.argv[1], bytes.fromhex(sys.argv[2])
to = ('127.0.0.11', 53)
if how == 'nobody':
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.bind(('127.0.0.1', 53)); to = own.getsockname()
def sockets(n, connect=True):
    made = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(n)]
    for s in made:
        s.setblocking(False)
        if connect: s.connect(to)
    return made
def tcp():
    s = socket.socket(); s.setblocking(False)
    try: s.connect(to)
    except BlockingIOError: pass
    return s
end, sent, kept = time.monotonic() + 100, 0, []
if how == 'segments':
    made = sockets(8)
    for s in made: s.setsockopt(17, 103, len(query))  # UDP_SEGMENT: one send, as many datagrams as fit
    query = query * 60
elif how != 'tcp': made = sockets(8, how != 'unconnected')
print('up', flush=True)
while time.monotonic() < end:
    for s in range(8) if how == 'tcp' else made:
        try:
            if how == 'tcp':
                kept.append(tcp())
                if len(kept) > 100: kept.pop(0).close()
            elif how == 'unconnected': s.sendto(query, to)
            elif how == 'huge': s.send(query + bytes(30000))
            else: s.send(query)
        except OSError: pass
"""
BYSTANDER = """
import socket, sys, time
query, times = bytes.fromhex(sys.argv[1]), []
for n in range(100):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1); s.connect(('127.0.0.11', 53))
    began = time.monotonic(); s.send(query)
    try: s.recv(600); times.append(time.monotonic() - began)
    except OSError: pass
    s.close(); time.sleep(.01)
times.sort()
print(len(times), *(f'{1e6 * t:.0f}' for t in (times[len(times) // 2], times[-2]) if times))
"""


def used(pid):
    """The processor seconds of a process."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.alone
@pytest.mark.parametrize("how", ["unconnected", "connected", "segments", "huge", "tcp"])
def test_a_flood_of_queries(docker, host, gnet, how):
    """Another gets each answer, as soon as beside one that is as busy with itself; graftd does not wear itself out."""
    docker.run("-d", "--name", "by", "--network", gnet, argv=("/busybox", "sleep", "100"))
    figures = {}
    for busy in ("nobody", how):
        docker.run("-d", "--name", busy, "--network", gnet, argv=(*python(FLOOD), busy, query("by").hex()))
        wait_for(lambda: "up" in docker("logs", busy).stdout, "the flood")  # noqa: B023 - it is asked at once
        began, before = time.monotonic(), used(host.daemon_pid())
        told = docker("exec", "by", *python(BYSTANDER), query("by").hex()).stdout
        share = (used(host.daemon_pid()) - before) / (time.monotonic() - began)
        figures[busy] = [*map(int, told.split()), share]
        if busy == how:
            assert ["send", "more queries than a container may send"] in [
                [r["op"], r["reason"]] for r in json.loads(host.graft("inspect", how).stdout)["refused"]
            ]
        docker("rm", "-f", busy)
    print(figures)
    answers, median, _, share = figures[how]
    assert answers == 100
    assert median < 2 * figures["nobody"][1] + 1000  # microseconds
    assert share < 0.3


def test_families_that_know_no_namespaces(docker):
    """Also where the engine's profile lets them pass."""
    code = (
        "import errno, socket\nfor family in (40, 42, 34, 21, 43):\n"
        "    for kind in (1, 2, 3, 5):\n"
        "        try: print('OK', family, socket.socket(family, kind))\n"
        "        except OSError as error: print(errno.errorcode[error.errno])"
    )
    for options in ((), ("--security-opt", "seccomp=unconfined")):
        told = docker.run("--rm", "--network", "none", *options, argv=python(code)).stdout.split()
        assert len(told) == 20
        assert set(told) <= {"EAFNOSUPPORT", "EPERM"}  # the latter is Docker's own
        assert options == () or set(told) == {"EAFNOSUPPORT"}


def test_what_was_revoked_stays_so(docker, host, gnet):
    docker.run("-d", "--name", "ex", "--network", "none", "-p", "8797:80", argv=("/busybox", "sleep", "60"))
    host.graft("rule", "del", "ex", "-p", "8797:80", check=True)
    docker("exec", "ex", "/busybox", "true")
    assert json.loads(host.graft("ps", "-j").stdout)[0]["publish"] == []


def test_a_container_is_known_however_it_is_mounted(docker, host, gnet):
    """By another's namespace, or with its own resolv.conf, hostname and hosts."""
    docker.run("-d", "--name", "first", "--network", "none", argv=("/busybox", "sleep", "60"))
    join = ("--network", "container:first", "--label", "graft.publish=8799:80")
    docker.run("-d", "--name", "second", *join, argv=("/busybox", "sleep", "60"))
    assert json.loads(host.graft("ps", "-j").stdout)[0]["publish"] == ["8799:80/tcp"]
    own = []
    for name in ("resolv.conf", "hostname", "hosts"):
        (host.work / name).write_text("")
        own += ["-v", f"{host.work / name}:/etc/{name}"]
    bare = ("run", "--runtime", "graft", *own)
    docker(*bare, "-d", "--name", "third", "--network", "none", "-p", "8798:80", "host", "/busybox", "sleep", "60")
    assert {c["name"]: c["publish"] for c in json.loads(host.graft("ps", "-j").stdout)}["third"] == ["8798:80/tcp"]
    done = docker(*bare, "--rm", "host", "/busybox", "true", check=False)
    assert "graft: network 'bridge' is not graft's" in done.stderr


def test_the_hosts_address_is_no_containers(docker, host):
    label = f"graft.ip={HOST4}"
    done = docker.run("--rm", "--network", "none", "--label", label, argv=("/busybox", "true"), check=False)
    assert f"label 'graft.ip={HOST4}': not in a network of the container" in done.stderr
    done = docker("network", "create", "-d", docker.driver, "--subnet", "10.77.0.0/24", "lan", check=False)
    if not done.returncode:
        done = docker.run("--rm", "--network", "lan", "--ip", HOST4, argv=("/busybox", "true"), check=False)
        docker("network", "rm", "lan")
    assert done.returncode


def test_addresses_of_others(docker, host, gnet):
    """A label gives an address of the container's network, or of the administrator's ranges: nothing else."""

    def run(address, network):
        label = ("--label", f"graft.ip={address}")
        return docker.run("--rm", "--network", network, *label, argv=("/busybox", "true"), check=False).stderr

    late = engine_version("dockerd") >= UNHOOKED  # Docker attaches the container after that is decided
    where = "the container's network is not known yet" if late else "not in the container's network (10.79.0.0/24)"
    for address in ("169.254.169.254", "8.8.8.8", "10.77.0.254", CLIENT4):
        assert f"graft: label 'graft.ip={address}': {where}" in run(address, gnet)
        assert f"graft: label 'graft.ip={address}': not in a network" in run(address, "none")
    docker.run("-d", "--name", "there", "--network", gnet, "--ip", "10.79.0.60", argv=("/busybox", "sleep", "60"))
    assert (where if late else "10.79.0.60 is the address of container 'there'") in run("10.79.0.60", gnet)
    assert (where if late else "the gateway's or a broadcast address of 10.79.0.0/24") in run("10.79.0.1", gnet)
    host.host("ip", "address", "add", "10.99.1.77/32", "dev", "lo", check=True)
    assert "10.99.1.77 is the host's own address" in run("10.99.1.77", "none")
    host.host("ip", "address", "del", "10.99.1.77/32", "dev", "lo", check=True)
    assert run("10.99.1.5", "none") == ""
    assert late or run("10.79.0.61", gnet) == ""


@pytest.fixture
def attached(host, tmp_path):
    """A namespace that graft-cni has attached."""
    name = f"{host.tag}-at"
    subprocess.run(("ip", "netns", "add", name), check=True)
    ipam = {"type": "host-local", "subnet": "10.98.1.0/24", "dataDir": str(tmp_path)}
    config = {"cniVersion": "1.0.0", "name": "at", "type": "graft-cni", "ipam": ipam}
    config["runtimeConfig"] = {"portMappings": [{"hostPort": 8555, "containerPort": 80}]}
    status, added = cni(host, "ADD", config, CNI_NETNS=f"/run/netns/{name}")
    assert status == 0, added
    yield name, added["ips"][0]["address"].partition("/")[0]
    assert cni(host, "DEL", config, CNI_NETNS="") == (0, None)
    subprocess.run(("ip", "netns", "del", name), capture_output=True)


def test_egress_none_on_a_network(host, attached):
    """Its members and names alone: not the host by its gateway's address, nor what nobody has."""
    name, _ = attached
    server = host.spawn(*python("import socket, time; s = socket.create_server(('', 8622)); time.sleep(60)"))
    host.wait_listening(8622)
    code = """
import errno, socket, sys
for where in (('10.98.1.1', 8622), ('10.98.1.77', 80), ('10.77.0.1', 8622)):
    try: socket.create_connection(where, 3); print('reached')
    except OSError as error: print(errno.errorcode.get(error.errno, error))
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(3); s.connect(('10.98.1.1', 53))
s.send(bytes.fromhex(sys.argv[1])); print(s.recv(600)[3] & 15)
"""
    done = host.graft("run", "--netns", name, "--egress", "none", *python(code), query("nobody").hex())
    assert done.stdout.split() == ["ECONNREFUSED", "ENETUNREACH", "ENETUNREACH", "3"], done.stderr
    host.end(server)
