"""make bench: graft beside the host's own stack, in pairs, in one run.

Each case is measured for both in turn, in alternating order; the ratio is taken pair by pair, and the median
of the ratios is what counts (1.0: as fast as the host). For a time the ratio is host / graft, so that more is
better everywhere.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from graft.bench.demo import nginx_config
from graft.bench.lab import GRAFT, HOST4, Lab, laboratory
from graft.bench.tables import compare

GRAFTED, PLAIN = 7001, 7002

PINGPONG_SERVER = """
import socket, sys
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', int(sys.argv[1]))); s.listen()
c = s.accept()[0]; c.setsockopt(6, 1, 1)
while data := c.recv(64): c.send(data)
"""
PINGPONG_CLIENT = """
import socket, sys, time
s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.setsockopt(6, 1, 1)
def run(n):
    for _ in range(n): s.send(b'x'); s.recv(64)
run(2000); began = time.perf_counter(); run(10000); print((time.perf_counter() - began) / 10000 * 1e6)
"""
SHORT_CLIENT = """
import socket, sys, time
address = (sys.argv[1], int(sys.argv[2]))
def run(n):
    for _ in range(n):
        s = socket.socket(); s.connect(address); s.recv(1); s.close()
run(500); began = time.perf_counter(); run(4000); print(4000 / (time.perf_counter() - began))
"""
SHORT_SERVER = """
import socket, sys
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', int(sys.argv[1]))); s.listen(4096)
while True: s.accept()[0].close()
"""
SOCKETS = """
import socket, time
def run(n):
    for _ in range(n): socket.socket().close()
