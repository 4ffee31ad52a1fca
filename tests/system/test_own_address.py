"""graft run --ip: an address of the container's own on the host's stack."""

import json
import sys

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, GRAFT, HOST4, wait_for
from tests.conftest import python

SERVER = """
import socket, sys
s = socket.socket(*([socket.AF_INET6] if len(sys.argv) > 2 else []))
s.bind(('::' if len(sys.argv) > 2 else '', int(sys.argv[1])))
s.listen()
print(s.getsockname()[1], flush=True)
while True:
    c, p = s.accept()
    c.sendall(repr((p[0], *c.getsockname()[:2])).encode()); c.close()
"""
CLIENT = """
import errno, socket, sys
for where in sys.argv[1:]:
    host, _, port = where.rpartition('_')
    try:
        s = socket.create_connection((host, int(port)), 5)
        told = eval(s.recv(200).decode())
        print(s.getsockname()[0], s.getpeername()[0], s.getpeername()[1], *told)
    except OSError as error:
        print(errno.errorcode.get(error.errno, error))
"""
BORROWER = """
import errno, socket, sys
victim, other = sys.argv[1:]
v6 = ':' in victim
for port in (None, 0, 5353):
    s = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    if port is not None: s.bind(('', port))
    s.connect((victim, 53)); s.send(b'x')
    for go in (lambda: s.connect((other, 9)), lambda: s.sendto(b'x', (other, 9))):
        try: go(); print(s.getsockname()[0])
        except OSError as error: print(errno.errorcode[error.errno])
    s.close()
"""
UDP_SERVER = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 53)); print('ready', flush=True)
while True:
    d, p = s.recvfrom(100); s.sendto(repr(p[0]).encode(), p)
"""
UDP_CLIENT = """
import socket, sys
for connected in (False, True):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5)
    if connected:
        s.connect((sys.argv[1], 53)); s.send(b'x'); print(s.recv(100).decode(), s.getpeername())
    else:
        s.sendto(b'x', (sys.argv[1], 53)); print(*s.recvfrom(100))
"""


def spawn(lab, *options, code=SERVER, args=()):
    process = lab.spawn_graft(*options, *python(code), *args, stdout=-1)
    assert process.stdout.readline(), "the server did not start"
    return process


@pytest.fixture
def servers(lab):
    started = [
        spawn(lab, "--name", "own-a", "--ip", "10.88.0.5", args=("80",)),
        spawn(lab, "--name", "own-b", "--ip", "10.88.0.6", "-p", "8080:80", args=("80",)),
    ]
    yield started
    for process in started:
        lab.end(process)
    wait_for(lambda: "10.88.0" not in lab.host("ip", "address", "show", "lo").stdout, "the addresses' end")


@pytest.mark.core
def test_two_on_one_port(lab, servers):
    listening = lab.host("ss", "-tlnH").stdout
    assert "10.88.0.5" not in listening
    assert "0.0.0.0:8080 " in listening
    assert "inet 10.88.0.5/32" in lab.host("ip", "address", "show", "lo").stdout
    targets = ("10.88.0.5_80", "10.88.0.6_80", "10.88.0.6_8080", "10.88.0.5_81")
    told = lab.graft("run", "--ip", "10.88.0.7", *python(CLIENT), *targets).stdout.splitlines()
    assert told == [
        "10.88.0.7 10.88.0.5 80 10.88.0.7 10.88.0.5 80",
        "10.88.0.7 10.88.0.6 80 10.88.0.7 10.88.0.6 80",
        "ECONNREFUSED",
        "ECONNREFUSED",
    ]


def test_from_the_host_and_from_elsewhere(lab, servers):
    told = lab.host(*python(CLIENT), "10.88.0.5_80", "10.88.0.6_80", "10.88.0.6_81").stdout.splitlines()
    assert [line.split()[-2:] for line in told] == [["10.88.0.5", "80"], ["10.88.0.6", "80"], ["ECONNREFUSED"]]
    lab.client("ip", "route", "add", "10.88.0.0/16", "via", HOST4, check=True)
    try:
        told = lab.client(*python(CLIENT), "10.88.0.5_80", f"{HOST4}_8080").stdout.splitlines()
        assert told == ["10.77.0.2 10.88.0.5 80 10.77.0.2 10.88.0.5 80", "10.77.0.2 10.77.0.1 8080 10.77.0.2 10.77.0.1 80"]
    finally:
        lab.client("ip", "route", "del", "10.88.0.0/16")


def test_nobody_elses_server_answers(lab, servers):
    """A host's server on the wildcard is not at a container's address."""
    code = "import socket, time; s = socket.socket(); s.bind(('', 8622)); s.listen(); time.sleep(60)"
    process = lab.spawn(*python(code))
    lab.wait_listening(8622)
    told = lab.graft("run", *python(CLIENT), "10.88.0.5_8622").stdout
    assert (told, lab.host(*python(CLIENT), "10.88.0.5_8622").stdout) == ("ECONNREFUSED\n", "ECONNREFUSED\n")
    lab.end(process)


@pytest.mark.core
def test_a_published_port_and_anothers_own(lab, servers):
    """Port 8080 of the host is own-b's, port 8080 of its own address own-c's, whichever comes first."""
    process = spawn(lab, "--name", "own-c", "--ip", "10.88.0.8", args=("8080",))
    told = lab.host(*python(CLIENT), "10.88.0.8_8080", "10.88.0.6_80").stdout.splitlines()
    assert [line.split()[-2:] for line in told] == [["10.88.0.8", "8080"], ["10.88.0.6", "80"]]
    later = spawn(lab, "--name", "own-d", "--ip", "10.88.0.9", "-p", "8090:80", args=("80",))
    lab.end(later)
    lab.end(process)


def test_a_port_is_taken_once(lab):
    code = """
