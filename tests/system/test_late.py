"""A client that binds before it goes out: it leaves by a port of the kernel's choice, and its program sees what it asked for."""

import signal

import pytest

from graft.bench.lab import CLIENT4, CLIENT6, HOST4, HOST6
from tests.conftest import python
from tests.system.told import Told

OWN4, OWN6 = "10.99.0.5", "fd00:99::5"
ECHO = """
import socket, threading
def tcp(l):
    while True:
        c, peer = l.accept(); c.sendall(f"{peer[0]} {peer[1]}\\n".encode()); c.close()
def udp(s):
    while True:
        data, peer = s.recvfrom(99); s.sendto(f"{peer[0]} {peer[1]}".encode(), peer)
for family, any_ in ((socket.AF_INET, '0.0.0.0'), (socket.AF_INET6, '::')):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        s = socket.socket(family, kind); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6: s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        s.bind((any_, 7070))
        if kind == socket.SOCK_STREAM: s.listen()
        threading.Thread(target=tcp if kind == socket.SOCK_STREAM else udp, args=(s,)).start()
print('ready', flush=True)
"""
# what a client sees of itself, and its server of it: ADDRESS PORT before, after, and as the other side says
CLIENT = """
import errno, socket, sys
for line in sys.stdin:
    kind, host, port, to = line.split()
    s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, {'tcp': 1, 'udp': 2, 'send': 2}[kind]); s.settimeout(5)
    try:
        s.bind((host, int(port))); before = s.getsockname()[:2]
        try: s.bind((host, 1234)); again = 'bound'
        except OSError as e: again = errno.errorcode[e.errno]
        if kind == 'send': s.sendto(b'x', (to, 7070)); told = s.recvfrom(99)[0].decode()
        else:
            s.connect((to, 7070))
            if kind == 'udp': s.send(b'x')
            told = s.recv(99).decode().strip()
        print(*before, again, *s.getsockname()[:2], told, flush=True)
    except OSError as e: print(errno.errorcode.get(e.errno, repr(e)), flush=True)
    s.close()
"""


@pytest.fixture
def far(lab):
    """A server on another machine, which says who has asked."""
    process = lab.spawn(*python(ECHO), client=True, stdout=-1)
    assert process.stdout.readline() == "ready\n"
    yield process
    lab.end(process, signal.SIGKILL)


def test_out(lab, far):
    client = Told(lab, CLIENT)
    for kind in ("tcp", "udp", "send"):
        for host, port, to, leaves in (
            ("0.0.0.0", 0, CLIENT4, HOST4),
            ("0.0.0.0", 5060, CLIENT4, HOST4),
            ("0.0.0.0", 40123, CLIENT4, HOST4),
            (HOST4, 0, CLIENT4, HOST4),
            (HOST4, 5061, CLIENT4, HOST4),
            ("::", 5062, CLIENT6, HOST6),
            (HOST6, 5063, CLIENT6, HOST6),
            (HOST6, 0, CLIENT6, HOST6),
        ):
            got = client.does(kind, host, port, to).split()
            assert len(got) == 7, (kind, host, port, got)
            before, name, again, after, after_name, seen, _seen_port = got
            assert (before, again, seen) == (host, "EINVAL", leaves), (kind, host, port, got)
            assert after == (leaves if kind != "send" else host), (kind, host, port, got)
            assert name == after_name, (kind, host, port, got)
            assert int(name) == port or not port, (kind, host, port, got)
    client.end()


def test_out_with_an_address_of_ones_own(lab, far):
    """It leaves from there, by a port that is nobody else's; the host's servers have all theirs."""
    lab.client("ip", "route", "add", f"{OWN4}/32", "via", HOST4, check=True)
    client = Told(lab, CLIENT, "--ip", OWN4)
    for host, port in (("0.0.0.0", 0), ("0.0.0.0", 5060), (OWN4, 0), (OWN4, 5061)):
        before, name, again, after, after_name, seen, _ = client.does("tcp", host, port, CLIENT4).split()
        assert (before, again, after, name, seen) == (host, "EINVAL", OWN4, after_name, OWN4)
        assert int(name) == port or not port
    client.end()
    lab.client("ip", "route", "del", f"{OWN4}/32", check=True)


def test_without_egress(lab):
    client = Told(lab, CLIENT, "--egress", "none")
    for kind in ("tcp", "udp", "send"):
        assert client.does(kind, "0.0.0.0", 5060, CLIENT4) in ("EADDRNOTAVAIL", "ENETUNREACH")
        assert client.does(kind, HOST4, 5060, CLIENT4) == "EADDRNOTAVAIL"
    client.end()