run(500); began = time.perf_counter(); run(3000); print((time.perf_counter() - began) / 3000 * 1e6)
"""


def python(code: str, *arguments: object) -> tuple[str, ...]:
    """A command that runs @code."""
    return ("/usr/bin/python3", "-I", "-c", code, *map(str, arguments))


def number(text: str) -> float:
    """The figure that a program printed."""
    return float(text.strip().splitlines()[-1])


def serve_both(lab: Lab, command: Callable[[int], tuple[str, ...]], inner: int) -> None:
    """The same server under graft at GRAFTED and plain at PLAIN; @inner is its port in the container."""
    lab.spawn_graft("-p", f"{GRAFTED}:{inner}", *command(inner), stdout=-3)
    lab.spawn(*command(PLAIN), stdout=-3)
    for port in (GRAFTED, PLAIN):
        lab.wait_listening(port)


def iperf(lab: Lab, port: int, *options: str) -> dict[str, Any]:
    """The end report of iperf3 over 2 seconds; its server takes a moment between two clients."""
    for _ in range(5):
        report: dict[str, Any] = json.loads(
            lab.client("iperf3", "-c", HOST4, "-p", port, "-t", "2", "-J", *options).stdout
        )
        if "error" not in report:
            return dict(report["end"])
        time.sleep(0.5)
    raise RuntimeError(f"iperf3: {report['error']}")


def bulk(lab: Lab, *options: str) -> Callable[[int], float]:
    """iperf3, Gbit/s received."""
    serve_both(lab, lambda port: ("iperf3", "-s", "-p", str(port)), GRAFTED)

    def measure(port: int) -> float:
        end = iperf(lab, port, *options)
        return float((end.get("sum_received") or end["sum"])["bits_per_second"]) / 1e9

    return measure


def udp(lab: Lab) -> Callable[[int], float]:
    """iperf3 UDP, Gbit/s received, datagrams of 1400 bytes as fast as they go."""
    lab.spawn_graft(
        "-p", f"{GRAFTED}:{GRAFTED}", "-p", f"{GRAFTED}:{GRAFTED}/udp", "iperf3", "-s", "-p", GRAFTED, stdout=-3
    )
    lab.spawn("iperf3", "-s", "-p", PLAIN, stdout=-3)
    for port in (GRAFTED, PLAIN):
        lab.wait_listening(port)

    def measure(port: int) -> float:
        end = iperf(lab, port, "-u", "-b", "0", "-l", "1400")["sum"]
        received: float = end["bits_per_second"] * (1 - end["lost_percent"] / 100)
        return received / 1e9

    return measure


def latency(lab: Lab) -> Callable[[int], float]:
    """One byte there and back on an open connection; the inverse of microseconds."""

    def measure(port: int) -> float:
        code = python(PINGPONG_SERVER, 80 if port == GRAFTED else port)
        server = lab.spawn_graft("-p", f"{port}:80", *code) if port == GRAFTED else lab.spawn(*code)
        lab.wait_listening(port)
        result = number(lab.client(*python(PINGPONG_CLIENT, HOST4, port)).stdout)
        server.wait(10)
        return 1e6 / result

    return measure


def short_in(lab: Lab) -> Callable[[int], float]:
    """Connections a second into a server, one after another."""
    serve_both(lab, lambda port: python(SHORT_SERVER, port), 80)
    return lambda port: number(lab.client(*python(SHORT_CLIENT, HOST4, port)).stdout)


def http(lab: Lab, *, keepalive: bool) -> Callable[[int], float]:
    """nginx, 1 KiB, requests a second by wrk with 16 connections."""
    (lab.work / "root").mkdir(exist_ok=True)
    (lab.work / "root" / "1k").write_bytes(bytes(1024))
    tag = "k" if keepalive else "c"
    grafted, plain = (nginx_config(lab, f"{tag}{n}", port) for n, port in enumerate((80, PLAIN)))
    lab.spawn_graft("-p", f"{GRAFTED}:80", "nginx", "-c", grafted, stderr=-3)
    lab.spawn("nginx", "-c", plain, stderr=-3)
    for port in (GRAFTED, PLAIN):
        lab.wait_listening(port)
    header = () if keepalive else ("-H", "Connection: close")

    def measure(port: int) -> float:
        load = lab.client("wrk", "-t1", "-c16", "-d2s", *header, f"http://{HOST4}:{port}/1k").stdout
        return next(float(line.split()[1]) for line in load.splitlines() if line.startswith("Requests/sec"))

    return measure


def short_out(lab: Lab) -> Callable[[int], float]:
    """Connections a second out of a container: every one traps socket()."""
    lab.spawn(*python(SHORT_SERVER, 9000), client=True)
    time.sleep(0.5)

    def measure(port: int) -> float:
        command = python(SHORT_CLIENT, "10.77.0.2", 9000)
        return number((lab.graft("run", *command) if port == GRAFTED else lab.host(*command)).stdout)

    return measure


CASES: dict[str, Callable[[Lab], Callable[[int], float]]] = {
    "bulk TCP in, Gbit/s": bulk,
    "bulk TCP out, Gbit/s": lambda lab: bulk(lab, "-R"),
    "UDP 1400 B in, Gbit/s": udp,
    "request latency, 1/s": latency,
    "nginx keep-alive, 1/s": lambda lab: http(lab, keepalive=True),
    "nginx one request a connection, 1/s": lambda lab: http(lab, keepalive=False),
    "short connections in, 1/s": short_in,
    "short connections out, 1/s (trapped)": short_out,
}


def pairs(lab: Lab, case: Callable[[Lab], Callable[[int], float]], count: int) -> list[tuple[float, float]]:
    """(graft, host), @count times in alternating order after one warm-up."""
    measure = case(lab)
    measured = []
    for n in range(-1, count):
        order = (GRAFTED, PLAIN) if n % 2 else (PLAIN, GRAFTED)
        found = {port: measure(port) for port in order}
        if n >= 0:
            measured.append((found[GRAFTED], found[PLAIN]))
    for process in lab.started:
        lab.end(process)
    lab.started.clear()
    return measured


LAUNCH = """
import os, sys, time
sys.path.insert(0, {root!r})
from graft import client, filter, launch, linux
print(time.time_ns(), flush=True)
{how}
"""
DATE = "['/bin/date', '+%s%N']"


def start_up(lab: Lab, count: int) -> dict[str, float]:
    """What `graft run` adds to a command, and what of it is the kernel's and graftd's; milliseconds."""
    lab.spawn_graft("--name", "hold", "sleep", "600")
    time.sleep(0.5)

    def timed(*command: object) -> float:
        began = time.perf_counter()
        lab.host(*command)
        return (time.perf_counter() - began) * 1e3

    def between(how: str) -> float:
        """From a running interpreter with all imports done to the command's first instruction."""
        code = LAUNCH.format(root=str(Path(__file__).parent.parent), how=how)
        began, ended = lab.host(sys.executable, "-I", "-c", code).stdout.split()
        return (int(ended) - int(began)) / 1e6

    run = f"launch.run(launch.Plan({DATE}))"
    plain = f"os.execv('/bin/date', {DATE})"
    whole = statistics.median(timed(GRAFT, "run", "/bin/true") - timed("/bin/true") for _ in range(count))
    part = statistics.median(between(run) - between(plain) for _ in range(count))
    return {"graft run": whole, "of it kernel and graftd": part}


