"""A program binds the address that it was told, by getsockname() or its administrator: where it is published, narrower."""

import json

import pytest

from graft.bench.lab import CLIENT4, HOST4, HOST6, wait_for
from tests.conftest import python
from tests.system.told import Told

SECOND4 = "10.77.0.9"
BIND = """
import errno, socket, sys
held = []
for line in sys.stdin:
    kind, host, port = line.split()
    s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, {'tcp': 1, 'udp': 2}[kind])
    try:
        s.bind((host, int(port)))
        if kind == 'tcp': s.listen()
        held.append(s); print('bound', *s.getsockname()[:2], flush=True)
    except OSError as error: print(errno.errorcode[error.errno], flush=True)
"""


def places(lab, *what):
    """Where the host's stack has what listens: (address, port)."""
    told = lab.host("ss", "-Hn", *what).stdout.splitlines()
    return {line.split()[3] for line in told}


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_publication_holds_for_each_address(lab, kind):
    """Of both families; the socket is at that address alone, under the host's port."""
    program = Told(lab, BIND, "-p", f"8490:80/{kind}", "-p", f"{HOST4}:8491:81/{kind}")
    for host, shown in ((HOST4, f"{HOST4}:8490"), (HOST6, f"[{HOST6}]:8490")):
        assert program.does(kind, host, 80) == f"bound {host} 80"
        assert shown in places(lab, "-lt" if kind == "tcp" else "-lu")
    assert "0.0.0.0:8490" not in places(lab, "-lt" if kind == "tcp" else "-lu")
    assert program.does(kind, HOST4, 81) == f"bound {HOST4} 81"
    for host, port in ((SECOND4, 80), (CLIENT4, 80), ("192.0.2.1", 80), ("fd00:99::1", 80), ("224.0.0.251", 80)):
        assert program.does(kind, host, port) == "EADDRNOTAVAIL", (host, port)
    assert program.does(kind, HOST4, 80) == "EADDRINUSE"
    for host, port in ((HOST6, 81), (HOST4, 8080)):  # nobody publishes these: as on the wildcard
        assert program.does(kind, host, port) == f"bound {host} {port}"
        assert not any(place.endswith((f":{port}", f"{HOST6}]:8491")) for place in places(lab, "-lt" if kind == "tcp" else "-lu"))
    program.end()


def test_addresses_come_and_go(lab):
    program = Told(lab, BIND, "-p", "8492:80")
    assert program.does("tcp", SECOND4, 80) == "EADDRNOTAVAIL"
    device = json.loads(lab.host("ip", "-j", "-4", "route", "get", CLIENT4).stdout)[0]["dev"]
    for address, bits in ((SECOND4, 32), ("fd00:77::9", 128)):
        lab.host("ip", "address", "add", f"{address}/{bits}", "dev", device, "nodad" if ":" in address else "noprefixroute", check=True)
        wait_for(lambda: program.does("tcp", address, 80).startswith("bound"), "the address")  # noqa: B023 - asked at once
        lab.host("ip", "address", "del", f"{address}/{bits}", "dev", device, check=True)
        wait_for(lambda: program.does("tcp", address, 80) == "EADDRNOTAVAIL", "its end")  # noqa: B023 - likewise
    program.end()


def test_port_zero_of_a_hosts_address(lab):
    """As that of the wildcard: of UDP a port of the host's, to send from, at this address; of TCP a private one."""
    program = Told(lab, BIND)
    for host in (HOST4, HOST6):
        assert program.does("udp", host, 0).startswith(f"bound {host} ")
        assert program.does("tcp", host, 0).startswith(f"bound {host} ")
        assert program.does("tcp", host, 80) == f"bound {host} 80"
    assert not {place for place in places(lab, "-lt") if place.startswith((HOST4, f"[{HOST6}]"))}
    program.end()
    program = Told(lab, BIND, "--egress", "none")
    assert program.does("udp", HOST4, 0) == "EADDRNOTAVAIL"  # which addresses the host has is not its business
    assert not {place for place in places(lab, "-lu") if place.startswith(HOST4)}
    program.end()


PASSIVE = """
import socket
listener = socket.socket(socket.AF_INET6 if {six} else socket.AF_INET); listener.bind(('::' if {six} else '', 21)); listener.listen()
print('ready', flush=True)
control, peer = listener.accept()
told = control.getsockname()[0]
data = socket.socket(listener.family); data.bind((told, 30001)); data.listen()
control.sendall(data.getsockname()[0].encode() + b'\\n')
with data.accept()[0] as c: c.sendall(c.getsockname()[0].encode() + b' by the address that was told\\n')
"""
ASK = """
import socket, sys
c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); told = c.makefile().readline().strip()
print(told, socket.create_connection((told, int(sys.argv[2]) + 28001)).makefile().readline().strip())
"""