import socket
for port in (80, 8080):
    a = socket.socket(); a.bind(('', port)); a.listen()
    b = socket.socket()
    try: b.bind(('', port)); print('bound twice')
    except OSError as error: print(error.errno)
"""
    done = lab.graft("run", "--ip", "10.88.0.5", "-p", "8631:80", *python(code))
    assert done.stdout == "98\n98\n", done.stderr


def test_own_loopback_and_own_name(lab):
    code = """
import socket
s = socket.socket(); s.bind(('10.88.0.5', 80)); s.listen(); print(s.getsockname())
for host in ('127.0.0.1', '10.88.0.5', '0.0.0.0'):
    try: c = socket.create_connection((host, 80))
    except OSError as error: print(error.errno); continue
    p, _ = s.accept(); print(c.getpeername()[0]); c.close(); p.close()
l = socket.socket(); l.bind(('127.0.0.1', 81)); l.listen()
try: socket.create_connection(('10.88.0.5', 81)); print('reached')
except OSError as error: print(error.errno)
try: socket.socket().bind(('10.88.0.77', 82)); print('bound')
except OSError as error: print(error.errno)
"""
    done = lab.graft("run", "--ip", "10.88.0.5", "--egress", "none", *python(code))
    told = done.stdout.splitlines()
    assert told == ["('10.88.0.5', 80)", "111", "10.88.0.5", "111", "111", "99"], done.stderr


def test_udp(lab):
    server = spawn(lab, "--name", "own-u", "--ip", "10.88.0.5", code=UDP_SERVER)
    told = lab.graft("run", "--ip", "10.88.0.7", *python(UDP_CLIENT), "10.88.0.5").stdout.splitlines()
    assert told == ["b\"'10.88.0.7'\" ('10.88.0.5', 53)", "'10.88.0.7' ('10.88.0.5', 53)"]
    lab.end(server)
    for published in ("5399:53/udp", "127.0.0.1:5399:53/udp"):
        server = spawn(lab, "--name", "own-v", "--ip", "10.88.0.5", "-p", published, code=UDP_SERVER)
        told = lab.graft("run", "--ip", "10.88.0.7", *python(UDP_CLIENT), "10.88.0.5").stdout.splitlines()
        assert told == ["b\"'10.88.0.7'\" ('10.88.0.5', 53)", "'10.88.0.7' ('10.88.0.5', 53)"]
        if published == "5399:53/udp":
            outside = lab.client(*python(UDP_CLIENT.replace("53)", "5399)")), HOST4).stdout.splitlines()
            assert outside == ["b\"'10.77.0.2'\" ('10.77.0.1', 5399)", "'10.77.0.2' ('10.77.0.1', 5399)"]
        lab.end(server)


@pytest.mark.parametrize(("victim", "other"), [("10.88.0.5", "10.77.0.2"), ("fd88::5", CLIENT6)])
def test_its_address_is_not_borrowed(lab, victim, other):
    """The kernel gives a socket that connects there the container's address: from it the socket reaches nobody else."""
    family = "socket.AF_INET6" if ":" in victim else "socket.AF_INET"
    server = spawn(lab, "--name", "own-v", "--ip", victim, code=UDP_SERVER.replace("socket.AF_INET", family))
    told = lab.graft("run", *python(BORROWER), victim, other).stdout.split()
    assert told == ["EADDRNOTAVAIL", "ENETUNREACH"] * 3
    lab.end(server)


