"""`make torture`: kill graftd, its keeper or both by SIGKILL, or replace graftd, while containers open connections.

No call may fail or hang, no open connection may break, no endpoint may be lost, and neither descriptors nor memory
may grow.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from graft.bench.lab import CLIENT4, GRAFTD, HOST4, Lab, laboratory, wait_for

WAYS = ("graftd", "keeper", "both", "replace")
CONTAINERS = 4
CLIENTS = 20
PATIENCE = 15.0  # seconds; a call that takes longer counts as hung
MEMORY_GROWTH = 8 << 20  # bytes
ECHO = """
import socket, threading
def serve(c):
    with c:
        while data := c.recv(4096): c.sendall(data)
s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('0.0.0.0', 9000)); s.listen(4096)
while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""
CLIENT = """
import ctypes, json, os, signal, socket, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
signal.siginterrupt(signal.SIGTERM, False)
def echo(s):
    s.sendall(b'ping'); return s.recv(64) == b'ping'
def once(n):
    with socket.create_connection((ADDRESS, 9000), 30) as s:
        if not echo(s): raise OSError('no echo')
    if n % 8 == 0:
        with socket.socket() as l, socket.socket() as c:
            l.bind(('127.0.0.1', 0)); l.listen(); c.connect(l.getsockname()); l.accept()[0].close()
    if n % 8 == 4:
        with socket.socket() as l: l.listen()
    if n % 8 == 6:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as u: u.sendto(b'x', (ADDRESS, 9001))
def client():
    held = socket.create_connection((ADDRESS, 9000), 30)
    n = failed = 0; slowest = 0.0; told = ''
    while not stop:
        began = time.monotonic(); n += 1
        try: once(n)
        except OSError as e: failed += 1; told = repr(e)
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.002)
    return dict(calls=n, failed=failed, told=told, slowest=slowest, held=echo(held))
reading, writing = os.pipe()
for _ in range(COUNT):
    if not os.fork():
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.write(writing, json.dumps(client()).encode() + b'\\n'); os._exit(0)
os.close(writing)
print('up', flush=True)
while True:
    try: os.wait()
    except ChildProcessError: break
sys.stdout.write(os.fdopen(reading).read())
"""


def memory(pid: int) -> int:
    """Return the resident memory of a process in bytes (/proc/PID/statm, proc(5))."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    """Return the number of open descriptors of a process."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class Torture:
    """The rounds in one laboratory."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def start(self) -> None:
        """Start the clients, and add an endpoint that has to survive."""
        lab = self.lab
        lab.spawn(sys.executable, "-c", ECHO, client=True)
        wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9000").stdout, "the server")
        lab.graft("endpoint", "add", "kept", "type", "ipv4", "addr", HOST4, "port", "dynamic", check=True)
        code = CLIENT.replace("ADDRESS", repr(CLIENT4)).replace("COUNT", str(CLIENTS // CONTAINERS))
        self.containers = [
            lab.spawn_graft("--name", f"c{n}", sys.executable, "-c", code, stdout=subprocess.PIPE)
            for n in range(CONTAINERS)
        ]
        for container in self.containers:
            assert container.stdout
            container.stdout.readline()
        wait_for(lambda: len(lab.helper_pids()) == CONTAINERS, "every graft-sup")

    def pids(self) -> tuple[int, int]:
        """Wait for the keeper and graftd, and return their PIDs."""
        return wait_for(self.lab.keeper_pid, "the keeper"), wait_for(self.lab.daemon_pid, "graftd")

    def round(self, way: str) -> None:
        """Kill or replace in one of the WAYS, and wait for a new graftd. Raises TimeoutError, AssertionError."""
        keeper, daemon = self.pids()
        if way == "replace":
            self.lab.host(GRAFTD, "--replace", check=True)
        for pid in {"graftd": (daemon,), "keeper": (keeper,), "both": (keeper, daemon)}.get(way, ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(partial(self._is_new, way, keeper, daemon), f"another graftd after {way}", 20)
        assert "kept" in self.lab.graft("endpoint", "show", check=True).stdout, "the endpoint is lost"

    def _is_new(self, way: str, keeper: int, daemon: int) -> bool:
        with contextlib.suppress(ValueError, OSError):
            fresh = (self.lab.keeper_pid() != keeper or way == "graftd") and self.lab.daemon_pid() not in (0, daemon)
            return fresh and self._supervised()
        return False

    def _supervised(self) -> bool:
        told = self.lab.graft("ps", "-j")
        rows = json.loads(told.stdout) if told.returncode == 0 else []
        return len(rows) == CONTAINERS and all(row["status"] == "running" for row in rows)

    def weigh(self) -> dict[str, tuple[int, int]]:
        """Return descriptors and bytes of memory, by process: the least of some looks, because calls are under way."""
        keeper, daemon = self.pids()
        found = {"graftd": daemon, "keeper": keeper}
        found |= {f"graft-sup {n}": pid for n, pid in enumerate(sorted(self.lab.helper_pids()))}
        looks = []
        for _ in range(20):
            looks.append({name: descriptors(pid) for name, pid in found.items()})
            time.sleep(0.01)
        return {name: (min(look[name] for look in looks), memory(pid)) for name, pid in found.items()}

    def end(self) -> list[dict[str, float]]:
        """Stop the clients; returns the report of each."""
        reports = []
        for container in self.containers:
            subprocess.run(("pkill", "-TERM", "-P", str(container.pid)), check=True)
        for container in self.containers:
            text, _ = container.communicate(timeout=60)
            reports += [json.loads(line) for line in text.splitlines()]
        return reports


def torture(lab: Lab, rounds: int, seed: int, *, tell: bool = False) -> dict[str, float]:
    """Run @rounds rounds, the WAYS in turn, at random moments. Raises AssertionError, which says what was lost.

    Returns the number of rounds and calls, and the slowest call in seconds. @tell: print the progress.
    """
    chance = random.Random(seed)
    run = Torture(lab)
    run.start()
    began = time.monotonic()
    weights = {}
    for n in range(rounds):
        time.sleep(chance.uniform(0.02, 0.6))
        run.round(WAYS[n % len(WAYS)])
        if n in (min(len(WAYS), rounds) - 1, rounds - 1):
            time.sleep(1.0)
            weights[n] = run.weigh()
        if tell and n % 10 == 9:
            print(f"torture: {n + 1} rounds, {time.monotonic() - began:.0f} s", flush=True)
    reports = run.end()
    assert len(reports) == CLIENTS, f"{len(reports)} clients of {CLIENTS} lived"
    failed = [r["told"] for r in reports if r["failed"]]
    assert not failed, f"failed calls: {failed}"
    slowest = max(r["slowest"] for r in reports)
    assert slowest < PATIENCE, f"a call took {slowest:.1f} s"
    assert all(r["held"] for r in reports), "an open connection was touched"
    first, last = (weights[n] for n in (min(weights), max(weights)))
    for name, (fds, size) in last.items():
        assert fds <= first[name][0] + 4, f"{name}: {first[name][0]} descriptors became {fds}"
        assert size <= first[name][1] + MEMORY_GROWTH, f"{name}: {first[name][1]} bytes became {size}"
    return {"rounds": rounds, "calls": sum(r["calls"] for r in reports), "failed": 0, "slowest": round(slowest, 3)}


def main() -> None:
    """Run from the command line. An AssertionError ends it with status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with laboratory("torture") as lab:
        found = torture(lab, arguments.rounds, arguments.seed, tell=True)
    print("torture: OK,", ", ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
