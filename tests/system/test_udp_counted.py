"""`count_datagrams` of graft.toml: what containers carry by UDP, in `graft stats`, `graft top` and the metrics."""

import json
import subprocess

from graft.bench.lab import HOST4, HOST6, wait_for
from tests.conftest import python

ECHO = "import socket\ns = socket.socket({family}, 2); s.bind(('', 53)); print('ready', flush=True)\nwhile True: d, a = s.recvfrom(9999); s.sendto(d[:100], a)\n"
ASK = "import socket, sys\ns = socket.socket({family}, 2); s.settimeout(5)\nfor n in range(int(sys.argv[1])): s.sendto(b'x' * 1000, ({host!r}, {port})); s.recv(9999)\n{then}"


def told(lab):
    return {one["name"]: one["udp"] for one in json.loads(lab.graft("stats", "-j").stdout)}


def test_datagrams(own_lab):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    servers = [own_lab.spawn_graft("--name", f"v{6 if family == 10 else 4}", *mode, "-p", f"{port}:53/udp", *python(ECHO.format(family=family)), **pipes) for family, port, mode in ((2, 5340, ()), (10, 5360, ("--direct",)))]
    for server in servers:
        assert server.stdout.readline() == "ready\n"
    own_lab.client(*python(ASK.format(family=2, host=HOST4, port=5340, then="")), "5", check=True)
    assert set(told(own_lab)["v4"].values()) == {0}, "nobody has asked for it"
    own_lab.config.write_text("count_datagrams = true\n")

    def counts():
        own_lab.client(*python(ASK.format(family=2, host=HOST4, port=5340, then="")), "1", check=True)
        return any(told(own_lab)["v4"].values())

    wait_for(counts, "the count")
    before = told(own_lab)
    own_lab.client(*python(ASK.format(family=2, host=HOST4, port=5340, then="")), "20", check=True)
    own_lab.client(*python(ASK.format(family=10, host=HOST6, port=5360, then="")), "30", check=True)
    client = own_lab.spawn_graft("--name", "client", *python(ASK.format(family=2, host=HOST4, port=5340, then="print('done', flush=True); sys.stdin.read()")), "7", **pipes)
    assert client.stdout.readline() == "done\n"
    now = told(own_lab)
    grown = {name: {what: count - before.get(name, {}).get(what, 0) for what, count in one.items()} for name, one in now.items()}
    assert grown == {
        "v4": {"bytes_received": 27_000, "bytes_sent": 2700, "received": 27, "sent": 27},
        "v6": {"bytes_received": 30_000, "bytes_sent": 3000, "received": 30, "sent": 30},
        "client": {"bytes_received": 700, "bytes_sent": 7000, "received": 7, "sent": 7},
    }
    row = next(line.split() for line in own_lab.graft("stats").stdout.splitlines() if line.startswith("client"))
    assert "700/6.8K" in row
    for process in (*servers, client):
        own_lab.end(process)


def test_the_rate_is_shown(lab):
    one = lab.spawn_graft("--name", "paced", "--limit", "rate=16mbit", "sleep", "30")
    wait_for(lambda: "paced" in lab.graft("ps").stdout, "the container")
    head, row = lab.graft("stats").stdout.splitlines()
    assert "LIMIT" in head
    assert "1.9M/s" in row
    lab.end(one)
