"""The result of a benchmark, as it is written to JSON: every sample, and facts about the machine."""

import platform
import statistics
import subprocess
from pathlib import Path

import msgspec

from graft import __version__

FORMAT = 2  # 1 had no `partial`


class Row(msgspec.Struct, forbid_unknown_fields=True):
    """One figure of one case, with one sample per peer and round. Samples at the same index are a pair."""

    case: str
    figure: str
    title: str
    unit: str
    better: str  # more, less
    samples: dict[str, list[float]]

    def rounds(self) -> int:
        """How many rounds it has."""
        return max(map(len, self.samples.values()), default=0)

    def median(self, peer: str) -> float:
        """Return the median of a peer's samples."""
        return statistics.median(self.samples[peer])

    def ratios(self, peer: str, base: str = "host") -> list[float]:
        """Return the ratios of @peer to @base by pairs, sorted. Above 1 the peer is better, whatever the unit."""
        pairs = zip(self.samples.get(peer, ()), self.samples.get(base, ()), strict=False)
        found = [(a / b if self.better == "more" else b / a) for a, b in pairs if a > 0 and b > 0]
        return sorted(found)


class Growth(msgspec.Struct, forbid_unknown_fields=True):
    """One figure of the scale cases (graft/bench/scale.py)."""

    case: str
    title: str
    value: float
    unit: str
    note: str = ""


class Skipped(msgspec.Struct, forbid_unknown_fields=True):
    """A case that did not run in a peer, and why."""

    case: str
    peer: str
    reason: str


class Partial(msgspec.Struct, forbid_unknown_fields=True):
    """A run that was stopped: the result has the rounds that were done by then, and no part of another."""

    why: str
    rounds: int  # done, of all cases; each of the growth cases counts as one
    of: int
    of_a_case: int  # rounds of each case, as asked for

    def __str__(self) -> str:
        return f"partial: {self.rounds} of {self.of} rounds, {self.why}"


class Result(msgspec.Struct, forbid_unknown_fields=True):
    """A whole run. @format: FORMAT of the version that wrote it."""

    format: int
    graft: str
    started: str  # ISO 8601, UTC
    seconds: float
    quick: bool
    machine: dict[str, str]
    peers: dict[str, str]  # name: title
    rows: list[Row]
    growth: list[Growth]
    skipped: list[Skipped]
    partial: Partial | None = None  # None: the run is whole


def machine() -> dict[str, str]:
    """Return what the figures depend on: kernel, processor, memory, versions; "" for what is not installed."""
    model, cores = "unknown", 0
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model, cores = line.partition(":")[2].strip(), cores + 1
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "graft": __version__,
        "kernel": platform.release(),
        "system": next(
            (line[13:].strip('"') for line in _lines("/etc/os-release") if line.startswith("PRETTY_NAME=")), "unknown"
        ),
        "cpu": f"{cores} x {model}",
        "memory": f"{int(memory) // 1024} MiB",
        "virtual machine": _output("systemd-detect-virt") or "unknown",
        "load at start": _lines("/proc/loadavg")[0],
        "docker": _output("dockerd", "--version"),
        "runc": _output("runc", "--version"),
        "go": _output("go", "version"),
        "pasta": _output("pasta", "--version"),
        "slirp4netns": _output("slirp4netns", "--version"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return [""]


def _output(*argv: str) -> str:
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.strip().partition("\n")[0]