def test_ipv6(lab):
    server = spawn(lab, "--name", "own-6", "--ip", "fd88::5", args=("80", "6"))
    told = lab.graft("run", "--ip", "fd88::7", *python(CLIENT), "fd88::5_80").stdout
    assert told == "fd88::7 fd88::5 80 fd88::7 fd88::5 80\n"
    lab.end(server)
    both = spawn(lab, "--name", "own-46", "--ip", "10.88.0.5", "--ip", "fd88::5", args=("80", "6"))
    told = lab.graft("run", "--ip", "10.88.0.7", *python(CLIENT), "10.88.0.5_80").stdout
    assert told.startswith("10.88.0.7 10.88.0.5 80 ::ffff:10.88.0.7")
    lab.end(both)


def test_refusals(lab, servers):
    for address, message in (
        ("10.88.0.5", "10.88.0.5 is the address of container 'own-a'"),
        ("127.0.0.1", "--ip: 127.0.0.1 is a loopback address"),
        ("0.0.0.0", "--ip: 0.0.0.0 is the wildcard"),
        ("224.0.0.1", "--ip: 224.0.0.1 is not an address of one host"),
        ("fe80::1", "--ip: fe80::1 is a link-local address"),
        ("web", "--ip: 'web' is not an IP address"),
    ):
        done = lab.graft("run", "--ip", address, "true")
        assert done.returncode in (1, 2)
        assert done.stderr.startswith(f"graft: {message}")
    done = lab.graft("run", "--ip", "10.88.0.7", "--ip", "10.88.0.8", "true")
    assert (done.returncode, done.stderr) == (2, "graft: 10.88.0.7 and 10.88.0.8 are of one family (one address of each)\n")
    seen = json.loads(lab.graft("inspect", "own-b").stdout)
    assert seen["addresses"] == ["10.88.0.6"]


def test_addresses_of_others(lab):
    """What the host sends elsewhere, or what answers there, is not a container's unless root insists."""
    for words in (
        ("route", "add", "10.66.0.0/16", "via", CLIENT4),
        ("route", "add", "default", "via", "10.77.0.254"),
        ("-6", "route", "add", "default", "via", "2001:db8:77::ff"),
    ):
        lab.host("ip", *words, check=True)
    try:
        for address, message in (
            ("169.254.169.254", "is a link-local address, such as cloud providers' metadata services have"),
            ("10.77.0.254", "is the default gateway, on veth0"),
            ("2001:db8:77::ff", "is the default gateway, on veth0"),
            ("10.77.0.255", "is a broadcast address of veth0"),
            ("10.66.0.9", f"is routed to {CLIENT4} on veth0 (10.66.0.0/16)"),
            ("8.8.8.8", "is an address of the Internet, routed to 10.77.0.254"),
            ("2606:4700:4700::1111", "is an address of the Internet, routed to 2001:db8:77::ff"),
            (CLIENT4, "answers on veth0, as "),
            (CLIENT6, "answers on veth0, as "),
        ):
            words = ("run", "--ip", "10.88.0.7" if ":" in address else "fd00::7", "--ip", address)
            done = lab.refused((GRAFT, *words, "true"), 1, f"graft: --ip {address}: {message}")
            assert done.stderr.endswith(" (choose an address that nobody has, or add --force-ip)\n")
            assert f" {address}/" not in lab.host("ip", "address", "show", "lo").stdout
            lab.graft(*words, "--force-ip", "true", check=True)
        for address in ("10.77.0.99", "10.88.0.7", "2001:db8:77::99", "fd00::7"):
            lab.graft("run", "--ip", address, "true", check=True)
        lab.refused((GRAFT, "run", "--force-ip", "true"), 2, "graft: --force-ip goes with --ip")
    finally:
        for route in ("10.66.0.0/16", "default"):
            lab.host("ip", "route", "del", route, check=True)
        lab.host("ip", "-6", "route", "del", "default", check=True)


