"""What takes a resource of the host away, and what counts a bystander's calls. Runs inside; see ../test_exhaustion.py.

usage: main() with the arguments WHAT HOST CLIENT. A taker takes as much as it gets, prints how much and why it ended, and
keeps it until its stdin ends. The bystander prints what its calls came to for each line that it reads.
"""

import contextlib
import ctypes
import errno
import json
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6
ECHO, ACCEPTS = 9400, 9401
# A server for each bystander and, from UNASKED on, for the last test: a TIME_WAIT takes a port to one server.
ASKED_BY = {"host": ACCEPTS + 1, "container": ACCEPTS + 2}
UNASKED = ACCEPTS + 3
libc = ctypes.CDLL(None)
TAKERS: dict[str, Callable[[], str]] = {}
ENOUGH = 5000
ROUNDS = 40
kept: list[socket.socket] = []
HOST, CLIENT = "", ""


def taker(function):
    TAKERS[function.__name__] = function
    return function


def until_refused(take: Callable[[], socket.socket | None]) -> str:
    """Take up to ENOUGH, or until a call fails: how many, and the errno."""
    count = 0
    while count < ENOUGH:
        try:
            one = take()
        except OSError as error:
            return f"{count} {errno.errorcode[error.errno or 0]}"
        count += 1
        if one is not None:
            kept.append(one)
    return f"{count} OK"


def bound(family, kind, address):
    sock = socket.socket(family, kind)
    sock.bind((address, 0))
    return sock


@taker
def private_tcp_ports():
    return until_refused(lambda: bound(V4, TCP, "127.0.0.1"))


@taker
def private_tcp_ports_6():
    return until_refused(lambda: bound(V6, TCP, "::"))


@taker
def private_udp_ports():
    return until_refused(lambda: bound(V4, UDP, "127.0.0.1"))


@taker
def accepted_sockets_that_listen():
    """Each would have a port of the kernel's choice, at an address of its server's."""
    server = bound(V4, TCP, "127.0.0.1")
    server.listen()

    def take():
        with socket.create_connection(server.getsockname()):
            sock, _ = server.accept()
        libc.connect(sock.fileno(), bytes(16), 16)  # AF_UNSPEC: it is disconnected
        sock.listen()
        return sock

    return until_refused(take)


@taker
def udp_ports_of_the_host():
    return until_refused(lambda: bound(V4, UDP, "0.0.0.0"))


@taker
def udp_ports_by_sending():
    """Goes on when its datagrams are refused, because the kernel has bound the socket before."""

    def send():
        sock = socket.socket(V4, UDP)
        with contextlib.suppress(OSError):
            sock.sendto(b"", (CLIENT, ECHO))
        return sock

    return until_refused(send)


@taker
def udp_ports_by_connecting():
    def connect():
        sock = socket.socket(V4, UDP)
        sock.connect((CLIENT, ECHO))
        return sock

    return until_refused(connect)


@taker
def connections():
    """Open ones, to one server: each has a port of its own, and so has each TIME_WAIT."""

    def connect():
        sock = socket.socket(V4, TCP)
        sock.connect((CLIENT, ACCEPTS))
        return sock

    return until_refused(connect)


@taker
def time_waits():
    def connect():
        with socket.socket(V4, TCP) as sock:
            sock.connect((CLIENT, ACCEPTS))

    return until_refused(connect)


@taker
def connections_to_itself():
    server = bound(V4, TCP, "127.0.0.1")
    server.listen(4096)
    kept.append(server)

    def connect():
        sock = socket.socket(V4, TCP)
        sock.connect(server.getsockname())
        server.accept()[0].close()
        sock.close()

    return until_refused(connect)


@taker
def dynamic_endpoints():
    """A rule gives each port of the wildcard a port that the kernel chooses, when it is used."""
    ports = iter(range(1, 65536))

    def serve():
        sock = socket.socket(V4, TCP)
        sock.bind(("0.0.0.0", next(ports)))
        sock.listen()
        return sock

    return until_refused(serve)


@taker
def sockets():
    return until_refused(lambda: socket.socket(V4, TCP))


def flood(work: Callable[[], object]) -> str:
    """Threads that do @work until the end."""

    def again():
        while True:
            with contextlib.suppress(OSError):
                work()

    for _ in range(16):
        threading.Thread(target=again, daemon=True).start()
    time.sleep(0.2)
    return "0 OK"


@taker
def slots_and_threads():
    """Calls that wait in the journal, and for a thread of graftd's."""

    def listen():
        with socket.socket(V4, TCP) as sock:
            sock.listen()

    return flood(listen)


@taker
def log_and_reports():
    """Refusals, each of which is reported."""
    sock = socket.socket(V4, UDP)

    def refused():
        time.sleep(0.001)
        sock.sendto(b"", ("203.0.113.1", 9))

    return flood(refused)


def calls(bystander: str) -> dict[str, Callable[[], object]]:
    """The calls of a bystander, by name."""

    def connect():
        with socket.create_connection((CLIENT, ASKED_BY[bystander]), 5):
            pass

    def ask():
        with socket.socket(V4, UDP) as sock:
            sock.settimeout(5)
            sock.sendto(b"?", (CLIENT, ECHO))
            sock.recv(9)

    def itself():
        with socket.socket(V4, TCP) as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            with socket.create_connection(server.getsockname(), 5):
                pass

    def datagrams():
        with socket.socket(V4, UDP) as sock:
            sock.bind(("0.0.0.0", 0))

    def listen():
        with socket.socket(V4, TCP) as server:
            server.bind(("0.0.0.0", 0))
            server.listen()

    found = {"connect": connect, "ask": ask, "itself": itself, "datagrams": datagrams, "listen": listen}
    return found if bystander == "host" else {name: found[name] for name in ("connect", "ask", "itself", "datagrams")}


def stand_by(bystander: str) -> None:
    """For each line: how many calls failed, and the median of each kind in seconds."""
    kinds = calls(bystander)
    print("up", flush=True)
    for _ in sys.stdin:
        failed, times = [], {}
        for name, call in kinds.items():
            taken = []
            for _ in range(ROUNDS):
                begin = time.perf_counter()
                try:
                    call()
                except OSError as error:
                    failed.append(f"{name}: {error}")
                taken.append(time.perf_counter() - begin)
            times[name] = statistics.median(taken)
        print(json.dumps({"failed": failed, "times": times}), flush=True)


def main() -> None:
    global HOST, CLIENT
    what, HOST, CLIENT = sys.argv[1:]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if what in ("host", "container"):
        stand_by(what)
        return
    print(TAKERS[what](), flush=True)
    sys.stdin.read()
