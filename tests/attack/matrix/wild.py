"""Random sequences of socket calls over shared descriptors, threads and processes. Runs inside a container.

usage: main() with CONFIG as agent.py has it. It reads a JSON list [seed, calls] a line, and answers {"calls": n,
"outcomes": {operation: {errno: n}}, "told": [...]}. What a thread does is decided by the seed; how threads meet is not.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import random
import resource
import signal
import socket
import sys
import threading
from collections import Counter, defaultdict
from typing import Any

from . import calls, sockets
from .agent import Agent, failed, libc

THREADS = 3
TABLE = 48  # descriptors that threads share
ROWS = [
    f"{kind} {family} {what} {state}" for kind in ("socket", "dup") for family in "46"
    for what, states in sockets.STATES.items() for state in states
]  # fmt: skip
ROWS += [f"{kind} {family} tcp connected" for kind in ("accepted", "disconnected") for family in "46"]
ROWS += [f"graft 4 {what} {state}" for what in ("tcp", "udp") for state in ("fresh", "named", "leaving")] * 2
ROWS += ["swapped 4 tcp connected", "unix 4 tcp connected", "native 4 pair fresh", "native 4 netlink fresh", "native 4 raw fresh"]
ODD = (0, 1, 2, 3, 4, 5, 8, 16, 28, 84, 4095, 4097, 8192)


class Wild:
    """The table of descriptors, and the operations that threads choose from."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.agent = Agent(config)
        self.where = self.agent.where
        self.table: list[socket.socket] = []
        self.lock = threading.Lock()
        self.told: list[str] = []
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.names = {six: [*calls.destinations(self.where, six).values(), *calls.binds(self.where, six).values()] for six in (False, True)}
        self.options = calls.options((4,))
        self.requests = calls.requests()
        self.shared = ctypes.create_string_buffer(128)  # an address that another thread changes
        self.box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = f"{os.environ['MATRIX']}/run/{config['box']}"
        self.box.bind(path)
        os.chmod(path, 0o777)
        self.box.setblocking(False)
        self.others = [f"{os.environ['MATRIX']}/run/{name}" for name in config["boxes"]]
        self.operations = [
            (self.make, 12), (self.close, 8), (self.dup, 3), (self.accept, 5), (self.disconnect, 3), (self.bind, 8),
            (self.connect, 10), (self.send, 10), (self.set, 12), (self.get, 6), (self.ioctl, 6), (self.listen, 4),
            (self.shutdown, 2), (self.give, 3), (self.take, 4), (self.racing, 6), (self.read, 3),
        ]  # fmt: skip

    def keep(self, sock: socket.socket) -> None:
        """Put a socket into the table, in another's place if it is full."""
        with contextlib.suppress(OSError):
            fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, os.O_NONBLOCK)
        with self.lock:
            self.table.append(sock)
            if len(self.table) > TABLE:
                self.table.pop(0).close()

    def any(self, chance: random.Random) -> socket.socket:
        """A socket of the table, which another thread may close at any time. Raises OSError if there is none."""
        with self.lock:
            if not self.table:
                raise OSError(errno.EBADF, "none")
            return chance.choice(self.table)

    def name(self, chance: random.Random) -> bytes:
        """An address, of any length."""
        name = chance.choice(self.names[chance.random() < 0.5])
        if chance.random() < 0.1:
            name = name[: chance.randrange(len(name) + 1)]
        if chance.random() < 0.1:
            name = name.ljust(chance.choice((18, 28, 128)), b"\0")
        return name

    def make(self, chance: random.Random) -> str:
        """A socket of any row."""
        for sock in self.agent.maker.make(chance.choice(ROWS)):
            self.keep(sock)
        return "OK"

    def close(self, chance: random.Random) -> str:
        """close(2), whoever uses it."""
        with self.lock:
            if self.table:
                self.table.pop(chance.randrange(len(self.table))).close()
        return "OK"

    def dup(self, chance: random.Random) -> str:
        """dup(2)."""
        self.keep(self.any(chance).dup())
        return "OK"

    def accept(self, chance: random.Random) -> str:
        """accept(2)."""
        sock = self.any(chance)
        fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, os.O_NONBLOCK)
        self.keep(sock.accept()[0])
        return "OK"

    def disconnect(self, chance: random.Random) -> str:
        """connect(2) to AF_UNSPEC."""
        sockets.unconnect(self.any(chance))
        return "OK"

    def bind(self, chance: random.Random) -> str:
        """bind(2)."""
        name = self.name(chance)
        return failed() if libc.bind(self.any(chance).fileno(), name, len(name)) else "OK"

    def connect(self, chance: random.Random) -> str:
        """connect(2)."""
        name = self.name(chance)
        return failed() if libc.connect(self.any(chance).fileno(), name, len(name)) else "OK"

    def send(self, chance: random.Random) -> str:
        """sendmsg(2) with up to three control messages."""
        controls = [c[1:] for c in chance.sample(calls.CONTROLS, chance.choice((0, 0, 1, 1, 2, 3)))]
        name = self.name(chance) if chance.random() < 0.7 else b""
        return self.called(chance, "send", "", name, controls)

    def set(self, chance: random.Random) -> str:
        """setsockopt(2) with any length."""
        _, level, number, value, length = chance.choice(self.options)
        return self.called(chance, "set", level, number, value, chance.choice((length, length, *ODD)))

    def get(self, chance: random.Random) -> str:
        """getsockopt(2) with any length."""
        _, level, number, _, _ = chance.choice(self.options)
        return self.called(chance, "get", level, number, chance.choice(ODD))

    def ioctl(self, chance: random.Random) -> str:
        """ioctl(2) that any socket, also the container's own, may have without harm to the container."""
        _, request, value = chance.choice(self.requests)
        if request not in (*calls.QUESTIONS, *calls.OWN) and value[:2] == b"lo":
            return "none"
        return self.called(chance, "ioctl", request, value)

    def called(self, chance: random.Random, operation: str, *arguments: Any) -> str:
        """An operation of agent.Agent, by an agent of the thread's own buffers."""
        agent = object.__new__(Agent)
        agent.__dict__ |= self.agent.__dict__
        agent.buffer, agent.far = ctypes.create_string_buffer(8192), ctypes.create_string_buffer(8192)
        agent.length, agent.leaks = ctypes.c_uint32(), []
        agent.sock = self.any(chance)
        result = str(getattr(agent, operation)(*arguments))
        self.told += [f"{operation}{arguments}: {leak}" for leak in agent.leaks]
        if "another namespace" in result:
            self.told.append(f"{operation}{arguments}: {result}")
        return result.split(" ")[0].strip(",")

    def listen(self, chance: random.Random) -> str:
        """listen(2)."""
        return failed() if libc.listen(self.any(chance).fileno(), chance.choice((0, 1, 128, -1))) else "OK"

    def shutdown(self, chance: random.Random) -> str:
        """shutdown(2)."""
        return failed() if libc.shutdown(self.any(chance).fileno(), chance.randrange(4)) else "OK"

    def give(self, chance: random.Random) -> str:
        """A socket to another container."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
            s.setblocking(False)
            s.connect(chance.choice(self.others))
            socket.send_fds(s, [b"x"], [self.any(chance).fileno()])
        return "OK"

    def take(self, chance: random.Random) -> str:
        """What another container has sent."""
        _, fds, _, _ = socket.recv_fds(self.box, 1, 4)
        for fd in fds:
            self.keep(socket.socket(fileno=fd))
        return "OK"

    def read(self, chance: random.Random) -> str:
        """recvmsg(2), and what it says of the sender."""
        sock = self.any(chance)
        fcntl.fcntl(sock.fileno(), fcntl.F_SETFL, os.O_NONBLOCK)
        sock.recvmsg(64, 256, chance.choice((0, socket.MSG_ERRQUEUE)))
        return "OK"

    def racing(self, chance: random.Random) -> str:
        """bind(2), connect(2) or sendto(2) with an address that another thread changes meanwhile."""
        one, two = self.name(chance), self.name(chance)
        over = threading.Event()

        def change() -> None:
            while not over.is_set():
                ctypes.memmove(self.shared, one, len(one))
                ctypes.memmove(self.shared, two, len(two))

        flipper = threading.Thread(target=change)
        flipper.start()
        results: Counter[str] = Counter()
        try:
            for _ in range(8):
                sock, length = self.any(chance), max(len(one), len(two))
                call = chance.choice(("bind", "connect", "sendto"))
                if call == "sendto":
                    result = libc.sendto(sock.fileno(), b"matrix", 6, 0x4040, self.shared, length)
                else:
                    result = getattr(libc, call)(sock.fileno(), self.shared, length)
                results[failed() if result < 0 else "OK"] += 1
        finally:
            over.set()
            flipper.join()
        return "OK" if results["OK"] else next(iter(results))

    def sequence(self, seed: str, count: int) -> None:
        """@count operations."""
        chance = random.Random(seed)
        choices, weights = zip(*self.operations, strict=True)
        for operation in chance.choices(choices, weights, k=count):
            try:
                outcome = operation(chance)
            except (OSError, ValueError) as error:
                outcome = errno.errorcode.get(getattr(error, "errno", 0) or 0, error.__class__.__name__)
            self.outcomes[operation.__name__][outcome] += 1

    def round(self, seed: int, count: int) -> dict[str, Any]:
        """Threads, and a child process that has the same descriptors."""
        self.outcomes.clear()
        self.told = []
        child = os.fork()
        if not child:
            signal.alarm(60)
            self.box.setblocking(False)
            self.sequence(f"{seed} child", count // 4)
            os._exit(0)
        threads = [threading.Thread(target=self.sequence, args=(f"{seed} {n}", count)) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os.waitpid(child, 0)
        done = sum(sum(c.values()) for c in self.outcomes.values()) + count // 4
        return {"calls": done, "outcomes": self.outcomes, "told": sorted(set(self.told))}


def main() -> None:
    """Answer commands until there are no more."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096),) * 2)
    wild = Wild(json.loads(sys.argv[1]))
    sockets.supplied()
    print("up", flush=True)
    for line in sys.stdin:
        print(json.dumps(wild.round(*json.loads(line))), flush=True)
