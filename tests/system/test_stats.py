"""`graft stats` and the page of metrics: what containers have carried and been refused, of both modes."""

import json
import os
import subprocess
import time

import pytest

from graft.bench.lab import CLIENT4, GRAFT, GRAFTD, HOST4, SLOWNESS, wait_for
from tests.conftest import need, python

SERVER = """
import socket, sys
s = socket.create_server(('', 80)); print('ready', flush=True)
while True:
    a, _ = s.accept(); a.sendall(b'y' * 5000)
    try:
        while a.recv(9999): pass
    except OSError: pass
    a.close()
"""
CLIENT = """
import socket, sys
for n in range(int(sys.argv[2])):
    c = socket.create_connection((sys.argv[1], int(sys.argv[3]))); c.sendall(b'z' * 300); got = 0
    while got < 5000: got += len(c.recv(9999))
    c.shutdown(1); c.recv(1); c.close()
for n in range(3):
    try: socket.socket().bind(('203.0.113.1', 5))
    except OSError: pass
c = socket.create_connection((sys.argv[1], int(sys.argv[3]))); c.sendall(b'z' * 7); c.recv(1, 2)
print('done', flush=True)
sys.stdin.read()
"""


def told(lab):
    done = lab.graft("stats", "-j")
    assert done.returncode == 0, done.stderr
    return {one["name"]: one for one in json.loads(done.stdout)}


def test_what_was_carried(lab):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = lab.spawn_graft("--name", "server", "-p", "8493:80", *python(SERVER), **pipes)
    assert server.stdout.readline() == "ready\n"
    client = lab.spawn_graft("--name", "client", *python(CLIENT), HOST4, "20", "8493", **pipes)
    assert client.stdout.readline() == "done\n"
    found = wait_for(lambda: (f := told(lab))["server"]["accepted"] == 21 and f, "21 connections")
    one, other = found["server"], found["client"]
    assert (one["open_in"], one["open_out"], one["connected"]) == (1, 0, 0)
    assert (other["open_in"], other["open_out"], other["connected"], other["accepted"]) == (0, 1, 21, 0)
    assert one["received"] == other["sent"] == 20 * 301 + 7, "the kernel counts a FIN as a byte"
    assert one["sent"] == 21 * 5000
    assert 20 * 5000 <= other["received"] <= 21 * 5001
    assert one["segments_sent"] > 20
    assert other["refused"] == [{"op": "bind", "reason": "no ingress rule", "count": 3}]
    assert one["sockets"] >= 1
    assert one["trapped_calls"] >= 1
    assert one["trapped_calls"] - sum(one["trapped_call_buckets"]) in (0, 1), "a call is counted before its time is"
    assert one["trapped_call_seconds"] > 0
    assert one["memory"] > 100_000
    rows = {row.split()[0]: row.split() for row in lab.graft("stats").stdout.splitlines()}
    assert rows["server"][2:4] == ["1/0", "21/0"]
    assert rows["client"][8] == "3"
    lab.end(client)
    wait_for(lambda: told(lab)["server"]["open_in"] == 0, "the connection's end")
    last = told(lab)["server"]
    assert last["accepted"] == 21, "a connection counts once, open or closed"
    assert 20 * 301 + 7 <= last["received"] <= 20 * 301 + 8, "it ends by a FIN or by a reset"
    lab.end(server)


def test_inside_a_container(lab):
    """Connections of a container to itself, over its loopback: both ends are its own."""
    code = (
        "import socket, sys\ns = socket.create_server(('127.0.0.1', 5000))\n"
        "for n in range(5):\n c = socket.create_connection(('127.0.0.1', 5000)); a, _ = s.accept(); c.send(b'x' * 10); a.recv(10); c.close(); a.close()\n"
        "print(flush=True); sys.stdin.read()"
    )
    one = lab.spawn_graft("--name", "self", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    one.stdout.readline()
    found = told(lab)["self"]
    assert (found["accepted"], found["connected"], found["received"], found["sent"]) == (5, 5, 55, 50)
    lab.end(one)


def test_a_connection_that_was_refused_is_none(lab):
    code = f"import socket, sys\nfor n in range(3):\n try: socket.create_connection(('{CLIENT4}', 9))\n except OSError: pass\nprint(flush=True); sys.stdin.read()"
    one = lab.spawn_graft("--name", "none", *python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    one.stdout.readline()
    assert told(lab)["none"]["connected"] == 0
    lab.end(one)


def test_top(lab):
    code = "import socket, sys, time\nwhile True:\n try: socket.socket().bind(('203.0.113.1', 5))\n except OSError: pass\n time.sleep(.01)"
    one = lab.spawn_graft("--name", "refused", *python(code))
    idle = lab.spawn_graft("--name", "idle", "sleep", "60")
    wait_for(lambda: all(name in lab.graft("ps").stdout for name in ("refused", "idle")), "the containers")
    done = lab.graft("top", "-n", "2", "-d", "0.5", "-s", "refused", env={**lab.env, "COLUMNS": "140"})
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] in (["refused"], ["idle"])]
    assert [row[0] for row in rows[-2:]] == ["refused", "idle"]
    assert 10 < int(rows[-2][7]) <= 100
    assert int(rows[-1][7]) == 0
    narrow = lab.graft("top", "-n", "3", "-d", "0.2", env={**lab.env, "COLUMNS": "80"}).stdout
    assert narrow.count("REFUSED/s") == narrow.count("\nidle ") == 3, "a whole table for each look"
    for words in (("top", "-d"), ("rule", "move", "-p", "1:1", "--from", "a", "--to", "b", "--wait")):
        lab.refused((GRAFT, *words, "nan"), 2, ": nan is not in the range 0")
    lab.end(one)
    lab.end(idle)


