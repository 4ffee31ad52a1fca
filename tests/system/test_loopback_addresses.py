"""127.0.0.2 is another address than 127.0.0.1 inside, as on any host: for TCP and UDP, wherever servers are bound."""

import re

import pytest

from graft.bench.lab import ROOT
from tests.conftest import python

# docs/differences.md: the wildcard and an address are two places, where a bind sees TCP listeners alone; what a server on the
# wildcard answers to a connected client; one socket of both families; a port that is published, or that has an own address
# beside it.
PLACES = r"bind 1 \S+ \S+ 0 False EADDRINUSE|bind 1 (::1 ::|:: ::1) |reply 0\.0\.0\.0 \S+ \S+ True 1 nothing"
PUBLISHED = r"itself 1 0\.0\.0\.0 (127\.0\.0\.1|0\.0\.0\.0) ok"
OWN = r"tcp \S+ 0\.0\.0\.0 |udp :: None ::1 |bind 2 \S+ \S+ 0 False EADDRINUSE"


@pytest.mark.parametrize(
    ("options", "differs"),
    [((), PLACES), (("-p", "5499:5400", "-p", "5499:5400/udp"), f"{PLACES}|{PUBLISHED}"), (("--ip", "10.88.0.5"), f"{PLACES}|{OWN}")],
    ids=("plain", "published", "own"),
)
def test_addresses_of_the_loopback_are_the_hosts(lab, options, differs):
    """Every server, client and destination, and what both ends are called; every pair of binds."""
    code = (ROOT / "tests/programs/loopbacks.py").read_text()
    host = lab.host(*python(code))
    inside = lab.graft("run", *options, *python(code))
    assert (host.returncode, inside.returncode) == (0, 0), host.stderr + inside.stderr
    told, expected = inside.stdout.splitlines(), host.stdout.splitlines()
    assert len(told) == len(expected) > 700
    wrong = [(seen, right) for seen, right in zip(told, expected, strict=True) if seen != right and not re.match(differs, right)]
    assert wrong == []


def test_a_server_of_one_address_is_not_at_another(lab):
    """Two servers on one port, and none at a third address or at ::1; a client of IPv6 that is bound to [::], too."""
    code = """
import socket
def serve(address):
    s = socket.socket(); s.bind((address, 80)); s.listen(); return s
one, two = serve('127.0.0.1'), serve('127.0.0.2')
for family, bound, asked in ((2, None, '127.0.0.1'), (2, None, '127.0.0.2'), (2, None, '127.0.0.3'), (10, None, '::1'), (10, '::', '::1'), (10, '::', '::ffff:127.0.0.2')):
    c = socket.socket(family)
    if bound: c.bind((bound, 0))
    print(asked, c.connect_ex((asked, 80)), c.getpeername()[0] if c.connect_ex((asked, 80)) == 106 else '')
for s in (one, two): s.settimeout(1); print(s.accept()[0].getsockname())
"""
    done = lab.graft("run", *python(code))
    assert done.stdout.splitlines() == [
        "127.0.0.1 0 127.0.0.1", "127.0.0.2 0 127.0.0.2", "127.0.0.3 111 ", "::1 111 ", "::1 111 ", "::ffff:127.0.0.2 0 ::ffff:127.0.0.2",
        "('127.0.0.1', 80)", "('127.0.0.2', 80)",
    ], done.stdout + done.stderr  # fmt: skip


def test_more_addresses_than_there_are_places(lab):
    """The last ones share a place: they work, but for one port at two of them; a scan of closed ports takes none."""
    code = """
import socket
for n in range(2, 200): socket.socket().connect_ex((f'127.9.9.{n}', 80))
socks = []
for n in range(1, 40):
    s = socket.socket(); socks.append(s)
    try: s.bind((f'127.0.0.{n}', 80))
    except OSError: print('taken', n); break
for n in range(20, 40):
    s = socket.socket(); s.bind((f'127.0.0.{n}', 1000 + n)); s.listen()
    c = socket.create_connection((f'127.0.0.{n}', 1000 + n)); assert c.getpeername()[0] == f'127.0.0.{n}'; s.accept()
print('done')
"""
    done = lab.graft("run", *python(code))
    assert done.stdout.splitlines() == ["taken 16", "done"], done.stdout + done.stderr


@pytest.mark.parametrize("kind", [1, 2])
def test_others_do_not_reach_them(lab, kind):
    """Two containers have one port of 127.0.0.2, and the host, too."""
    code = """
import socket
s = socket.socket(2, KIND); s.bind(('127.0.0.2', 5000))
if KIND == 1: s.listen()
print('ready', flush=True); input()
"""
    code = code.replace("KIND", str(kind))
    for where in ((), ("graft", "one"), ("graft", "two")):
        process = lab.spawn_graft("--name", where[1], *python(code), stdout=-1, stdin=-1) if where else lab.spawn(*python(code), stdout=-1, stdin=-1)
        assert process.stdout.readline() == "ready\n"
    ask = f"import socket; s = socket.socket(2, {kind}); s.connect(('127.0.0.2', 5000)); s.send(b'x'); s.settimeout(0.2); s.recv(9)"
    assert "ConnectionRefused" in lab.graft("run", *python(ask)).stderr