def test_a_range_that_the_administrator_has_written_down(own_lab):
    own_lab.config.write_text('addresses = ["10.77.0.2/32"]\n')
    own_lab.graft("run", "--ip", CLIENT4, "true", check=True)


def test_an_address_of_a_device_stays(lab):
    lab.host("ip", "address", "add", "10.88.2.1/32", "dev", "lo", check=True)
    for address in (HOST4, "10.88.2.1"):
        lab.graft("run", "--ip", address, "true", check=True)
        assert f"inet {address}/" in lab.host("ip", "address").stdout
    lab.host("ip", "address", "del", "10.88.2.1/32", "dev", "lo", check=True)


LISTEN = """
import socket, sys, time
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind((sys.argv[1], int(sys.argv[2]))); s.listen(); print('ready', flush=True)
while True:
    c, p = s.accept(); c.sendall(repr((p[0], *c.getsockname()[:2])).encode()); c.close()
"""
NFT = """
table ip graft-test {
    chain out { type nat hook output priority -100; ip daddr 10.99.0.1 tcp dport 80 dnat to 10.88.0.6:80; }
    chain in { type nat hook prerouting priority -100; ip daddr 10.99.0.1 tcp dport 80 dnat to 10.88.0.6:80; }
}
"""


@pytest.fixture
def routed(lab):
    """The client's machine routes the containers' addresses to the host."""
    for prefix in ("10.88.0.0/16", "10.99.0.0/16"):
        lab.client("ip", "route", "add", prefix, "via", HOST4, check=True)
    yield
    for prefix in ("10.88.0.0/16", "10.99.0.0/16"):
        lab.client("ip", "route", "del", prefix)


def test_nobody_stands_in_anybodys_way(lab):
    """A container on port 10250 of its address, the host on its wildcard, in both orders; and both are reached."""
    container = spawn(lab, "--name", "own-a", "--ip", "10.88.0.5", code=LISTEN, args=("0.0.0.0", "10250"))
    exact = spawn(lab, "--name", "own-b", "--ip", "10.88.0.6", code=LISTEN, args=("10.88.0.6", "10250"))
    assert lab.host(*python(CLIENT), "10.88.0.5_10250", "10.88.0.6_10250").stdout.count("10250") == 4
    host = lab.spawn(*python(LISTEN), "0.0.0.0", "10250", stdout=-1)
    assert host.stdout.readline() == "ready\n"
    later = spawn(lab, "--name", "own-c", "--ip", "10.88.0.7", code=LISTEN, args=("", "10250"))
    told = lab.host(*python(CLIENT), *(f"{a}_10250" for a in ("10.88.0.5", "10.88.0.6", "10.88.0.7", HOST4))).stdout
    assert [line.split()[-2:] for line in told.splitlines()] == [
        [address, "10250"] for address in ("10.88.0.5", "10.88.0.6", "10.88.0.7", HOST4)
    ]
    for process in (container, exact, later, host):
        lab.end(process)