@pytest.fixture
def metrics(own_lab):
    own_lab.env["GRAFT_METRICS"] = "127.0.0.1:9435"
    keeps = own_lab.spawn_graft("--name", "keeps", "sleep", "100")
    wait_for(lambda: "keeps" in own_lab.graft("ps").stdout, "the container")
    yield own_lab
    own_lab.end(keeps)


def fetch(lab, *options):
    return lab.host("curl", "-sS", "-m", "10", *options, check=True).stdout


def test_the_page(metrics):
    need("promtool")
    text = fetch(metrics, "http://127.0.0.1:9435/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert 'graft_sockets{container="keeps",protocol="tcp"} 0\n' in text
    assert "graft_containers 1\n" in text
    head = fetch(metrics, "-o", "/dev/null", "-D", "-", "-H", "Accept: application/openmetrics-text; version=1.0.0", "http://127.0.0.1:9435/metrics")
    assert "application/openmetrics-text; version=1.0.0" in head
    assert fetch(metrics, "-o", "/dev/null", "-w", "%{http_code}", "http://127.0.0.1:9435/else") == "404"
    assert fetch(metrics, "-o", "/dev/null", "-w", "%{http_code}", "-X", "POST", "http://127.0.0.1:9435/metrics") == "405"
    assert metrics.client("curl", "-sS", "-m", "3", f"http://{HOST4}:9435/metrics").returncode == 7, "it is on the loopback"
    inside = metrics.graft("run", "curl", "-sS", "-m", "3", "http://127.0.0.1:9435/metrics")
    assert inside.returncode == 7, "a container's loopback is its own"


def test_who_does_not_read_or_write_is_closed(metrics):
    """graftd goes on meanwhile, and such a peer is gone after ten seconds."""
    code = (
        "import socket, time\ns = [socket.create_connection(('127.0.0.1', 9435)) for n in range(60)]\n"
        "began = time.monotonic(); s[0].settimeout(30); print(s[0].recv(1), 5 < time.monotonic() - began < 20)"
    )
    slow = metrics.spawn(*python(code), stdout=subprocess.PIPE)
    time.sleep(1)
    began = time.monotonic()
    assert metrics.graft("ps").returncode == 0
    assert time.monotonic() - began < 5 * SLOWNESS
    assert slow.communicate(timeout=60)[0] == "b'' True\n"
    assert "graft_containers 1\n" in fetch(metrics, "http://127.0.0.1:9435/metrics")


def test_who_holds_all_connections_keeps_nobody_out(metrics):
    """Any user of the host can connect there, and say nothing."""
    code = "import socket, time\nheld = [socket.create_connection(('127.0.0.1', 9435)) for _ in range(64)]\nprint('held', flush=True); time.sleep(60)"
    holder = metrics.spawn(*python(code), stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    for _ in range(3):
        assert "graft_containers 1\n" in fetch(metrics, "http://127.0.0.1:9435/metrics")
    metrics.end(holder)


def test_graftd_goes_on_with_its_page(metrics):
    """It is there again when graftd is started anew, also where another program has had the port meanwhile."""
    os.kill(metrics.daemon_pid(), 9)
    wait_for(lambda: metrics.host("curl", "-sS", "http://127.0.0.1:9435/metrics").returncode == 0, "the page")
    assert metrics.graft("ps").returncode == 0


def test_at_a_path(own_lab):
    path = f"{own_lab.work}/metrics.sock"
    own_lab.env["GRAFT_METRICS"] = path
    keeps = own_lab.spawn_graft("--name", "keeps", "sleep", "100")
    wait_for(lambda: "keeps" in own_lab.graft("ps").stdout, "the container")
    assert "graft_containers 1\n" in fetch(own_lab, "--unix-socket", path, "http://graft/metrics")
    assert os.stat(path).st_mode & 0o777 == 0o660
    own_lab.end(keeps)


def test_bad_addresses(own_lab):
    own_lab.refused((GRAFTD, "--metrics", "0.0.0.0:9435"), 2, "--metrics 0.0.0.0:9435 is not on the loopback")
    own_lab.refused((GRAFTD, "--metrics", "nonsense"), 2, "is no address")
    own_lab.refused((GRAFTD, "--metrics-public"), 2, "--metrics-public goes with --metrics")
    holder = own_lab.spawn("/usr/bin/python3", "-c", "import socket; s = socket.create_server(('127.0.0.1', 9436)); print(flush=True); input()", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    own_lab.refused((GRAFTD, "--metrics", "127.0.0.1:9436"), 1, "metrics: 127.0.0.1:9436: Address already in use")
    file = own_lab.work / "file"
    file.write_text("mine")
    own_lab.refused((GRAFTD, "--metrics", file), 1, f"metrics: {file} is there, and no socket (name a path that is free)")
    assert file.read_text() == "mine"
    argv = ("env", "GRAFT_METRICS=0.0.0.0:9435", GRAFTD)
    own_lab.refused(argv, 1, "metrics: GRAFT_METRICS 0.0.0.0:9435 is not on the loopback: everybody who reaches it could read it (127.0.0.1:9435, or add GRAFT_METRICS_PUBLIC=1)")
    own_lab.end(holder)
