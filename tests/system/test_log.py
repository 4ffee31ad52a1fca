"""`graft log`: what is decided, told as it is decided; a flood of refusals and a reader that does not read."""

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import pytest

from graft.bench.lab import CLIENT4, GRAFT, HOST4, ROOT, wait_for
from tests.conftest import python

CONNECT = """
import socket, sys
for where in sys.argv[1:]:
    address, port = where.rsplit('_', 1)
    s = socket.socket(); s.settimeout(5)
    try: s.connect((address, int(port)))
    except OSError: pass
    s.close()
"""
SEVERAL = """
import socket, sys, time
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', 80)); s.listen(9)
u = socket.socket(2, 2); u.sendto(b'x', (sys.argv[1], 9))
t = socket.socket(); t.bind(('127.0.0.1', 5000)); t.listen(9)
c = socket.socket(); c.connect(('127.0.0.1', 5000))
print('done', flush=True)
time.sleep(float(sys.argv[2]))
"""
FLOOD = """
import socket, sys, time
until = time.monotonic() + float(sys.argv[1]); count = 0
s = socket.socket(2, 2)
while time.monotonic() < until:
    try: s.sendto(b'x', ('198.51.100.1', 9))
    except OSError: count += 1
print(count, flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def reading(lab, *options):
    """A `graft log -f` that reads already; what it has printed is what it returns."""
    before = readers(lab)
    process = lab.spawn(GRAFT, "log", "-f", *options, stdout=subprocess.PIPE)
    wait_for(lambda: readers(lab) > before or process.poll() is not None, "a reader", timeout=10)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(10)
        wait_for(lambda: readers(lab) == before, "the reader's end")


def readers(lab):
    """How many processes read the log: connections to graftd.sock that stay."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from graft.client import call; print(call('status')['readers'])"
    told = lab.host(sys.executable, "-I", "-c", code)
    return int(told.stdout) if told.returncode == 0 else 0


def test_refusals_are_kept_and_shown(lab):
    process = lab.spawn_graft("--name", "refused", "--egress", "none", *python(CONNECT + "import time; time.sleep(20)"), f"{CLIENT4}_9")
    lines = wait_for(lambda: lab.graft("log", "refused", "-j").stdout.splitlines(), "a refusal")
    told = json.loads(lines[-1])
    assert told.items() >= {
        "container": "refused", "op": "connect", "protocol": "tcp", "asked": f"{CLIENT4}:9", "verdict": "refused",
        "errno": "ENETUNREACH", "rule": "outside the egress rules", "became": "",
    }.items()  # fmt: skip
    assert told["command"].startswith("python3")
    assert told["pid"] == process.pid
    assert abs(told["time"] - time.time()) < 30
    assert re.fullmatch(
        rf"\d\d:\d\d:\d\d\.\d\d\d refused +python3\[{process.pid}\] +connect tcp {CLIENT4}:9: refused ENETUNREACH, "
        "outside the egress rules\n",
        lab.graft("log").stdout.splitlines(keepends=True)[-1],
    )
    lab.end(process)