def test_a_published_server_at_its_own_address_whoever_translates(lab, servers, routed):
    """own-b is published as 8080, and is at its address on 80, also by NAT and for other machines."""
    told = lab.client(*python(CLIENT), "10.88.0.6_80", "10.88.0.6_8080", f"{HOST4}_8080").stdout.splitlines()
    assert told == [
        "10.77.0.2 10.88.0.6 80 10.77.0.2 10.88.0.6 80",
        "ECONNREFUSED",
        "10.77.0.2 10.77.0.1 8080 10.77.0.2 10.77.0.1 80",
    ]
    done = lab.host("nft", "-f", "-", input=NFT)
    assert not done.returncode, done.stderr
    try:
        lab.host("ip", "address", "add", "10.99.0.1/32", "dev", "lo", check=True)
        assert lab.client(*python(CLIENT), "10.99.0.1_80").stdout == "10.77.0.2 10.99.0.1 80 10.77.0.2 10.88.0.6 80\n"
        told = lab.host(*python(CLIENT), "10.99.0.1_80").stdout
        assert told.split()[1:3] == ["10.99.0.1", "80"]
        assert told.split()[-2:] == ["10.88.0.6", "80"]
    finally:
        lab.host("nft", "delete", "table", "ip", "graft-test")
        lab.host("ip", "address", "del", "10.99.0.1/32", "dev", "lo")


def test_nobody_else_answers_other_machines(lab, servers, routed):
    """Neither the host's wildcard listener nor another container's published one is at a container's address."""
    host = lab.spawn(*python(LISTEN), "0.0.0.0", "8622", stdout=-1)
    assert host.stdout.readline() == "ready\n"
    told = lab.client(*python(CLIENT), "10.88.0.5_8622", "10.88.0.5_8080", f"{HOST4}_8622").stdout.splitlines()
    assert told == ["ECONNREFUSED", "ECONNREFUSED", "10.77.0.2 10.77.0.1 8622 10.77.0.2 10.77.0.1 8622"]
    lab.end(host)


UDP_ASK = """
import errno, socket, sys
for where in sys.argv[1:]:
    host, _, port = where.rpartition('_')
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(5); s.connect((host, int(port)))
    try: s.send(b'x'); print(s.recv(100).decode())
    except OSError as error: print(errno.errorcode.get(error.errno, error))
"""


def test_a_hosts_udp_server_is_not_at_a_containers_address(lab, routed):
    """Neither for other machines nor for the host; the container's own is."""
    host = lab.spawn(*python(UDP_SERVER.replace("53", "5354")), stdout=-1)
    assert host.stdout.readline() == "ready\n"
    server = spawn(lab, "--name", "own-u", "--ip", "10.88.0.5", code=UDP_SERVER)
    targets = ("10.88.0.5_5354", "10.88.0.5_53", f"{HOST4}_5354")
    assert lab.client(*python(UDP_ASK), *targets).stdout.split() == ["ECONNREFUSED", "'10.77.0.2'", "'10.77.0.2'"]
    assert lab.host(*python(UDP_ASK), *targets[:2]).stdout.split() == ["ECONNREFUSED", "'10.88.0.5'"]
    for process in (host, server):
        lab.end(process)


def test_a_server_on_its_own_address_is_published(lab, routed):
    """`redis-server --bind $(hostname -i)`: at the published port, at its address, and not at 127.0.0.1."""
    server = spawn(
        lab, "--name", "own-a", "--ip", "10.88.0.5", "-p", "8091:6379", code=LISTEN, args=("10.88.0.5", "6379")
    )
    told = lab.client(*python(CLIENT), f"{HOST4}_8091", "10.88.0.5_6379").stdout.splitlines()
    assert told == ["10.77.0.2 10.77.0.1 8091 10.77.0.2 10.77.0.1 6379", "10.77.0.2 10.88.0.5 6379 10.77.0.2 10.88.0.5 6379"]
    pid = next(c["pid"] for c in json.loads(lab.graft("ps", "-j").stdout) if c["name"] == "own-a")
    told = lab.graft("run", "--netns", pid, *python(CLIENT), "127.0.0.1_6379", "10.88.0.5_6379").stdout.splitlines()
    assert told == ["ECONNREFUSED", "10.88.0.5 10.88.0.5 6379 10.88.0.5 10.88.0.5 6379"]
    lab.end(server)


