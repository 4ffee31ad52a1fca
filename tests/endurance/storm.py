"""Latency of socket() and listen() beside a neighbour that storms graft, compared with one that only burns CPU.

A storm of calls takes processor time, as any busy program does, and to share that is the scheduler's task. What
graft adds is the difference. So both are measured in turn: the neighbour in a loop of socket(), listen() and close(),
and the same neighbour in a loop of computation.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

from graft.bench.lab import Lab, laboratory, wait_for

NEIGHBOUR = """
import socket, threading
def storm():
    while True:
        with socket.socket() as s: s.listen()
def burn():
    while True: sum(range(1000))
for _ in range(16): threading.Thread(target=WHAT).start()
"""
BYSTANDER = """
import json, socket, statistics, time
took, end = [], time.monotonic() + SECONDS
while time.monotonic() < end:
    began = time.perf_counter_ns()
    with socket.socket() as s: s.listen()
    took.append((time.perf_counter_ns() - began) / 1000); time.sleep(0.005)
took.sort()
print(json.dumps([statistics.median(took), took[int(len(took) * 0.99)]]))
"""


def compare(lab: Lab, pairs: int, seconds: float = 0.7) -> dict[str, Any]:
    """Measure @pairs pairs, each part for @seconds.

    Returns for "storm" and "burn" the bystander's median and 99th percentile in microseconds, as medians over the
    pairs, and as "ratio" the median ratio of the two medians.
    """
    rows: dict[str, list[list[float]]] = {"storm": [], "burn": []}
    for _ in range(pairs):
        for what, kept in rows.items():
            code = NEIGHBOUR.replace("WHAT", what)
            neighbour = lab.spawn_graft("--name", "neighbour", sys.executable, "-c", code)
            wait_for(lambda: "neighbour" in lab.containers(), "the neighbour")
            told = lab.graft("run", sys.executable, "-c", BYSTANDER.replace("SECONDS", str(seconds)), check=True)
            kept.append(json.loads(told.stdout))
            neighbour.kill()
            neighbour.wait()
            wait_for(lambda: not lab.containers(), "its end")
    found: dict[str, Any] = {
        what: [round(statistics.median(row[n] for row in kept), 1) for n in (0, 1)] for what, kept in rows.items()
    }
    ratios = [storm[0] / burn[0] for storm, burn in zip(rows["storm"], rows["burn"], strict=True)]
    return found | {"ratio": round(statistics.median(ratios), 2)}


def main() -> None:
    """Print the comparison as JSON."""
    with laboratory("storm") as lab:
        print(json.dumps(compare(lab, 9, 2.0)))


if __name__ == "__main__":
    try:
        main()
    except subprocess.SubprocessError as error:
        sys.exit(str(error))
