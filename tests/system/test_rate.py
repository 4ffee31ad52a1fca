"""`graft run --limit rate=`: how fast each TCP socket may send, made, accepted and moved; and no way around it."""

import json
import os
import subprocess
import time

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, wait_for
from tests.conftest import python

RATE = "16mbit"  # 2 MB a second
SIZE = 3_000_000
# what comes of it: seconds to send SIZE bytes, for each socket
SEND = """
import errno, socket, sys, time
def go(sock):
    began = time.monotonic(); sock.sendall(b'x' * {size}); sock.shutdown(1); sock.recv(1)
    print(time.monotonic() - began, sock.getsockopt(1, 47), flush=True)
"""
OUT = SEND + "go(socket.create_connection((sys.argv[1], int(sys.argv[2]))))\n"
IN = SEND + "s = socket.create_server(('', 80)); print('ready', flush=True)\ngo(s.accept()[0])\n"
AROUND = """
import errno, socket, struct, sys
def tries(sock):
    for value in (struct.pack('=I', 0xffffffff), struct.pack('=Q', 1 << 40), struct.pack('=I', 2000001), struct.pack('=I', 1000000)):
        try: sock.setsockopt(1, 47, value); print('set', flush=True)
        except OSError as error: print(errno.errorcode[error.errno], flush=True)
"""
DRAIN = "import socket, sys\ns = socket.create_server(('', 8495)); print('ready', flush=True)\nwhile True:\n a, _ = s.accept()\n while a.recv(1 << 20): pass\n a.close()\n"
PULL = "import socket, sys\ns = socket.create_connection((sys.argv[1], 8496))\nwhile s.recv(1 << 20): pass\n"


@pytest.fixture
def drain(lab):
    """Somebody on another machine who takes all that comes."""
    server = lab.spawn(*python(DRAIN), client=True, stdout=subprocess.PIPE)
    assert server.stdout.readline() == "ready\n"
    yield
    lab.end(server)


def seconds(text):
    return float(text.split()[0])


def test_a_connection_out(lab, drain):
    free = seconds(lab.graft("run", *python(OUT.format(size=SIZE)), CLIENT4, "8495", check=True).stdout)
    paced = lab.graft("run", "--limit", f"rate={RATE}", *python(OUT.format(size=SIZE)), CLIENT4, "8495", check=True).stdout
    assert seconds(paced) > 1.0, "3 MB at 2 MB a second"
    assert seconds(paced) > 2 * free
    assert paced.split()[1] == "2000000"


def test_an_accepted_connection(lab):
    server = lab.spawn_graft("--limit", f"rate={RATE}", "-p", "8496:80", *python(IN.format(size=SIZE)), stdout=subprocess.PIPE)
    assert server.stdout.readline() == "ready\n"
    open_ = json.loads(lab.graft("sockets", "-j", check=True).stdout)
    assert [one["rate"] for one in open_ if (one["state"], one["local_real"]) == ("LISTEN", "0.0.0.0:8496")] == [2_000_000]
    lab.client(*python(PULL), HOST4, check=True)
    told = server.stdout.readline()
    assert seconds(told) > 1.0
    assert told.split()[1] == "2000000"
    lab.end(server)


def test_no_program_gives_itself_more(lab, drain):
    code = AROUND + "s = socket.create_connection((sys.argv[1], 8495)); tries(s)"
    wanted = ["EPERM"] * 3 + ["set"]
    assert lab.graft("run", "--limit", f"rate={RATE}", *python(code), CLIENT4).stdout.split() == wanted
    assert lab.graft("run", *python(code), CLIENT4).stdout.split() == ["set"] * 4, "without a limit it is the program's"
    server = lab.spawn_graft("--limit", f"rate={RATE}", "-p", "8496:80", *python(AROUND + "s = socket.create_server(('', 80)); print('ready', flush=True); tries(s.accept()[0])"),
                             stdout=subprocess.PIPE)  # fmt: skip
    assert server.stdout.readline() == "ready\n"
    lab.client(*python(PULL), HOST4)
    assert server.stdout.read().split() == wanted
    lab.end(server)


def test_a_wrapper_inside_has_it_as_well(lab, drain):
    lab.add_endpoints({"ep-rate": f"type ipv4 addr {HOST4} port dynamic"})
    try:
        done = lab.graft("run", "--limit", f"rate={RATE}", "-e", "0.0.0.0/0=ep-rate", GRAFT, "-e", "0.0.0.0/0=ep-rate", "--", *python(OUT.format(size=1000)), CLIENT4, "8495")
        if lab.env["GRAFT_DIRECT"] == "on":
            assert "no wrapper inside can change" in done.stderr
        else:
            assert done.stdout.split()[1] == "2000000", done.stderr
    finally:
        lab.graft("endpoint", "del", "ep-rate")


def test_it_is_shown(lab):
    one = lab.spawn_graft("--name", "paced", "--limit", f"sockets=50,rate={RATE}", "sleep", "30")
    wait_for(lambda: "paced" in lab.graft("ps").stdout, "the container")
    seen = json.loads(lab.graft("inspect", "paced").stdout)
    assert seen["rate"] == 2_000_000
    assert seen["limits"]["sockets"]["max"] == 50
    done = lab.graft("top", "-n", "1", "-d", "0.2", env={**lab.env, "COLUMNS": "150"})
    assert any(line.split()[:1] == ["paced"] and line.endswith("1.9M/s") for line in map(str.rstrip, done.stdout.splitlines()))
    lab.end(one)


def test_it_outlives_graftd(own_lab):
    own_lab.spawn_graft("--name", "paced", "--limit", f"rate={RATE}", "sleep", "60")
    wait_for(lambda: "paced" in own_lab.graft("ps").stdout, "the container")
    own_lab.graft("ps")
    os.kill(own_lab.daemon_pid(), 9)
    time.sleep(0.5)
    assert json.loads(wait_for(lambda: own_lab.graft("inspect", "paced").stdout, "graftd"))["rate"] == 2_000_000


@pytest.mark.parametrize("text", ["rate=", "rate=100", "rate=5mb", "rate=-1mbit", "rate=1bit", "rate=1000gbit", "rate=1.5mbit"])
def test_what_is_no_rate(lab, text):
    lab.refused((GRAFT, "run", "--limit", text, "true"), 2, f"limit '{text}': not ")


OVER_A_PAGE = """
import ctypes, mmap, os, signal, socket, struct
text = mmap.mmap(-1, 8192); place = ctypes.c_char.from_buffer(text); libc = ctypes.CDLL(None)
child = os.fork()
while not child:
    text[:8] = bytes(8); text[:8] = b'\\xff' * 8
with socket.socket() as s:
    s.setsockopt(1, 47, 1000); most = 0
    for _ in range(30000):
        libc.setsockopt(s.fileno(), 1, 47, ctypes.byref(place), 8192)
        most = max(most, struct.unpack('=Q', s.getsockopt(1, 47, 8))[0])
os.kill(child, signal.SIGKILL)
print(most)
"""


def test_a_value_that_is_longer_than_a_page_is_read_once(lab):
    """The kernel reads the program's memory again, where the policy has left the length as it was."""
    told = lab.graft("run", "--limit", f"rate={RATE}", *python(OVER_A_PAGE), check=True)
    assert int(told.stdout) <= 2_000_000