ATTACH = f"""
import os, sys
sys.path.insert(0, {str(GRAFT.parents[1])!r})
from graft import client
if sys.argv[1] == 'detach': sys.exit(client.call('detach', start=True, key='cni/own/eth0') or 0)
client.call('attach', start=True, fds=(os.open(sys.argv[1], os.O_RDONLY),), key='cni/own/eth0', network='own',
            addresses=['10.88.0.5/24'], within=sys.argv[2])
"""


@pytest.mark.parametrize("within", ["", "10.88.0.0/16"])
def test_a_network_of_this_host_alone_answers_no_other(lab, routed, within):
    """Not the unpublished port of a container, by another machine that routes its address here; a pod answers."""
    pod = f"{lab.tag}-pod"
    lab.ip("netns", "add", pod)
    try:
        done = lab.host(sys.executable, "-c", ATTACH, f"/run/netns/{pod}", within)
        assert not done.returncode, done.stderr
        server = spawn(lab, "--name", "own-n", "--netns", f"/run/netns/{pod}", "-p", "8093:81", code=LISTEN, args=("", "80"))
        assert lab.host(*python(CLIENT), "10.88.0.5_80").stdout.split()[1:3] == ["10.88.0.5", "80"]
        told = lab.client(*python(CLIENT), "10.88.0.5_80").stdout
        assert told == ("10.77.0.2 10.88.0.5 80 10.77.0.2 10.88.0.5 80\n" if within else "ECONNREFUSED\n")
        datagrams = spawn(lab, "--netns", f"/run/netns/{pod}", code=UDP_SERVER)
        assert lab.host(*python(UDP_ASK), "10.88.0.5_53").stdout == "'10.88.0.5'\n"
        assert lab.client(*python(UDP_ASK), "10.88.0.5_53").stdout == ("'10.77.0.2'\n" if within else "ECONNREFUSED\n")
        lab.end(datagrams)
        lab.end(server)
    finally:
        lab.host(sys.executable, "-c", ATTACH, "detach", check=True)
        lab.ip("netns", "del", pod)


def test_an_address_of_a_device_is_shared(lab):
    """What the container does not listen for is the host's; what the host listens for the container cannot have."""
    host = lab.spawn(*python(LISTEN), "0.0.0.0", "8622", stdout=-1)
    assert host.stdout.readline() == "ready\n"
    server = spawn(lab, "--name", "own-d", "--ip", HOST4, code=LISTEN, args=("", "8623"))
    told = lab.client(*python(CLIENT), f"{HOST4}_8622", f"{HOST4}_8623", f"{HOST4}_8624").stdout.splitlines()
    assert [line.split()[-1] for line in told] == ["8622", "8623", "ECONNREFUSED"]
    lab.end(server)
    done = lab.graft("run", "--ip", HOST4, *python(LISTEN), "0.0.0.0", "8622")
    assert "Address already in use" in done.stderr
    lab.end(host)


def test_two_listeners_on_one_port_conflict(lab):
    """As on any host: the same address twice, or the wildcard and the address, but not the loopback beside it."""
    code = """
import errno, socket
def listen(address, share=0):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
    try: s.bind((address, 80)); s.listen()
    except OSError as error: s.close(); print(errno.errorcode[error.errno], end=' '); return None
    print('ok', end=' '); return s
for first, second in (('10.88.0.5', '10.88.0.5'), ('', '10.88.0.5'), ('10.88.0.5', ''), ('', ''), ('127.0.0.1', '')):
    a = listen(first); b = listen(second); a.close(); b and b.close()
a = listen('10.88.0.5'); b = listen('127.0.0.1'); a.close(); b.close()
a = listen('10.88.0.5', 1); b = listen('10.88.0.5', 1); c = listen('', 1); d = listen('')
"""
    for options in ((), ("-p", "8092:80")):
        done = lab.graft("run", "--ip", "10.88.0.5", *options, *python(code))
        assert done.stdout.split() == ["ok", "EADDRINUSE"] * 5 + ["ok"] * 5 + ["EADDRINUSE"], done.stderr
