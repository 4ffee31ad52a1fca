"""-p: what is reachable from outside, under which address, and what is refused before the command starts."""

import json
import socket

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, HOST4, HOST6, SECOND4, wait_for
from tests.conftest import python

ECHO = """
import socket, sys
kind = {kind}
s = socket.socket({family}, kind)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(({address!r}, {port}))
if kind == 1: s.listen()
print(s.getsockname()[:2], flush=True)
while True:
    if kind == 1:
        c, peer = s.accept(); c.sendall(repr((peer[:2], c.getsockname()[:2])).encode()); c.close()
    else:
        data, peer = s.recvfrom(99); s.sendto(repr((peer[:2],)).encode(), peer)
"""
ASK = """
import socket
s = socket.socket(socket.AF_INET6 if ':' in {address!r} else socket.AF_INET, {kind}); s.settimeout(3)
s.connect(({address!r}, {port}))
if {kind} == 2: s.send(b'?')
print(s.recv(999).decode())
"""


def echo(lab, *options, address="0.0.0.0", port=80, kind=1):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    code = ECHO.format(address=address, port=port, kind=kind, family=int(family))
    process = lab.spawn_graft(*options, *python(code), stdout=-1)
    shown = process.stdout.readline()
    assert shown == f"('{address}', {port})\n"
    return process


def ask(lab, address, port, kind=1):
    return lab.client(*python(ASK.format(address=address, port=port, kind=kind)))


@pytest.mark.parametrize("kind", [pytest.param(1, marks=pytest.mark.core), 2])
@pytest.mark.parametrize(
    ("bind", "target", "sees"),
    [("0.0.0.0", HOST4, CLIENT4), ("::", HOST6, CLIENT6), ("::", HOST4, f"::ffff:{CLIENT4}")],
)
def test_published_on_all_addresses(lab, kind, bind, target, sees):
    echo(lab, "-p", f"8080:80/{'tcp' if kind == 1 else 'udp'}", address=bind, kind=kind)
    result = ask(lab, target, 8080, kind)
    assert f"('{sees}'," in result.stdout, result.stderr
    if kind == 1:
        assert ", 80))" in result.stdout


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_one_host_address(lab, kind):
    number = 1 if kind == "tcp" else 2
    echo(lab, "-p", f"{SECOND4}:8080:80/{kind}", kind=number)
    assert ask(lab, SECOND4, 8080, number).stdout
    assert "Refused" in ask(lab, HOST4, 8080, number).stderr


def test_ipv6_literal(lab):
    echo(lab, "-p", f"[{HOST6}]:8080:80", address="::")
    assert ask(lab, HOST6, 8080).stdout
    assert ask(lab, HOST4, 8080).returncode


def test_range(lab):
    echo(lab, "-p", "9000-9010:100-110", port=107)
    assert "'10.77.0.1', 107)" in ask(lab, HOST4, 9007).stdout
    assert ask(lab, HOST4, 9006).returncode


def test_privileged_port_as_an_ordinary_user(lab):
    echo(lab, "--user", "nobody", "-p", "443:80")
    assert ask(lab, HOST4, 443).stdout


def test_same_port_tcp_and_udp(lab):
    echo(lab, "--name", "t", "-p", "8080:80/tcp")
    echo(lab, "--name", "u", "-p", "8080:80/udp", kind=2)
    assert ask(lab, HOST4, 8080, 1).stdout
    assert ask(lab, HOST4, 8080, 2).stdout


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_datagram_is_answered_from_where_it_was_sent_to(lab, address):
    """The host has two addresses, and the route to the client has the first one as its source."""
    server = echo(lab, "--name", "several", "-p", "8092:80/udp", address=address, kind=2)
    for asked in (SECOND4, HOST4, SECOND4):
        told = ask(lab, asked, 8092, 2)
        assert CLIENT4 in told.stdout, told.stderr
    if address == "::":
        assert CLIENT6 in ask(lab, HOST6, 8092, 2).stdout
    lab.end(server)


