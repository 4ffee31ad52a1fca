"""Runs sequences on a host and under graft, and finds the calls that differ.

The host is a namespace with the addresses that a container's sockets have under graft, beside a namespace that plays another
machine; graft's is a laboratory (graft.bench.lab), whose client is the other machine. No connection stays in TIME_WAIT there,
so that sequences do not meet each other's, and no ICMP is held back.

A difference that no rule explains is looked at again with patience: what comes from another machine, or by an interrupt, may
not have been there yet.
"""

import json
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.bench.lab import CLIENT4, CLIENT6, HOST4, HOST6, SLOWNESS, Lab, laboratory, wait_for
from tests.system.differential import sequences
from tests.system.differential.sequences import Call

HERE = Path(__file__).parent
PYTHON = ("/usr/bin/python3", "-I")
OWN4, OWN6 = "10.77.0.9", "2001:db8:77::9"
SETTINGS = ("net.ipv4.tcp_max_tw_buckets=0", "net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")  # of the namespaces
BATCH = 50  # sequences that a program gets at once
PATIENCE = (0.01, 0.05 * SLOWNESS)  # s: of a second and a third run, before a difference is one
Answers = list[str]
Batch = list[list[Call]]


class Program:
    """program.py, somewhere."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.read()

    def read(self) -> Any:
        """The next answer. Raises RuntimeError if the program has ended."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the program ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, batch: Batch, patience: float) -> None:
        """Give it sequences."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([(patience, one) for one in batch]) + "\n")
        self.process.stdin.flush()


@dataclass
class Pair:
    """A variant's two programs."""

    host: Program
    graft: Program

    def ask(self, batch: Batch, patience: float = 0) -> None:
        """Give both the sequences."""
        self.host.ask(batch, patience)
        self.graft.ask(batch, patience)

    def read(self) -> list[tuple[Answers, Answers]]:
        """What came of them on the host, and under graft."""
        return list(zip(self.host.read(), self.graft.read(), strict=True))


@dataclass
class Difference:
    """A call that differs, and what was before it."""

    seed: int
    variant: str
    calls: list[Call]
    host: Answers
    graft: Answers
    at: int

    @property
    def call(self) -> Call:
        """The call that differs."""
        return self.calls[self.at]

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.variant}:"]
        for call, told in zip(self.calls[: self.at], self.host, strict=False):
            lines.append(f"    {sequences.shown(call):60} {told}")
        lines += [f"    {sequences.shown(self.call):60} {self.host[self.at]}, under graft {self.graft[self.at]}", ""]
        return "\n".join(lines)


def difference(seed: int, variant: str, calls: list[Call], host: Answers, graft: Answers) -> Difference | None:
    """The first call that differs."""
    for at, (one, other) in enumerate(zip(host, graft, strict=True)):
        if one != other:
            return Difference(seed, variant, calls, host, graft, at)
    return None


