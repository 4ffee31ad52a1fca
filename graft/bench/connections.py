"""Cases of connections: opened and closed, or with a request and its response, by a C and by a static Go program.

No library can be preloaded into the Go program, and its runtime makes and polls its sockets as Go programs do.
"""

from collections.abc import Callable, Iterator

from graft.bench.case import PER_SECOND, Case, Figures, Measure, Scale
from graft.bench.lab import CLIENT4, Lab, wait_for
from graft.bench.peer import Peer

C, GO = "load", "load-go"  # the programs, in the laboratory's work directory
OUT_PORT = 9000
SERVERS = {("serve", C): OUT_PORT, ("reply", C): 9001, ("serve", GO): 9002, ("reply", GO): 9003}
PASSED = ("passed",)
ACCEL = ("graft-accel",)  # the library changes nothing but socket() of a dynamic program


def _rate(told: str) -> Figures:
    return {"rate": 1e6 / float(told.strip())}


def _inwards(peer: Peer, scale: Scale, kind: tuple[str, str], clients: int) -> Measure:
    """Connections to a server in the peer, from the client's namespace. @kind: what server and client do."""
    program = peer.lab.work / C
    address, port = peer.serve(5, (program, kind[0], "{port}"))
    words = (scale.requests // clients, clients)
    return lambda: _rate(peer.lab.client(program, kind[1], address, port, *words, check=True).stdout)


def _shared_server(lab: Lab, act: str, program: str) -> int:
    """The port of a server in the client's namespace that all peers share."""
    port = SERVERS[act, program]

    def listening() -> bool:
        return bool(lab.client("ss", "-tlnH", f"sport = :{port}").stdout)

    if not listening():
        lab.spawn(lab.work / program, act, port, client=True)
        wait_for(listening, "the server")
    return port


def _outwards(
    peer: Peer, scale: Scale, kind: tuple[str, str], clients: int, *, program: str = C, hogs: int = 0
) -> Measure:
    """Connections out of the peer. @hogs: how many busy loops run on the host at the same time."""
    lab = peer.lab
    port = _shared_server(lab, kind[0], program)

    def measure() -> Figures:
        busy = [lab.spawn("sh", "-c", "while :; do :; done") for _ in range(hogs)]
        try:
            words = (scale.requests // clients, clients)
            return _rate(peer.run(lab.work / program, kind[1], CLIENT4, port, *words, check=True).stdout)
        finally:
            for process in busy:
                lab.end(process)
                lab.started.remove(process)

    return measure


def near_latency(peer: Peer, scale: Scale) -> Measure:
    """Latency between containers, not by sockperf: it gives sendto() an address, which a unix socket refuses."""
    program = peer.lab.work / C
    _, port = peer.serve(1, (program, "answer", "{port}"))

    def measure() -> Figures:
        told = peer.run(program, "ask", peer.neighbour(), port, scale.requests, check=True).stdout.split()
        return {"p50": float(told[0]), "p99": float(told[1])}

    return measure


SHORT, REQUEST = ("serve", "connect"), ("reply", "request")


def _case(name: str, title: str, setup: Callable[[Peer, Scale], Measure], tool: str, also: tuple[str, ...]) -> Case:
    return Case(name, title, {"rate": PER_SECOND}, setup, (tool,), also=also)


def _in(name: str, title: str, kind: tuple[str, str]) -> Iterator[Case]:
    """A case with one client, and one with eight."""
    yield _case(name, f"{title}, 1 client", lambda peer, scale: _inwards(peer, scale, kind, 1), "cc", PASSED)
    yield _case(f"{name}-8", f"{title}, 8 clients", lambda peer, scale: _inwards(peer, scale, kind, 8), "cc", PASSED)


def _out(name: str, title: str, kind: tuple[str, str], program: str) -> Iterator[Case]:
    """The same, out of the peer."""
    tool, also, suffix = ("cc", ACCEL, "") if program == C else ("go", (), ", static Go")

    def case(name: str, clients: str, processes: int) -> Case:
        def setup(peer: Peer, scale: Scale) -> Measure:
            return _outwards(peer, scale, kind, processes, program=program)

        return _case(name, f"{title}, {clients}{suffix}", setup, tool, also)

    yield case(name, "1 client", 1)
    yield case(f"{name}-8", "8 clients", 8)


CONNECTIONS: tuple[Case, ...] = (
    *_in("short-in", "connections in", SHORT),
    *_out("short-out", "connections out", SHORT, C),
    _case(
        "short-out-hogs",
        "connections out, 1 client, beside two busy loops",
        lambda peer, scale: _outwards(peer, scale._replace(requests=scale.requests // 4), SHORT, 1, hogs=2),
        "cc",
        ACCEL,
    ),
    *_out("short-out-go", "connections out", SHORT, GO),
    *_in("crr-in", "connect, 100 bytes, close: in", REQUEST),
    *_out("crr-out", "connect, 100 bytes, close: out", REQUEST, C),
    *_out("crr-out-go", "connect, 100 bytes, close: out", REQUEST, GO),
)
