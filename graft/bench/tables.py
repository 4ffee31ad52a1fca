"""Cost of bind() and connect() in a large table: 2 endpoints and rules against 10,000 of each.

Two wrappers run side by side, each in a netns with its own table, and are measured in turn. The result is the median
of the ratios by pairs. The kernel looks rules up in tries (docs/design.md), so the ratio should stay near 1.
"""

import json
import statistics
import subprocess
import tempfile
from pathlib import Path

from graft.bench.lab import CLIENT4, GRAFT, HOST4, IP_GRAFT, Lab, wait_for

MANY = 10000
WORDS = 40000  # at most so many of rules on one command line
CALLS = {"bind": 300, "connect": 50000}


def _compile(directory: Path) -> Path:
    program = directory / "calls"
    subprocess.run(("clang", "-O2", Path(__file__).with_name("calls.c"), "-o", program), check=True)
    return program


def _rules(count: int) -> tuple[list[str], str]:
    """Return rules for a command line and a batch of endpoints: half ingress, half egress, with the ones in use."""
    half = max(count // 2, 1)
    words: list[str] = []
    lines: list[str] = []
    for n in range(1, half + 1):
        lines.append(f"add in-{n} type ipv4 addr {HOST4} port dynamic")
        words += ["-i", f"0.0.0.0:{6000 + n}=in-{n}"]
    for n in range(half):
        lines.append(f"add out-{n} type ipv4 addr {HOST4} port dynamic")
        prefix = f"{CLIENT4}/32" if n == 0 else f"10.{80 + n // 65536}.{n // 256 % 256}.{n % 256}/32"
        words += ["-e", f"{prefix}=out-{n}"]
    return words, "\n".join(lines)


def compare(lab: Lab, pairs: int, many: int = MANY) -> dict[str, dict[str, float]]:
    """Return medians by call: nanoseconds with few rules and with @many, and their ratio."""
    with tempfile.TemporaryDirectory(prefix="graft-bench-") as directory:
        program = _compile(Path(directory))
        running = []
        namespaces = []
        try:
            for count in (2, many):
                name = f"{lab.tag}-{count}"
                namespaces.append(name)
                lab.ip("netns", "add", name)
                words, batch = _rules(count)
                ip_graft = (IP_GRAFT, "-n", name, "-batch", "-")
                subprocess.run(lab.in_host(*ip_graft), input=batch, text=True, check=True, env=lab.env)
                wrapper = (GRAFT, "--netns", name, *words[:WORDS], "--", program, CLIENT4, "6001")
                running.append(lab.spawn(*wrapper, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
                if words[WORDS:]:
                    _add_rules(lab, running[-1].pid, words[WORDS:])
            return {call: _measure(running, call, calls, pairs) for call, calls in CALLS.items()}
        finally:
            for process in running:
                lab.end(process)
            for name in namespaces:
                if Path("/run/netns", name).exists():
                    lab.ip("netns", "del", name)


def _add_rules(lab: Lab, pid: int, words: list[str]) -> None:
    """Add the rules that did not fit on the wrapper's command line."""

    def name() -> str:
        told = json.loads(lab.graft("ps", "-j", check=True).stdout)
        return next((str(entry["name"]) for entry in told if entry["pid"] == pid), "")

    container = wait_for(name, "the wrapper", 30)
    for at in range(0, len(words), WORDS):
        lab.graft("rule", "add", container, *words[at : at + WORDS], check=True)


def _measure(running: list["subprocess.Popen[str]"], call: str, calls: int, pairs: int) -> dict[str, float]:
    samples: list[list[float]] = [[], []]
    for turn in range(pairs + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        for which in order:
            stdin, stdout = running[which].stdin, running[which].stdout
            assert stdin
            assert stdout
            stdin.write(f"{call} {calls}\n")
            stdin.flush()
            samples[which].append(float(stdout.readline()))
    few, many = samples[0][1:], samples[1][1:]  # the first pair warms up
    return {
        "few_ns": statistics.median(few),
        "many_ns": statistics.median(many),
        "ratio": statistics.median(b / a for a, b in zip(few, many, strict=True)),
    }
