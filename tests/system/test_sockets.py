"""`graft sockets`: what is open, as its program asked for it and as the host's stack has it."""

import json
import subprocess

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, wait_for
from tests.conftest import python

CODE = """
import socket, sys
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', 80)); s.listen(9)
t = socket.socket(10); t.bind(('::1', 5000)); t.listen(9)
c = socket.socket(10); c.connect(('::1', 5000)); p, _ = t.accept(); c.send(b'x' * 1000); p.recv(1000, 256)
u = socket.socket(2, 2); u.bind(('0.0.0.0', 5353)); v = socket.socket(2, 2); v.bind(('127.0.0.1', 54)); w = socket.socket(2, 2); w.bind(('0.0.0.0', 53))
o = socket.create_connection((sys.argv[1], 8491))
print('ready', flush=True)
a, _ = s.accept(); a.send(b'y' * 5000); a.recv(10, 256)
print('done', flush=True)
sys.stdin.read()
"""
CLIENT = f"""
import socket, sys
s = socket.create_connection(('{HOST4}', int(sys.argv[1]))); s.recv(5000, 256); s.send(b'z' * 10)
sys.stdin.read()
"""
SERVER = "import socket; s = socket.create_server(('', 8491)); a, _ = s.accept(); a.recv(1)"


def shown(lab, *name):
    told = lab.graft("sockets", "-j", *name)
    assert told.returncode == 0, told.stderr
    return json.loads(told.stdout)


@pytest.fixture
def busy(lab):
    """A container with a socket of each kind, and a client that it has answered."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = lab.spawn(*python(SERVER), client=True)
    wait_for(lambda: ":8491" in lab.client("ss", "-tln").stdout, "the server")
    one = lab.spawn_graft("--name", "busy", "-p", "8490:80", "-p", "8492:53/udp", *python(CODE), CLIENT4, **pipes)
    assert one.stdout.readline() == "ready\n"
    client = lab.spawn(*python(CLIENT), "8490", client=True, stdin=subprocess.PIPE)
    assert one.stdout.readline() == "done\n"
    yield one
    for process in (one, client, server):
        lab.end(process)


def test_what_is_open(lab, busy):
    found = shown(lab, "busy")
    assert {one["container"] for one in found} == {"busy"}
    assert all(one["processes"] == [{"pid": busy.pid, "command": "python3"}] for one in found)
    tcp = {(one["state"], one["local"].rpartition(":")[2]): one for one in found if one["protocol"] == "tcp"}
    assert tcp["LISTEN", "80"].items() >= {"local": "0.0.0.0:80", "local_real": "0.0.0.0:8490", "peer": ""}.items()
    assert tcp["LISTEN", "5000"]["local"] == "[::1]:5000"
    assert tcp["LISTEN", "5000"]["local_real"].startswith("[fd67:7261:6674:")
    accepted = tcp["ESTAB", "80"]
    assert accepted.items() >= {
        "local": f"{HOST4}:80", "local_real": f"{HOST4}:8490", "accepted": True, "bytes_sent": 5000, "bytes_received": 10,
    }.items()  # fmt: skip
    assert accepted["peer"].startswith(f"{CLIENT4}:")
    assert accepted["segments_sent"] > 0
    assert accepted["idle"] < 30
    inner = tcp["ESTAB", "5000"]
    assert inner.items() >= {"local": "[::1]:5000", "bytes_received": 1000}.items()
    assert inner["peer"].startswith("[::1]:")
    out = next(one for one in found if one["peer"] == f"{CLIENT4}:8491")
    assert out.items() >= {"state": "ESTAB", "peer_real": f"{CLIENT4}:8491", "accepted": False}.items()
    udp = {one["local"]: one for one in found if one["protocol"] == "udp"}
    assert set(udp) == {"0.0.0.0:5353", "127.0.0.1:54", "0.0.0.0:53"}
    assert udp["0.0.0.0:53"]["local_real"] == "0.0.0.0:8492"
    assert udp["127.0.0.1:54"]["local_real"].startswith("127.")
    assert {one["state"] for one in udp.values()} == {"UNCONN"}


def test_as_a_table(lab, busy):
    head, *rows = lab.graft("sockets").stdout.splitlines()
    assert head.split() == ["CONTAINER", "PROTO", "STATE", "LOCAL", "PEER", "SENT", "RECEIVED", "IDLE", "PROCESS"]
    row = next(row for row in rows if f"{HOST4}:80 ({HOST4}:8490)" in row)
    assert row.split()[0:3] == ["busy", "tcp", "ESTAB"]
    assert row.endswith(f"python3[{busy.pid}]")
    assert " 4.9K  10 " in row


def test_of_another_container_nothing(lab, busy):
    other = lab.spawn_graft("--name", "idle", "--ip", "10.88.0.9", *python("import socket, sys; s = socket.socket(2, 2); s.bind(('0.0.0.0', 5)); print(flush=True); sys.stdin.read()"),
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    other.stdout.readline()
    (only,) = shown(lab, "idle")
    assert only.items() >= {"container": "idle", "protocol": "udp"}.items()
    assert {one["container"] for one in shown(lab)} == {"busy", "idle"}
    lab.end(other)
    lab.refused((GRAFT, "sockets", "nobody"), 1, "no container named 'nobody'")