def test_all_that_is_decided(lab):
    process = lab.spawn_graft("--name", "seen", "-p", "8480:80", "sh", "-c", 'read x; exec "$@"', "-", *python(SEVERAL), CLIENT4, "20",
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    wait_for(lambda: "seen" in lab.graft("ps").stdout, "the container")
    with reading(lab, "--all", "-j", "seen") as log:
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
        told = [json.loads(log.stdout.readline()) for _ in range(6)]
    lab.end(process)
    seen = [(t["op"], t["protocol"], t["asked"], t["rule"], t["endpoint"], t["verdict"]) for t in told]
    assert seen == [
        ("bind", "tcp", "0.0.0.0:80", "publish 8480:80/tcp", "tcp-8480", "allowed"),
        ("listen", "tcp", "0.0.0.0:80", "publish 8480:80/tcp", "tcp-8480", "allowed"),
        ("send", "udp", f"{CLIENT4}:9", "egress host", "", "allowed"),
        ("bind", "tcp", "127.0.0.1:5000", "loopback", "", "allowed"),
        ("listen", "tcp", "127.0.0.1:5000", "loopback", "", "allowed"),
        ("connect", "tcp", "127.0.0.1:5000", "loopback", "", "allowed"),
    ]
    assert told[0]["became"] == "0.0.0.0:8480"
    assert {t["pid"] for t in told if t["op"] != "listen"} == {process.pid}
    assert told[5]["became"].startswith("127.")
    assert told[5]["became"] == told[3]["became"], "it goes to where the server is"


def test_by_which_endpoint(lab):
    lab.add_endpoints({"ep-log": f"type ipv4 addr {HOST4} port dynamic"})
    try:
        process = lab.spawn_graft("--name", "by", "-e", "0.0.0.0/0=ep-log", "sh", "-c", 'read x; exec "$@"', "-", *python(CONNECT + "import time; time.sleep(20)"),
                                  f"{CLIENT4}_9", stdin=subprocess.PIPE)  # fmt: skip
        wait_for(lambda: "by" in lab.graft("ps").stdout, "the container")
        with reading(lab, "--all") as log:
            process.stdin.write("go\n")
            process.stdin.flush()
            line = log.stdout.readline()
        assert f"connect tcp {CLIENT4}:9 from ep-log ({HOST4}:dynamic): allowed, egress 0.0.0.0/0=ep-log" in line
        lab.end(process)
    finally:
        lab.graft("endpoint", "del", "ep-log")


def test_nothing_that_is_allowed_without_all(lab):
    process = lab.spawn_graft("--name", "quiet", "--egress", "none", "sh", "-c", 'read x; exec "$@"', "-",
                              *python("import socket; socket.socket().bind(('127.0.0.1', 5))\n" + CONNECT), f"{CLIENT4}_9", stdin=subprocess.PIPE)  # fmt: skip
    wait_for(lambda: "quiet" in lab.graft("ps").stdout, "the container")
    with reading(lab, "-j", "quiet") as log:
        process.communicate("go\n", timeout=20)
        told = [json.loads(line) for line in log.stdout]
    assert [(t["op"], t["verdict"]) for t in told] == [("connect", "refused")], "and it ends with the container"
    assert log.returncode == 0


def test_a_flood_is_bounded_and_counted(lab):
    process = lab.spawn_graft("--name", "flood", "--egress", "none", "sh", "-c", 'read x; exec "$@"', "-", *python(FLOOD), "2", "30",
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    wait_for(lambda: "flood" in lab.graft("ps").stdout, "the container")
    with reading(lab, "-j", "flood") as log:
        process.stdin.write("go\n")
        process.stdin.flush()
        bound = 64 * (2 / 0.134 + 2)
        count = int(process.stdout.readline())
        seen = wait_for(lambda: json.loads(lab.graft("inspect", "flood").stdout), "inspect")
        lines = [json.loads(log.stdout.readline())]
        while sum(line.get("dropped", 0) for line in lines) < seen["unreported"]:
            lines.append(json.loads(log.stdout.readline()))
    lab.end(process)
    assert seen["refused"] == [{"op": "send", "reason": "outside the egress rules", "count": count}]
    told = [line for line in lines if "op" in line]
    assert seen["unreported"] >= count - bound
    assert seen["unreported"] + len(told) + sum(line.get("lost", 0) for line in lines) == count


def test_a_reader_that_does_not_read_costs_nothing(lab):
    """It is sent what fits, the rest is counted; graftd goes on, and closes it after a while."""
    process = lab.spawn_graft("--name", "unread", *python(
        "import socket, time\nwhile True:\n s = socket.socket(2, 2); s.sendto(b'x', ('127.0.0.1', 9)) if 0 else s.bind(('127.0.0.1', 0)); s.close()"))  # fmt: skip
    wait_for(lambda: "unread" in lab.graft("ps").stdout, "the container")
    before = readers(lab)
    log = lab.spawn(GRAFT, "log", "-f", "--all", "-j", stdout=subprocess.PIPE)
    wait_for(lambda: readers(lab) > before, "a reader")
    os.kill(log.pid, signal.SIGSTOP)
    began = time.monotonic()
    wait_for(lambda: readers(lab) == before, "the reader's end", timeout=40)
    assert time.monotonic() - began > 5
    assert lab.graft("ps", "-j").returncode == 0
    os.kill(log.pid, signal.SIGCONT)
    lab.end(process)
    log.communicate(timeout=20)
    assert log.returncode == 125, "graftd has closed the connection, which is said"


@pytest.mark.parametrize("options", [("nobody",), ("-f", "nobody")])
def test_of_whom_there_is_none(lab, options):
    keeps = lab.spawn_graft("--name", "somebody", "sleep", "20")
    wait_for(lambda: "somebody" in lab.graft("ps").stdout, "the container")
    lab.refused((GRAFT, "log", *options), 1, "no container named 'nobody'")
    lab.end(keeps)


def test_all_needs_follow(lab):
    lab.refused((GRAFT, "log", "--all"), 2, "--all needs -f")


def test_without_a_graftd(own_lab):
    own_lab.refused((GRAFT, "log",), 125, "graftd is not running")


def test_nobody_reads_inside(lab):
    """The log is for who may give orders: a container's process is refused, also by the socket's own path."""
    code = f"import socket; s = socket.socket(1); s.connect('{lab.run_dir}/graftd.sock'); " + (
        "s.send(b'{\"op\": \"log\", \"version\": \"x\", \"follow\": true}\\n'); print(s.recv(999).decode())"
    )
    assert '"error"' in lab.graft("run", *python(code)).stdout


FLOODED = """
import socket, sys, time
s = socket.socket(2, 2)
print('ready', flush=True)
for line in sys.stdin:
    began = time.monotonic(); until = began + float(line); count = 0
    while (now := time.monotonic()) < until:
        if count < (now - began) * 50000:
            try: s.sendto(b'x', ('198.51.100.1', 9))
            except OSError: count += 1
    print(count, flush=True)
"""
BYSTANDER = """
import socket, statistics, sys, time
print('ready', flush=True)
for line in sys.stdin:
    until = time.monotonic() + float(line); each = []
    while time.monotonic() < until:
        with socket.socket(2, 2) as s:
            began = time.perf_counter_ns()
            s.bind(('127.0.0.1', 0))
            each.append(time.perf_counter_ns() - began)
        time.sleep(.001)
    print(statistics.median(each), flush=True)
"""


@pytest.mark.alone
def test_50000_refusals_a_second_cost_a_bystander_nothing(lab):
    """A call of another container: beside a container that is refused, and beside a host's program that is.

    Both are refused as often, by graft's rules or for want of a route, and are busy for as long. So what a busy
    processor does to its neighbour (a shared core, a frequency, a wake-up saved) is in both halves of each pair.
    """
    def ask(process, seconds):
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()

    def beside(flood):
        ask(flood, 0.4)
        ask(other, 0.3)
        median = float(other.stdout.readline())
        rates[flood].append(int(flood.stdout.readline()) / 0.4)
        return median

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    refused_by_graft = lab.spawn_graft("--name", "flooded", "--egress", "none", *python(FLOODED), **pipes)
    refused_by_host = lab.spawn(*python(FLOODED), **pipes)
    other = lab.spawn_graft("--name", "bystander", *python(BYSTANDER), **pipes)
    processes = refused_by_graft, refused_by_host, other
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
    rates: dict[subprocess.Popen[str], list[float]] = {refused_by_graft: [], refused_by_host: []}
    with reading(lab):
        ratios = [beside(refused_by_graft) / beside(refused_by_host) for _ in range(15)]
    for process in processes:
        lab.end(process)
    ratio, slowest = statistics.median(ratios), min(statistics.median(each) for each in rates.values())
    told = f"refusals a second {slowest:.0f}, a bystander's bind {ratio:.3f}, of {sorted(ratios)}"
    print(told)
    assert slowest > 45000, told
    assert ratio < 1.1, told
