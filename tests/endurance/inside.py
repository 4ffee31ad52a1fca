"""`make inside`: random sequences of socket calls inside containers, and a watcher on the host.

Containers of the four kinds of programs (tests/attack) do what tests/attack/matrix/wild.py chooses by a seed: calls of any
kind, with odd lengths, on descriptors that threads, processes and containers share. After each round the watcher compares
the host's addresses, routes, devices and firewall, looks who listens, who has been at the host's servers, whether graft's
processes live, and what they hold; a bystander's calls must all succeed.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from graft.bench.lab import Lab, laboratory
from tests.attack.matrix.laboratory import Matrix, Program, Who
from tests.attack.matrix.rules import reached
from tests.attack.test_attacks import PROFILES
from tests.endurance.torture import descriptors, memory

CALLS = 150  # of each thread, in a round
MEMORY_GROWTH = 24 << 20  # bytes, after the first rounds
DESCRIPTOR_GROWTH = 160  # graft-sup keeps up to 128 sockets ahead, and 16 channels
# issue 13: a mark and a priority by control messages; AF_GRAFT's sockets at endpoints that are given for egress alone
KNOWN = ("meta mark", "meta priority", " 10.77.0.1:")
STRAY_SECONDS = 3  # graftd's tick is a second
SETTLED = 3  # rounds, after which nothing may grow
BYSTANDER = """
import json, socket, sys, time
def once():
    with socket.socket() as l, socket.socket() as c:
        l.bind(('127.0.0.1', 0)); l.listen(); c.connect(l.getsockname())
        with l.accept()[0] as s: c.sendall(b'ping'); assert s.recv(9) == b'ping'
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as u: u.bind(('::', 0))
    with socket.create_server(('0.0.0.0', 7000)): pass
print('up', flush=True)
for line in sys.stdin:
    failed, slowest, end = [], 0, time.monotonic() + float(line)
    count = 0
    while time.monotonic() < end or not count:
        began = time.monotonic(); count += 1
        try: once()
        except Exception as error: failed.append(repr(error))
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.01)
    print(json.dumps([count, failed[:3], slowest]), flush=True)
"""


class Inside(Matrix):
    """The laboratory of the matrix with programs that do what they like."""

    module = "wild"

    def _start(self, profiles: tuple[str, ...]) -> None:
        needles = self.needles()
        self.kinds = [Who(p, c) for p in profiles for c in ("none", "host", "accel", "away")]
        # a container that goes out by the host's addresses is told of them, also by its own devices
        told = {name: needle for name, needle in needles.items() if name not in ("an address", "an IPv6 address")}
        for number, who in enumerate(self.kinds):
            base = 9500 + 40 * number
            argv = (*self._graft(who.profile, who.place, base), *PROFILES[who.profile])
            self._program(who, argv, told if who.place == "host" else needles, published=base)
        for program in self.programs.values():
            program.up()
        code = ("/usr/bin/python3", "-I", "-c", BYSTANDER)
        bystander = self.lab.spawn_graft("--name", "bystander", *code, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.bystander = Program(bystander, Who("", "bystander"))
        self.bystander.up()

    def settings(self, who: Who) -> dict[str, Any]:
        """Where sockets are given and taken."""
        return {"box": "-".join(who), "boxes": ["-".join(w) for w in self.kinds if w != who]}

    def weigh(self) -> dict[str, tuple[int, int]]:
        """Descriptors and bytes of memory of graft's processes. Raises AssertionError if one is missing."""
        helpers = sorted(self.lab.helper_pids())
        assert len(helpers) == len(self.kinds) + 2, f"{len(helpers)} graft-sup of {len(self.kinds) + 2} live"
        pids = {"graftd": self.lab.daemon_pid(), "keeper": self.lab.keeper_pid()}
        pids |= {f"graft-sup {n}": pid for n, pid in enumerate(helpers)}
        return {f"{name}, pid {pid}": (descriptors(pid), memory(pid)) for name, pid in pids.items()}

    def strays(self) -> list[str]:
        """Who has been where nobody may be. A socket of any container may be in any other."""
        return [f"reached {where} from {source}" for where, source in self.visitors() if not reached("host", where, source)]

    def round(self, seed: int, calls: int) -> tuple[int, Counter[str], list[str]]:
        """A round of every program: how many calls, what came of them, what is wrong."""
        for program in (self.programs[who] for who in self.kinds):
            assert program.process.stdin
            program.process.stdin.write(f"[{json.dumps(seed)}, {calls}]\n")
            program.process.stdin.flush()
        assert self.bystander.process.stdin
        self.bystander.process.stdin.write("0.5\n")
        self.bystander.process.stdin.flush()
        count, outcomes, wrong = 0, Counter[str](), []
        for who in self.kinds:
            answer = self.programs[who].answer()
            count += answer["calls"]
            for operation, results in answer["outcomes"].items():
                outcomes.update({f"{operation} {result}": n for result, n in results.items()})
            wrong += [f"{who.profile}/{who.place}: {line}" for line in answer["told"]]
        _, failed, _ = self.bystander.answer()
        wrong += [f"the bystander: {what}" for what in failed]
        changes = self.changes()
        if any("listens: " in line for line in changes):  # graftd ends those that nobody can reach at its next tick
            time.sleep(STRAY_SECONDS)
            changes = [line for line in changes if "listens: " not in line] + self.changes()
        wrong += [line for line in changes if not any(gap in line for gap in KNOWN)] + self.strays()
        return count, outcomes, wrong


def inside(lab: Lab, seconds: float, seed: int, *, tell: bool = False) -> dict[str, Any]:
    """Do rounds for @seconds. Raises AssertionError, which says what is wrong, and by which seed.

    Returns the number of rounds, calls, and different outcomes.
    """
    world = Inside(lab)
    end = time.monotonic() + seconds
    number = total = 0
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    first: dict[str, tuple[int, int]] = {}
    while time.monotonic() < end or number < SETTLED:
        count, outcomes, found = world.round(seed + number, CALLS)
        total += count
        seen += outcomes
        weight = world.weigh()
        if number == SETTLED - 1:
            first = weight
        if first:
            found += grown(first, weight)
        if found and tell:
            print(f"inside: seed {seed + number}: " + "\n    ".join(found[:20]), flush=True)
        wrong += [f"seed {seed + number}: {line}" for line in found]
        number += 1
        if tell and number % 20 == 0:
            print(f"inside: {number} rounds, {total} calls, {len(seen)} outcomes", flush=True)
        assert len(wrong) < 200, "\n".join(wrong)
    assert not wrong, "\n".join(wrong)
    return {"rounds": number, "calls": total, "outcomes": len(seen), "seed": seed}


def grown(first: dict[str, tuple[int, int]], now: dict[str, tuple[int, int]]) -> list[str]:
    """Which of graft's processes is another, or holds more than it did."""
    found = [f"{name} is no more" for name in first if name not in now]
    for name, (fds, size) in now.items():
        before = first.get(name, (fds, size))
        if fds > before[0] + DESCRIPTOR_GROWTH:
            found.append(f"{name}: {before[0]} descriptors became {fds}")
        if size > before[1] + MEMORY_GROWTH:
            found.append(f"{name}: {before[1]} bytes became {size}")
    return found


def main() -> None:
    """Run from the command line. What is wrong ends it with status 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the laboratory would stay behind
    with laboratory("inside") as lab:
        try:
            found = inside(lab, arguments.seconds, arguments.seed, tell=True)
        except AssertionError as error:
            print(f"inside: FAILED: {error}", file=sys.stderr)
            raise SystemExit(1) from None
    print("inside: OK,", ", ".join(f"{name} {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