@pytest.mark.parametrize(("kind", "other"), [("tcp", ""), ("udp", ""), ("tcp", f"{SECOND4}:")])
def test_port_of_the_host_in_use(lab, kind, other):
    code = f"import socket, time; s = socket.socket(2, {1 if kind == 'tcp' else 2})\n"
    code += "s.setsockopt(1, 2, 1)\n" if kind == "tcp" else ""
    code += "s.bind(('0.0.0.0', 8080))\n"
    if kind == "tcp":
        code += "s.listen()\n"
    holder = lab.spawn(*python(f"{code}print('ready', flush=True); time.sleep(60)"), stdout=-1)
    holder.stdout.readline()
    result = lab.graft("run", "-p", f"{other}8080:80/{kind}", "true")
    assert result.returncode == 1
    assert f"8080/{kind} is in use by python3" in result.stderr
    assert "(pid " in result.stderr
    assert result.stderr.count("\n") == 1
    assert lab.containers() == []


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("8080:80", "8080:81", True),
        ("8080:80", "10.77.0.1:8080:80", True),
        ("10.77.0.1:8080:80", "8080:80", True),
        ("10.77.0.1:8080:80", "10.77.0.3:8080:80", False),
        ("8080:80", "8080:80/udp", False),
        ("9000-9010:9000-9010", "9010:80", True),
        ("9000-9010:9000-9010", "9011:80", False),
        ("0.0.0.0:8080:80", "[::]:8080:80", False),
    ],
)
def test_two_containers_on_one_port(lab, first, second, clash):
    lab.spawn_graft("--name", "first", "-p", first, "sleep", "60")
    from graft.bench.lab import wait_for

    wait_for(lambda: lab.containers() == ["first"], "the first container")
    result = lab.graft("run", "-p", second, "true")
    assert (result.returncode == 1) is clash
    if clash:
        assert "is published by container 'first'" in result.stderr
        assert lab.containers() == ["first"]


def test_address_of_another_host(lab):
    result = lab.graft("run", "-p", "192.0.2.77:8080:80", "true")
    assert result.returncode == 1
    assert "192.0.2.77 is not an address of this host" in result.stderr


def test_ports_are_free_again_at_once(lab):
    for _ in range(5):
        assert lab.graft("run", "--name", "again", "-p", "8080:80", "true").returncode == 0


def rules(lab, name):
    return json.loads(lab.graft("rule", "show", name, "-j").stdout)


def test_a_publication_is_taken_back_by_its_own_address(lab):
    options = ("-p", f"{HOST4}:8082:82", "-p", f"[{HOST6}]:8082:82", "-p", "0.0.0.0:8181:80")
    process = lab.spawn_graft("--name", "exact", *options, *python("input()"), stdin=-1)
    wait_for(lambda: lab.containers() == ["exact"], "the container")
    assert lab.graft("rule", "del", "exact", "-p", f"{HOST4}:8082:82").returncode == 0
    assert lab.graft("rule", "del", "exact", "-p", "0.0.0.0:8181:80").returncode == 0
    left = rules(lab, "exact")
    assert left["publish"] == [f"[{HOST6}]:8082:82/tcp"]
    assert [r["rule"] for r in left["ingress"]] == ["[::]:82=tcp6-8082"]
    process.stdin.close()


@pytest.mark.parametrize(("kind", "family"), [(1, "tcp"), (2, "udp")])
@pytest.mark.parametrize("address", ["0.0.0.0", "::"])
def test_a_publication_that_was_deleted_comes_back(lab, kind, family, address):
    """While the server runs, which has its port all the time; not for another container, nor another port of TCP."""
    server = echo(lab, "--name", "back", "-p", f"8083:80/{family}", address=address, kind=kind)
    other = lab.spawn_graft("--name", "other", "sleep", "60")
    wait_for(lambda: "other" in lab.containers(), "the other container")
    for _ in range(2):
        lab.graft("rule", "del", "back", "-p", f"8083:80/{family}", check=True)
        for name, inside in (("other", 80), *((("back", 81),) if kind == 1 else ())):
            refused = lab.graft("rule", "add", name, "-p", f"8083:{inside}/{family}")
            assert refused.returncode == 1
            assert f"8083/{family} is in use by python3" in refused.stderr
        lab.graft("rule", "add", "back", "-p", f"8083:80/{family}", check=True)
        assert rules(lab, "back")["publish"] == [f"8083:80/{family}"]
        assert CLIENT4 in ask(lab, HOST4, 8083, kind).stdout
    lab.end(server)
    lab.end(other)
    wait_for(lambda: lab.containers() == [], "their end")