def supervisor(lab: Lab) -> dict[str, float]:
    """A trapped socket(): as the program sees it, and graftd's own part; microseconds."""
    code = f"import json, sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})\n"
    code += "from graft.client import call; print(json.dumps(call('status')))"

    def status() -> dict[str, float]:
        answer = lab.host(sys.executable, "-c", code).stdout
        return dict(json.loads(answer))

    before = status()
    seen = number(lab.graft("run", *python(SOCKETS)).stdout)
    after = status()
    own = (after["call_ns"] - before["call_ns"]) / (after["calls"] - before["calls"]) / 1e3
    return {
        "socket()+close() in the program": seen,
        "on the host": number(lab.host(*python(SOCKETS)).stdout),
        "of it graftd": own,
    }


def main() -> int:
    """Measure and print; with --json also write all samples."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--pairs", type=int, default=7, metavar="N")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    for tool in ("iperf3", "nginx", "wrk"):
        if not shutil.which(tool):
            print(f"bench: '{tool}' is not installed; run 'make setup'", file=sys.stderr)
            return 1
    samples: dict[str, list[tuple[float, float]]] = {}
    print(f"{'case':38}{'graft':>10}{'host':>10}{'ratio':>8}  min-max of {options.pairs} pairs")
    with laboratory("bench") as lab:
        for name, case in CASES.items():
            if options.case and not any(text in name for text in options.case):
                continue
            samples[name] = pairs(lab, case, options.pairs)
            ratios = sorted(graft / host for graft, host in samples[name])
            graft, host = (statistics.median(column) for column in zip(*samples[name], strict=True))
            middle = statistics.median(ratios)
            spread = f"{ratios[0]:.3f}-{ratios[-1]:.3f}"
            print(f"{name:38}{graft:10.2f}{host:10.2f}{middle:8.3f}  {spread}", flush=True)
        if not options.case or any(text in "large table" for text in options.case):
            for call, figures in compare(lab, options.pairs).items():
                told = f"{figures['many_ns']:10.0f}{figures['few_ns']:10.0f}{1 / figures['ratio']:8.3f}"
                print(f"{call + ' in a large table of 10,000, ns':38}{told}  beside a table of 2")
        if not options.case:
            for title, figures in (("ms", start_up(lab, 15)), ("us", supervisor(lab))):
                for name, value in figures.items():
                    print(f"{name:38}{value:10.2f} {title}")
    if options.json:
        options.json.write_text(json.dumps(samples, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (AssertionError, RuntimeError, TimeoutError) as error:
        sys.exit(f"bench: {error}")