SEVERAL = """
import errno, socket
def tried(*what):
    try: return what[0](*what[1:]) or 'OK'
    except OSError as error: return errno.errorcode[error.errno]
def made(family=socket.AF_INET, option=None):
    s = socket.socket(family); s.settimeout(5)
    if option: s.setsockopt(socket.SOL_SOCKET, option, 1)
    return s
A, P = socket.SO_REUSEADDR, socket.SO_REUSEPORT
def two(one, first, other, second):
    a, b = made(*one), made(*other)
    told = [tried(a.bind, first), tried(b.bind, second), tried(a.listen), tried(b.listen)]
    a.close(); b.close()
    return told
I, S = (socket.AF_INET,), (socket.AF_INET6,)
print(two(I, ('', 80), I, ('', 80)), two(I, ('', 80), S, ('::', 80)), two(I, ('', 80), I, ('127.0.0.1', 80)))
print(two((*I, A), ('', 80), (*I, A), ('', 80)), two((*I, P), ('', 80), (*I, P), ('', 80)), two((*I, A), ('', 80), (*I, P), ('', 80)))
print(two(I, ('127.0.0.1', 80), I, ('127.0.0.2', 80)), two(I, ('127.0.0.2', 80), I, ('', 80)))
s = made(); s.bind(('', 0)); s.listen(); port = s.getsockname()[1]
c = made(); c.bind(('', 0)); mine = c.getsockname()[1]; c.connect(('127.0.0.1', port)); peer = s.accept()[1]
print(peer == ('127.0.0.1', mine), c.getsockname() == peer, c.getpeername() == ('127.0.0.1', port))
n = made(); n.setsockopt(0, 24, 1); n.bind(('', 0)); print(n.getsockname()[1], n.getsockopt(0, 24), made().getsockopt(0, 24), c.getsockopt(0, 24))
n.connect(('127.0.0.1', port)); print(n.getsockname() == s.accept()[1], n.getsockname()[1] > 0)
for address in ('::', '::ffff:0.0.0.0', '::1'):
    m = made(socket.AF_INET6); m.bind((address, 4100)); print(address, tried(m.setsockopt, 41, 26, 1), tried(m.listen), tried(m.bind, (address, 4101)))
    m.close()
t = made(); t.bind(('127.0.0.1', 0)); t.connect(t.getsockname()); print('itself', t.getsockname() == t.getpeername())
t = made(); t.bind(('', 4000)); t.connect(('127.0.0.1', 4000)); print('itself', t.getsockname() == t.getpeername())
"""


def test_what_is_in_the_way(own_lab):
    """Before and after a listen(), on the host and under graft: a bind that waits has the port."""
    there = own_lab.host(*python(SEVERAL), check=True).stdout  # in a namespace where nobody else has the ports
    assert "EADDRINUSE" in there
    for options in ((), ("--egress", "none"), ("--ip", OWN4), ("-p", "8480:80")):
        assert own_lab.graft("run", *options, *python(SEVERAL), check=True).stdout == there, options


ONE_REQUEST = """
import socket, sys
s = socket.socket(); s.bind(('', 80)); s.listen(); print('ready', flush=True)
for _ in range(2):
    c, _ = s.accept(); c.recv(9); c.sendall(b'served'); c.close()  # the server closes first: TIME_WAIT is its own
if any(sys.argv[1:]):
    s.close(); s = socket.socket(); s.bind(('', 80)); s.listen(); print('again', flush=True)
"""
REQUEST = f"import socket; c = socket.create_connection(('{HOST4}', 8481)); c.sendall(b'x'); print(c.recv(9).decode(), c.recv(9))"


def test_a_server_starts_again(lab):
    """Its old connections are in TIME_WAIT, and it does not set SO_REUSEADDR: in this container, and in the next one."""
    for argument in ("again", ""):
        server = lab.spawn_graft("-p", "8481:80", *python(ONE_REQUEST), argument, stdout=-1)
        assert server.stdout.readline() == "ready\n"
        for where in (lab.client, lab.host):
            assert where(*python(REQUEST), check=True).stdout == "served b''\n"
        assert server.communicate(timeout=20)[0] == ("again\n" if argument else "")
        assert "TIME-WAIT" in lab.host("ss", "-Htan", "sport = :8481").stdout


WORKERS = """
import os, socket, threading
for kind in (socket.AF_INET, socket.AF_INET6):
    for _ in range(30):
        s = socket.socket(kind); s.bind(('', 0)); told = []
        def listen():
            try: s.listen(); told.append('OK')
            except OSError as error: told.append(repr(error))
        threads = [threading.Thread(target=listen) for _ in range(6)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert told == ['OK'] * 6, told
        c = socket.create_connection(('127.0.0.1' if kind == socket.AF_INET else '::1', s.getsockname()[1]), 5)
        a, _ = s.accept(); a.close(); c.close(); s.close()
print('served')
"""


def test_workers_that_listen_on_what_they_inherit(lab):
    """At the same time: each listen() is right, and the server is reached."""
    assert lab.graft("run", *python(WORKERS), check=True, timeout=60).stdout == "served\n"


HELD = """
import errno, socket
def tried(s, *what):
    try: return s.bind(what) or 'OK'
    except OSError as error: return errno.errorcode[error.errno]
def udp(family=socket.AF_INET, share=0):
    s = socket.socket(family, socket.SOCK_DGRAM); s.setsockopt(1, 15, share); return s
for connected in (0, 1):
    for address in ('', '127.0.0.1'):
        for share in (0, 1):
            a, b = udp(share=share), udp(share=share)
            a.bind(('', 5000))
            if connected: a.connect((PEER, 9))
            print(connected, address, share, tried(b, address, 5000)); a.close()
            print(tried(udp(), address, 5000) if not share else '', end=' '); b.close()
"""


def test_a_udp_port_is_held(own_lab):
    """Also by a socket that is connected, and until the last one that shares it is closed."""
    code = f"PEER = {CLIENT4!r}\n{HELD}"
    assert own_lab.graft("run", *python(code), check=True).stdout == own_lab.host(*python(code), check=True).stdout
