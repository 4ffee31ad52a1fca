"""What each container has done so far, as numbers: for `graft stats`, `graft top`, and the page of metrics.

Everything is read from what is counted anyway: BPF maps, the kernel's TCP sockets, the journals of trapped calls. The
reading is done in the thread that asks for the open sockets, so it costs the loop nothing.
"""

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from graft.daemon.open_sockets import OpenSockets, Owned
from graft.kernel.cgroup import cgroup_of
from graft.kernel.direct import directory_of
from graft.kernel.open_sockets import STATES
from graft.kernel.traffic import Datagrams, Traffic, closed_traffic, counted_datagrams
from graft.process.title import SUP
from graft.tenants.registry import Registry
from graft.trap.listeners import Listeners
from graft.trap.spent import Spent

UNCONNECTED = {"LISTEN", "SYN-SENT", "SYN-RECV", "NEW-SYN-RECV", "CLOSE"}
PAGE = os.sysconf("SC_PAGE_SIZE")


class Stats(NamedTuple):
    """One container or wrapper. Bytes, segments and connections are of TCP, and have only ever grown."""

    name: str
    number: int
    sockets: int  # that its programs have made, of TCP and UDP
    datagram_sockets: int
    open_in: int  # connections now
    open_out: int
    traffic: Traffic
    refused: dict[tuple[str, str], int]  # by operation and reason
    unreported: int
    spent: Spent
    datagrams: Datagrams
    memory: int  # of its graft-sup, bytes
    rate: int  # the bound of each of its TCP sockets, bytes a second; 0: none

    @property
    def document(self) -> dict[str, Any]:
        """In JSON."""
        return {
            "name": self.name,
            "id": self.number,
            "sockets": self.sockets,
            "datagram_sockets": self.datagram_sockets,
            "open_in": self.open_in,
            "open_out": self.open_out,
            **self.traffic._asdict(),
            "udp": self.datagrams._asdict(),
            "refused": [
                {"op": op, "reason": reason, "count": count} for (op, reason), count in sorted(self.refused.items())
            ],
            "unreported": self.unreported,
            "trapped_calls": self.spent.calls,
            "trapped_call_seconds": self.spent.ns / 1e9,
            "trapped_call_buckets": self.spent.counts,
            "memory": self.memory,
            "rate": self.rate,
        }


class Counting:
    """Gathers the numbers of all tenants. For the loop's thread."""

    def __init__(self, registry: Registry, sockets: OpenSockets, calls: Listeners) -> None:
        self.registry = registry
        self.sockets = sockets
        self.calls = calls
        self._most: dict[int, Traffic] = {}  # what was told already: a connection that is being closed counts once

    def ask(self, then: Callable[[Any], None], also: Callable[[list[Owned]], Any] | None = None) -> None:
        """Have @then called, in the loop, with the numbers of all tenants, by name.

        With @also, with these and what that makes, in a thread, of the open sockets.
        """
        tenants = [(t.id, t.name, t.rate) for t in self.registry.tenants.values()]
        spent = self.calls.spent()
        self._most = {number: most for number, most in self._most.items() if number in self.registry.tenants}

        def work(owned: list[Owned]) -> list[Stats] | tuple[list[Stats], Any]:
            carried, memory = _carried(owned), _memory()
            refused = self.registry.kernel.all_counters()
            found = []
            for number, name, rate in tenants:
                open_in, open_out, now = carried.get(number, (0, 0, Traffic()))
                used = self.registry.kernel.used(number)
                done = closed_traffic(self.registry.kernel.maps["traffic"], number)
                found.append(
                    Stats(
                        name,
                        number,
                        used.sockets,
                        used.udp,
                        open_in,
                        open_out,
                        self._grown(number, Traffic._make(map(sum, zip(done, now, strict=True)))),
                        refused.get(number, {}),
                        self.registry.kernel.reports.dropped(number),
                        spent.get(number, Spent()),
                        counted_datagrams(self.registry.kernel.maps["datagrams"], number),
                        memory.get(name, 0),
                        rate,
                    )
                )
            found.sort(key=lambda one: one.name)
            return (found, also(owned)) if also else found

        self.sockets.ask(then, work)

    def _grown(self, number: int, traffic: Traffic) -> Traffic:
        before = self._most.get(number, Traffic())
        grown = self._most[number] = Traffic._make(map(max, zip(before, traffic, strict=True)))
        return grown


def _carried(owned: Iterable[Owned]) -> dict[int, tuple[int, int, Traffic]]:
    """Connections in and out of each tenant that a program has open, and what they have carried."""
    sums: defaultdict[int, list[int]] = defaultdict(lambda: [0] * len(Traffic._fields))
    for one in owned:
        sock = one.socket
        if not sock.inode or not sock.peer[1] or STATES[sock.state] in UNCONNECTED or not sock.segments_out:
            continue  # UDP, or closed by its program already, which the kernel half has counted
        traffic = (one.accepted, not one.accepted, sock.received, sock.sent, sock.segments_in, sock.segments_out)
        sums[one.tenant] = [before + more for before, more in zip(sums[one.tenant], traffic, strict=True)]
    return {number: (values[0], values[1], Traffic._make(values)) for number, values in sums.items()}


def _memory() -> dict[str, int]:
    """The resident memory of each graft-sup, in bytes, by its container's name."""
    found: dict[str, int] = {}
    processes = directory_of(cgroup_of(os.getpid())) / "cgroup.procs"
    for pid in processes.read_text().split():
        with contextlib.suppress(OSError, IndexError):  # it has just ended
            title, name, *_ = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if title == SUP:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[name] = found.get(name, 0) + pages * PAGE
    return found