@pytest.mark.parametrize(("host", "port"), [(HOST4, 2121), (HOST6, 2221)])
def test_ftp_passive(lab, host, port):
    """The address of the control connection, bound for the data, at a published range."""
    server = lab.spawn_graft("-p", f"{port}:21", "-p", f"{port + 28000}-{port + 28009}:30000-30009", *python(PASSIVE.format(six=":" in host)), stdout=-1)
    assert server.stdout.readline() == "ready\n"
    assert lab.client(*python(ASK), host, str(port), check=True).stdout == f"{host} {host} by the address that was told\n"
    assert server.wait(20) == 0


TFTP = """
import socket
first = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); first.setsockopt(socket.IPPROTO_IP, 8, 1); first.bind(('', 69))
print('ready', flush=True)
data, told, _, client = first.recvmsg(99, 99)
asked = socket.inet_ntoa(told[0][2][8:12])
answer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); answer.bind((asked, 0)); answer.settimeout(10)
answer.sendto(b'block 1', client)
print(answer.recvfrom(99)[0].decode(), answer.getsockname()[0] == asked)
"""
FETCH = """
import socket, sys
c = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); c.settimeout(10); c.bind(('', 0)); c.sendto(b'read', (sys.argv[1], int(sys.argv[2])))
block, server = c.recvfrom(99); print(block.decode(), server[0], server[1] != int(sys.argv[2])); c.sendto(b'acknowledged', server)
"""


def test_tftp(lab):
    """A new socket for each transfer, at the address that was asked, port 0 (RFC 1350, 4)."""
    server = lab.spawn_graft("-p", "6969:69/udp", *python(TFTP), stdout=-1)
    assert server.stdout.readline() == "ready\n"
    assert lab.client(*python(FETCH), HOST4, "6969", check=True).stdout == f"block 1 {HOST4} True\n"
    assert server.communicate(timeout=20)[0] == "acknowledged True\n"


def test_tftp_inside_a_container_with_an_address(lab):
    """The server is told its own address, and binds it; who has asked at 127.0.0.1 answers the address that it sees."""
    server = lab.spawn_graft("--name", "tftp", "--ip", "10.99.0.7", *python(TFTP), stdout=-1)
    assert server.stdout.readline() == "ready\n"
    told = lab.graft("run", "--netns", "tftp", *python(FETCH), "127.0.0.1", "69", check=True).stdout
    assert told == "block 1 10.99.0.7 True\n"
    assert server.communicate(timeout=20)[0] == "acknowledged True\n"


DUAL = """
import socket
s = socket.socket(socket.AF_INET6); s.bind(('::', 80)); s.listen(); print('ready', flush=True)
for _ in range(3):
    c, peer = s.accept(); c.sendall(f'{c.getsockname()[0]} {c.getsockname()[1]} {peer[0]}'.encode()); c.close()
"""
DIAL = "import socket, sys; print(socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).recv(99).decode())"


@pytest.mark.parametrize(("first", "second"), [("127.0.0.1:8494", "[::1]:8494"), (f"{HOST4}:8495", f"[{HOST6}]:8496")])
def test_one_listener_at_two_addresses(lab, first, second):
    """One of each family, and a server on [::]: a socket has one address, and is reached at both; also from inside."""
    server = lab.spawn_graft("--name", "dual", "-p", f"{first}:80", "-p", f"{second}:80", *python(DUAL), stdout=-1)
    assert server.stdout.readline() == "ready\n"
    four, six = (where.rpartition(":")[0].strip("[]") for where in (first, second))
    assert lab.host(*python(DIAL), four, first.rpartition(":")[2], check=True).stdout == f"::ffff:{four} 80 ::ffff:{four}\n"
    assert lab.host(*python(DIAL), six, second.rpartition(":")[2], check=True).stdout == f"{six} 80 {six}\n"
    assert lab.graft("run", "--netns", "dual", *python(DIAL), "::1", "80", check=True).stdout == "::1 80 ::1\n"
    assert server.wait(20) == 0
    refused = lab.host(*python(DIAL), six, second.rpartition(":")[2])
    assert "ConnectionRefusedError" in refused.stderr
