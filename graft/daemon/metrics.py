"""The page of metrics, in the text format of Prometheus or in that of OpenMetrics.

Names are by Prometheus' conventions (prometheus.io/docs/practices/naming): base units, `_total` of what only grows.
promtool checks them in the tests. The two formats differ in the names of counters in HELP and TYPE, and in the end.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from graft import __version__
from graft.daemon.stats import Stats
from graft.trap.spent import BOUNDS

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PAGE = os.sysconf("SC_PAGE_SIZE")
Sample = tuple[str, dict[str, str], float]  # what follows the name, labels, the value


class Family(NamedTuple):
    """A metric: its name without `_total`, its type, what it is, and its samples."""

    name: str
    kind: str
    what: str
    samples: Iterable[Sample]


class Own(NamedTuple):
    """What graftd says of itself."""

    readers: int
    readers_closed: int
    lines_lost: int


def page(stats: list[Stats], own: Own, *, openmetrics: bool) -> bytearray:
    """The page as it is sent. Of a thousand containers it is 2 MB, so it is in memory once."""
    out = bytearray()
    for family in _families(stats, own):
        counter = family.kind == "counter"
        named = family.name if openmetrics or not counter else f"{family.name}_total"
        out += f"# HELP {named} {family.what}\n# TYPE {named} {family.kind}\n".encode()
        for suffix, labels, value in family.samples:
            name = f"{family.name}{'_total' if counter else suffix}"
            out += f"{name}{_labels(labels)} {_number(value)}\n".encode()
    if openmetrics:
        out += b"# EOF\n"
    return out


def _families(stats: list[Stats], own: Own) -> Iterator[Family]:
    yield Family("graft_build_info", "gauge", "The version of graftd.", [("", {"version": __version__}, 1)])
    yield Family("graft_containers", "gauge", "Containers and wrappers that run.", [("", {}, len(stats))])
    yield Family("graft_sockets", "gauge", "Sockets that count against a container's limit.", _sockets(stats))
    yield Family("graft_connections_open", "gauge", "Open TCP connections.", _both(stats, "open_in", "open_out"))
    yield Family("graft_connections", "counter", "TCP connections so far.", _both(stats, "accepted", "connected"))
    for name, field, what in (
        ("graft_received_bytes", "received", "Bytes received over TCP."),
        ("graft_sent_bytes", "sent", "Bytes sent over TCP, without what was sent again."),
        ("graft_received_segments", "segments_received", "TCP segments received."),
        ("graft_sent_segments", "segments_sent", "TCP segments sent."),
    ):
        yield Family(name, "counter", what, [("", _of(one), getattr(one.traffic, field)) for one in stats])
    for name, field, what in (
        ("graft_udp_received_bytes", "bytes_received", "Bytes received over UDP."),
        ("graft_udp_sent_bytes", "bytes_sent", "Bytes sent over UDP."),
        ("graft_udp_received_datagrams", "received", "Datagrams received."),
        ("graft_udp_sent_datagrams", "sent", "Datagrams sent."),
    ):
        counted = [("", _of(one), getattr(one.datagrams, field)) for one in stats if any(one.datagrams)]
        yield Family(name, "counter", f"{what} Counted where graft.toml says count_datagrams.", counted)
    rates = [("", _of(one), one.rate) for one in stats if one.rate]
    yield Family("graft_socket_rate_limit_bytes", "gauge", "What each TCP socket may send in a second.", rates)
    yield Family("graft_refusals", "counter", "Calls that the policy refused.", _refusals(stats))
    yield Family(
        "graft_unreported",
        "counter",
        "Calls that the log has no line for, because there were too many.",
        [("", _of(one), one.unreported) for one in stats],
    )
    yield Family(
        "graft_trapped_call_seconds", "histogram", "How long it took to answer a trapped call.", _histograms(stats)
    )
    yield Family(
        "graft_sup_resident_memory_bytes",
        "gauge",
        "Resident memory of a container's graft-sup.",
        [("", _of(one), one.memory) for one in stats if one.memory],
    )
    yield Family("graft_log_readers", "gauge", "Readers of the log.", [("", {}, own.readers)])
    yield Family(
        "graft_log_readers_closed", "counter", "Readers of the log that did not read.", [("", {}, own.readers_closed)]
    )
    yield Family("graft_log_lines_lost", "counter", "Lines that those did not get.", [("", {}, own.lines_lost)])
    yield Family("process_resident_memory_bytes", "gauge", "graftd's resident memory.", [("", {}, _resident())])
    yield Family("process_cpu_seconds", "counter", "graftd's processor time.", [("", {}, sum(os.times()[:2]))])


def _of(one: Stats) -> dict[str, str]:
    return {"container": one.name}


def _sockets(stats: list[Stats]) -> Iterator[Sample]:
    for one in stats:
        yield "", {**_of(one), "protocol": "tcp"}, one.sockets - one.datagram_sockets
        yield "", {**_of(one), "protocol": "udp"}, one.datagram_sockets


def _both(stats: list[Stats], incoming: str, outgoing: str) -> Iterator[Sample]:
    for one in stats:
        for direction, field in (("in", incoming), ("out", outgoing)):
            value = getattr(one, field) if hasattr(one, field) else getattr(one.traffic, field)
            yield "", {**_of(one), "direction": direction}, value


def _refusals(stats: list[Stats]) -> Iterator[Sample]:
    for one in stats:
        for (operation, reason), count in sorted(one.refused.items()):
            yield "", {**_of(one), "operation": operation, "reason": reason}, count


def _histograms(stats: list[Stats]) -> Iterator[Sample]:
    for one in stats:
        below = 0
        if not one.spent.calls:
            continue
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), one.spent.counts, strict=True):
            below += count
            yield "_bucket", {**_of(one), "le": bound}, below
        yield "_sum", _of(one), one.spent.ns / 1e9
        yield "_count", _of(one), below


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
