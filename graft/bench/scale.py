"""The scale cases of `graft bench`: the cost of more containers, more rules and a busy neighbour.

The first line of a case's docstring is its title in `graft bench --list`.
"""

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.bench.connections import OUT_PORT
from graft.bench.lab import CLIENT4, GRAFT, Lab, wait_for
from graft.bench.peers import Docker
from graft.bench.result import Growth
from graft.bench.tables import compare

SOCKETS = """
import socket, sys, time
end = time.perf_counter() + float(sys.argv[1])
count = 0
while time.perf_counter() < end:
    socket.socket().close(); count += 1
print(count / float(sys.argv[1]))
"""
PACED = """
import socket, statistics, sys, time
end = time.perf_counter() + float(sys.argv[1])
took = []
while time.perf_counter() < end:
    began = time.perf_counter(); socket.socket().close(); took.append((time.perf_counter() - began) * 1e6)
    time.sleep(0.002)
print(statistics.median(took))
"""
LIVE = "import socket, time; s = [socket.socket() for _ in range(2)]; s[0].bind(('0.0.0.0', 0)); time.sleep(3600)"


def _python(code: str, *arguments: object) -> tuple[str, ...]:
    return ("/usr/bin/python3", "-I", "-c", code, *map(str, arguments))


def _resident(pid: int) -> float:
    """Return the resident memory of a process in KiB (VmRSS in /proc/PID/status, proc(5)); 0 if it has none."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return float(line.split()[1])
    return 0.0


def _wait_running(lab: Lab, count: int) -> None:
    wait_for(lambda: len(lab.containers()) >= count, "the containers", 120)


def _connect(lab: Lab, count: int) -> float:
    """Return microseconds per connection out of a container: the median of three runs of @count connections."""
    command = ("run", lab.work / "load", "connect", CLIENT4, OUT_PORT, count, 1)
    return statistics.median(float(lab.graft(*command, check=True).stdout) for _ in range(3))


def tenants(lab: Lab, *, quick: bool) -> Iterator[Growth]:
    """Connections of one container beside many others, and graftd's memory per container."""
    lab.spawn(lab.work / "load", "serve", OUT_PORT, client=True)
    lab.spawn_graft("--name", "first", *_python(LIVE))
    wait_for(lambda: "first" in lab.containers(), "the first container")
    count = 2000 if quick else 10000
    base = alone = _connect(lab, count)
    pid = lab.daemon_pid()
    memory = _resident(pid)
    yield Growth("tenants", "connection out, 1 container", alone, "us")
    running = 1
    for target in (10,) if quick else (10, 100, 1000):
        while running < target:
            lab.spawn_graft("--name", f"t{running}", *_python(LIVE))
            running += 1
            if running % 20 == 0 or running == target:
                _wait_running(lab, running)
        cost = _connect(lab, count)
        yield Growth(
            "tenants", f"connection out beside {target} containers", cost, "us", f"{cost / base:.2f} of alone"
        )
        each = (_resident(pid) - memory) / (target - 1)
        yield Growth("tenants", f"graftd's memory for each of {target} containers", each, "KiB")
        helpers = [_resident(p) for p in lab.helper_pids()[:10]]
        if helpers:
            yield Growth("tenants", "graft-sup, resident", statistics.median(helpers), "KiB", "mostly shared pages")


def rules(lab: Lab, *, quick: bool) -> Iterator[Growth]:
    """bind() and connect() with many rules, compared with two rules."""
    for many in (1000,) if quick else (10000, 100000):
        for call, figures in compare(lab, 3 if quick else 7, many).items():
            note = f"{figures['ratio']:.2f} of a table of 2"
            yield Growth("rules", f"{call}() beside {many} endpoints and rules", figures["many_ns"], "ns", note)


def calls(lab: Lab, *, quick: bool) -> Iterator[Growth]:
    """Trapped calls per second in one container, and in several at once."""
    seconds = 0.5 if quick else 3
    for count in (1, 4):
        started = [lab.spawn_graft(*_python(SOCKETS, seconds), stdout=subprocess.PIPE) for _ in range(count)]
        rates = [float(process.communicate(timeout=60)[0]) for process in started]
        yield Growth("calls", f"socket() in {count} container{'s' if count > 1 else ''}", sum(rates), "1/s")


def fairness(lab: Lab, *, quick: bool) -> Iterator[Growth]:
    """Latency of socket() in a paced container beside one that makes sockets as fast as it can."""
    seconds = 0.7 if quick else 3

    def paced() -> float:
        return float(lab.graft("run", *_python(PACED, seconds), check=True).stdout)

    alone = paced()
    noisy = lab.spawn_graft("--name", "noisy", *_python(SOCKETS, 600), stdout=subprocess.DEVNULL)
    wait_for(lambda: "noisy" in lab.containers(), "the noisy one")
    time.sleep(0.3)
    beside = paced()
    lab.end(noisy)
    yield Growth("fairness", "socket() of a paced container", alone, "us")
    yield Growth(
        "fairness", "beside a container that makes as many as it can", beside, "us", f"{beside / alone:.2f} of alone"
    )


def start(lab: Lab, *, quick: bool) -> Iterator[Growth]:
    """Time that `graft run` adds to a command, and the share of kernel and graftd in it."""
    lab.spawn_graft("--name", "hold", "sleep", "600")
    wait_for(lambda: "hold" in lab.containers(), "a container")

    def timed(*command: object) -> float:
        began = time.perf_counter()
        lab.host(*command, check=True)
        return (time.perf_counter() - began) * 1e3

    rounds = 5 if quick else 21
    whole = statistics.median(timed(GRAFT, "run", "/bin/true") - timed("/bin/true") for _ in range(rounds))
    yield Growth("start", "graft run beside the bare command, start to end", whole, "ms", "most of it Python's start")
    code = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from graft import client
from graft.commands import launch
print(time.time_ns(), flush=True)
"""

    def between(how: str) -> float:
        """Return ms from a running interpreter, with all imports done, to the output of date(1) that it becomes."""
        import sys

        began, ended = lab.host(sys.executable, "-I", "-c", code + how, check=True).stdout.split()
        return (int(ended) - int(began)) / 1e6

    date = "['/bin/date', '+%s%N']"
    plain = f"import os; os.execv('/bin/date', {date})"
    network = statistics.median(between(f"launch.run(launch.Plan({date}))") - between(plain) for _ in range(rounds))
    yield Growth("start", "a container's network, by graft", network, "ms")
    if not Docker.reason():
        docker = Docker(lab, 1)
        try:
            docker.start()
            lab.host(*docker.wrap(("true",), ()), check=True)
            whole = statistics.median(timed(*docker.wrap(("true",), ())) for _ in range(3 if quick else 9))
        finally:
            docker.close()
        yield Growth("start", "docker run --rm of the same command, start to end", whole, "ms", "for comparison")


CASES: dict[str, Callable[..., Iterator[Growth]]] = {
    "start": start,
    "calls": calls,
    "fairness": fairness,
    "rules": rules,
    "tenants": tenants,
}