class World:
    """The namespaces and programs."""

    def __init__(self, stack: ExitStack) -> None:
        self.lab = stack.enter_context(laboratory("diff"))
        self._own(self.lab, OWN4, OWN6, spare=True)
        self.pairs = {}
        outside = self._outside(self.lab)
        options: dict[str, tuple[str, ...]] = {"plain": (), "ip": ("--ip", OWN4, "--ip", OWN6), "published": ()}
        for port in sequences.FIXED:
            for protocol in ("tcp", "udp"):
                options["published"] += ("-p", f"{port}:{port}/{protocol}")
        for variant in sequences.VARIANTS:
            own4, own6 = (OWN4, OWN6) if variant == "ip" else (HOST4, HOST6)
            host, path = self._host(stack, own4, own6)  # each its own: what one has bound is in no other's way
            graft = ("--name", variant, *options[variant], "--", *self._command(own4, own6, outside))
            self.pairs[variant] = Pair(
                Program(host.spawn(*self._command(own4, own6, path), stdin=-1, stdout=-1)),
                Program(self.lab.spawn_graft(*graft, stdin=-1, stdout=-1)),
            )

    @staticmethod
    def _command(own4: str, own6: str, outside: Path) -> tuple[str, ...]:
        names = {"own4": own4, "own6": own6, "out4": CLIENT4, "out6": CLIENT6}
        config = {"names": names, "fixed": [*sequences.FIXED, sequences.ECHO, sequences.NOBODY], "outside": str(outside)}
        return (*PYTHON, str(HERE / "program.py"), json.dumps(config))

    @staticmethod
    def _own(lab: Lab, own4: str, own6: str, *, spare: bool = False) -> None:
        """Give the host these addresses. @spare: the kernel does not choose them as a source."""
        lab.ip("-n", lab.host_ns, "address", "add", f"{own4}/24", "dev", "veth0")
        unused = ("preferred_lft", "0") if spare else ()
        lab.ip("-n", lab.host_ns, "address", "add", f"{own6}/64", "dev", "veth0", "nodad", *unused)

    def _host(self, stack: ExitStack, own4: str, own6: str) -> tuple[Lab, Path]:
        """A host that has these addresses alone."""
        lab = stack.enter_context(laboratory("diff"))
        lab.ip("-n", lab.host_ns, "address", "flush", "dev", "veth0", "scope", "global")
        self._own(lab, own4, own6)
        return lab, self._outside(lab)

    @staticmethod
    def _outside(lab: Lab) -> Path:
        path = lab.work / "outside"
        lab.spawn(*PYTHON, str(HERE / "outside.py"), str(path), client=True)
        wait_for(path.exists, "the other machine")
        for where in (lab.host, lab.client):
            where("sysctl", "-qw", *SETTINGS, check=True)
        return path

    def look(self, seeds: Sequence[int], explained: Callable[[Difference], Any]) -> Iterator[Difference]:
        """Run the sequences of @seeds; those that differ, of which @explained is not true also with patience."""
        waiting: dict[str, list[int]] = defaultdict(list)
        for seed in seeds:
            waiting[sequences.variant(seed)].append(seed)
        while any(waiting.values()):
            asked = {}
            for variant, rest in waiting.items():
                mine, waiting[variant] = rest[:BATCH], rest[BATCH:]
                asked[variant] = [(seed, sequences.sequence(seed)) for seed in mine]
                self.pairs[variant].ask([calls for _, calls in asked[variant]])
            for variant, batch in asked.items():
                for (seed, calls), (host, graft) in zip(batch, self.pairs[variant].read(), strict=True):
                    found = difference(seed, variant, calls, host, graft)
                    if found and not explained(found):
                        found = self.again(seed, variant, calls)
                    if found:
                        yield found

    def again(self, seed: int, variant: str, calls: list[Call], tries: Sequence[float] = PATIENCE) -> Difference | None:
        """Run a sequence with patience, and with more if a call differs."""
        found = None
        for patience in tries:
            self.pairs[variant].ask([calls], patience)
            [(host, graft)] = self.pairs[variant].read()
            found = difference(seed, variant, calls, host, graft)
            if not found:
                break
        return found

    def shrink(self, found: Difference, also: Callable[[Difference], bool]) -> Difference:
        """Leave out calls while the last call of the sequence, of the same kind, differs, and @also is true."""
        calls = found.calls[: found.at + 1]
        number = len(calls) - 1
        while number > 0:
            number -= 1
            fewer = calls[:number] + calls[number + 1 :]
            again = self.again(found.seed, found.variant, fewer, PATIENCE[:1])
            if again and again.at == len(fewer) - 1 and again.call[0] == found.call[0] and also(again):
                calls, found = fewer, again
        return found


@contextmanager
def world() -> Iterator[World]:
    """Open the namespaces and start the programs."""
    with ExitStack() as stack:
        yield World(stack)
