"""`make soak`: run real programs in containers for a given time, and look for growth, slowdown, failures, leftovers.

nginx and redis serve from containers to the laboratory's client. One container opens connections all the time; a
bystander measures the latency of its socket(). Meanwhile short-lived containers, endpoints, rules and wrappers come
and go. Every SAMPLE seconds, the descriptors and the memory of graftd, the keeper and the graft-sups are read. The
report has their slopes per hour, and the bystander's latency in the first and in the last quarter.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from graft.bench.lab import CLIENT4, HOST4, Lab, laboratory, nginx_config, wait_for
from graft.bench.stop import seconds
from tests.endurance.torture import CLIENT, ECHO, descriptors, memory

SAMPLE = 10.0
MEMORY_NOISE = 2 << 20  # bytes per hour that are no growth: Python's allocator goes up and down
BYSTANDER = """
import json, socket, statistics, sys, time
while True:
    took, end = [], time.monotonic() + INTERVAL
    while time.monotonic() < end:
        began = time.perf_counter_ns(); s = socket.socket(); took.append((time.perf_counter_ns() - began) / 1000)
        s.close(); time.sleep(0.02)
    took.sort()
    print(json.dumps([statistics.median(took), took[int(len(took) * 0.99)]]), flush=True)
"""


def slope(times: list[float], values: list[float]) -> float:
    """Return the slope of the least-squares line through @values at @times (seconds), per hour."""
    return statistics.linear_regression(times, values).slope * 3600 if len(times) > 2 else 0.0


class Soak:
    """One run. `failures` has a line for each failure, with its time in seconds from the start."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.began = time.monotonic()
        self.over = threading.Event()
        self.failures: list[str] = []
        self.done: dict[str, int] = {}
        self.samples: dict[str, list[tuple[float, int, int]]] = {}
        self.latencies: list[tuple[float, float]] = []

    def start(self) -> None:
        """Start the long-lived containers, and the threads that make short-lived ones."""
        lab = self.lab
        (lab.work / "root").mkdir()
        (lab.work / "root" / "index.html").write_text("soak\n" * 100)
        lab.spawn_graft("--name", "web", "-p", "8080:80", "nginx", "-c", nginx_config(lab, "web", 80))
        redis = ("redis-server", "--port", "6379", "--save", "", "--protected-mode", "no")
        lab.spawn_graft("--name", "db", "-p", "6379:6379", *redis, stdout=subprocess.DEVNULL)
        lab.spawn(sys.executable, "-c", ECHO, client=True)
        for port in (8080, 6379):
            lab.wait_listening(port)
        wait_for(lambda: lab.client("ss", "-tlnH", "sport = :9000").stdout, "the echo server")
        code = CLIENT.replace("ADDRESS", repr(CLIENT4)).replace("COUNT", "2").replace("0.002", "0.02")
        self.churn = lab.spawn_graft("--name", "churn", sys.executable, "-c", code, stdout=subprocess.PIPE)
        code = BYSTANDER.replace("INTERVAL", str(SAMPLE))
        self.bystander = lab.spawn_graft("--name", "bystander", sys.executable, "-c", code, stdout=subprocess.PIPE)
        jobs: tuple[tuple[str, float, Callable[[], str]], ...] = (
            ("nginx", 1.0, self._nginx),
            ("redis", 1.0, self._redis),
            ("container", 1.5, self._container),
            ("endpoint", 2.0, self._endpoint),
            ("rule", 2.0, self._rule),
            ("wrapper", 3.0, self._wrapper),
        )
        self.threads = [threading.Thread(target=self._repeat, args=job) for job in jobs]
        self.threads.append(threading.Thread(target=self._listen, daemon=True))
        for thread in self.threads:
            thread.start()

    def _repeat(self, name: str, pause: float, job: Callable[[], str]) -> None:
        while not self.over.wait(pause):
            try:
                trouble = job()
            except (OSError, subprocess.SubprocessError) as error:
                trouble = str(error)
            self.done[name] = self.done.get(name, 0) + 1
            if trouble:
                self.failures.append(f"{time.monotonic() - self.began:.0f} s: {name}: {trouble[:200]}")

    def _listen(self) -> None:
        assert self.bystander.stdout
        for line in self.bystander.stdout:
            self.latencies.append(tuple(json.loads(line)))

    @staticmethod
    def _told(result: subprocess.CompletedProcess[str], wanted: str = "") -> str:
        if result.returncode or wanted not in result.stdout:
            return f"status {result.returncode}: {result.stdout[:80]!r} {result.stderr[-120:]!r}"
        return ""

    def _nginx(self) -> str:
        return self._told(self.lab.client("curl", "-sS", "-m5", f"http://{HOST4}:8080/"), "soak")

    def _redis(self) -> str:
        return self._told(self.lab.client("redis-cli", "-h", HOST4, "incr", "soak"))

    def _container(self) -> str:
        code = "import socket; s = socket.socket(); s.bind(('0.0.0.0', 80)); s.listen(); print('up')"
        return self._told(self.lab.graft("run", "-p", "8090:80", sys.executable, "-c", code), "up")

    def _endpoint(self) -> str:
        added = self.lab.graft("endpoint", "add", "coming", "type", "ipv4", "addr", HOST4, "port", "dynamic")
        return self._told(added) or self._told(self.lab.graft("endpoint", "del", "coming"))

    def _rule(self) -> str:
        added = self.lab.graft("rule", "add", "web", "-p", "8091:81")
        return self._told(added) or self._told(self.lab.graft("rule", "del", "web", "-p", "8091:81"))

    def _wrapper(self) -> str:
        added = self.lab.graft("endpoint", "add", "out", "type", "ipv4", "addr", HOST4, "port", "dynamic")
        code = f"import socket; s = socket.create_connection(({CLIENT4!r}, 9000), 5); print(s.getsockname()[0])"
        ran = self.lab.graft("-e", "0.0.0.0/0=out", "--", sys.executable, "-c", code)
        return self._told(added) or self._told(ran, ".") or self._told(self.lab.graft("endpoint", "del", "out"))

    def sample(self) -> None:
        """Read the descriptors and memory of graftd's processes now."""
        found = {"graftd": self.lab.daemon_pid(), "keeper": self.lab.keeper_pid()}
        names = {"web", "db", "churn", "bystander"}
        for pid in self.lab.helper_pids():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/cmdline") as file:
                name = file.read().split("\0")[1]
                found |= {f"graft-sup {name}": pid} if name in names else {}
        for name, pid in found.items():
            with contextlib.suppress(OSError):  # a process that is being restarted
                at = time.monotonic() - self.began
                self.samples.setdefault(name, []).append((at, descriptors(pid), memory(pid)))

    def stop(self) -> None:
        """End the jobs, and collect the results of the container that opened connections."""
        self.over.set()
        for thread in self.threads[:-1]:
            thread.join()
        subprocess.run(("pkill", "-TERM", "-P", str(self.churn.pid)), check=True)
        text, _ = self.churn.communicate(timeout=60)
        for line in text.splitlines()[1:]:
            told = json.loads(line)
            self.done["connection"] = self.done.get("connection", 0) + told["calls"]
            if told["failed"] or not told["held"] or told["slowest"] > 10:
                self.failures.append(f"connections: {told}")

    def report(self) -> dict[str, Any]:
        """Return the report that is printed at the end. Its `grows` and `failures` are empty if all is well."""
        processes, grows = {}, []
        for name, rows in self.samples.items():
            rows = rows[len(rows) // 10 :]
            times = [row[0] for row in rows]
            # A Python process keeps memory that it needed once, so only growth in the second half counts
            half = rows[len(rows) // 2 :]
            by_hour = slope(times, [row[1] for row in rows])
            bytes_by_hour = slope([row[0] for row in half], [row[2] for row in half])
            processes[name] = {
                "fds": [rows[0][1], rows[-1][1]], "fds_by_hour": round(by_hour, 2),
                "kib": [rows[0][2] >> 10, rows[-1][2] >> 10], "kib_by_hour": round(bytes_by_hour / 1024),
            }  # fmt: skip
            hours = (times[-1] - times[0]) / 3600
            if by_hour * hours > 8:
                grows.append(f"{name}: descriptors")
            if bytes_by_hour * max(hours, 0.5) > MEMORY_NOISE:
                grows.append(f"{name}: memory")
        quarter = max(1, len(self.latencies) // 4)
        return {
            "seconds": round(time.monotonic() - self.began),
            "done": self.done,
            "failures": self.failures,
            "processes": processes,
            "socket_us": {
                when: [round(statistics.median(row[n] for row in rows), 1) for n in (0, 1)]
                for when, rows in (("first", self.latencies[:quarter]), ("last", self.latencies[-quarter:]))
            },
            "grows": grows,
        }


def soak(lab: Lab, duration: float) -> dict[str, Any]:
    """Run for @duration seconds; returns the report."""
    run = Soak(lab)
    run.start()
    deadline = time.monotonic() + duration
    while time.monotonic() < deadline:
        time.sleep(min(SAMPLE, max(0.1, deadline - time.monotonic())))
        run.sample()
    run.stop()
    return run.report()


def main() -> int:
    """Run from the command line; prints the report as JSON, and returns 1 if anything grew or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("time", nargs="?", default="1h", help="as 90s, 10m or 1h (default)")
    arguments = parser.parse_args()
    with laboratory("soak") as lab:  # raises AssertionError at its end if something is left behind
        found = soak(lab, seconds(arguments.time))
    print(json.dumps(found, indent=1))
    return 1 if found["grows"] or found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
