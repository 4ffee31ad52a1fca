"""The rows of the matrix: kinds of sockets, made anew for each call that changes one. Runs inside.

A row is written "KIND FAMILY TYPE STATE", like "accepted 6 tcp connected". Where a kind needs graft the oracle, a
program in a plain namespace, takes what such a socket stands for.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from typing import Any

FAMILY = {"4": socket.AF_INET, "6": socket.AF_INET6}
TYPE = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
LOOPBACK = {"4": "127.0.0.1", "6": "::1"}
STATES = {"tcp": ("fresh", "bound", "listening", "connected"), "udp": ("fresh", "bound", "connected")}
GRAFT = 4


class Maker:
    """Makes sockets of any row. @oracle: there is no graft here. @where: addresses, calls.Places."""

    def __init__(self, where: Any, oracle: bool) -> None:
        self.where = where
        self.oracle = oracle
        self.servers: dict[tuple[str, str], socket.socket] = {}
        for family, what in ((f, t) for f in FAMILY for t in TYPE):
            with contextlib.suppress(OSError):
                server = socket.socket(FAMILY[family], TYPE[what])
                server.bind((LOOPBACK[family], 0))
                if what == "tcp":
                    server.listen(512)
                server.settimeout(10)
                self.servers[family, what] = server

    def make(self, row: str) -> list[socket.socket]:
        """A socket of this row, and after it those that it needs beside itself. Raises OSError."""
        kind, family, what, state = row.split()
        makers = {
            "socket": self._made, "dup": self._dup, "accepted": self._accepted, "disconnected": self._disconnected,
            "swapped": self._away, "unix": self._unix, "graft": self._graft, "native": self._native,
        }  # fmt: skip
        if kind in makers:
            return makers[kind](family, what, state)
        return self._given(kind, row)

    def _made(self, family: str, what: str, state: str) -> list[socket.socket]:
        sock = socket.socket(FAMILY[family], TYPE[what])
        self._bring(sock, family, what, state)
        return [sock]

    def _bring(self, sock: socket.socket, family: str, what: str, state: str) -> None:
        if state in ("bound", "listening"):
            sock.bind((LOOPBACK[family], 0))
        if state == "listening":
            sock.listen()
        if state == "connected":
            server = self.servers[family, what]
            sock.connect(server.getsockname())
            if what == "tcp":
                server.accept()[0].close()

    def _dup(self, family: str, what: str, state: str) -> list[socket.socket]:
        with self._made(family, what, state)[0] as sock:
            return [sock.dup()]

    def _accepted(self, family: str, what: str, state: str) -> list[socket.socket]:
        server = self.servers[family, what]
        client = socket.create_connection(server.getsockname()[:2])
        return [server.accept()[0], client]

    def _disconnected(self, family: str, what: str, state: str) -> list[socket.socket]:
        sock, client = self._accepted(family, what, state)
        client.close()
        unconnect(sock)
        return [sock]

    def _away(self, family: str, what: str, state: str) -> list[socket.socket]:
        """One in another namespace, by an egress rule that leads there."""
        if self.oracle:
            return self._made(family, what, "connected")
        sock = socket.socket(FAMILY[family], TYPE[what])
        sock.connect((self.where.away, 9100))
        return [sock]

    def _unix(self, family: str, what: str, state: str) -> list[socket.socket]:
        """One of AF_UNIX, which the program takes for one of the internet."""
        if self.oracle:
            return self._made(family, what, "connected")
        sock = socket.socket(FAMILY[family], TYPE[what])
        sock.connect((self.where.unix, 9100))
        return [sock]

    def _graft(self, family: str, what: str, state: str) -> list[socket.socket]:
        if self.oracle:
            return self._made(family, what, "fresh" if state == "fresh" else "bound")
        sock = socket.socket(GRAFT, TYPE[what])
        if state != "fresh":  # named: by an endpoint to listen at; leaving: by one to leave from
            call("bind", sock.fileno(), struct.pack("=H16s", GRAFT, b"ep-in" if state == "named" else b"ep-out"))
        return [socket.socket(FAMILY[family], TYPE[what], fileno=sock.detach())]

    def _native(self, family: str, what: str, state: str) -> list[socket.socket]:
        if what == "raw":
            return [socket.socket(FAMILY[family], socket.SOCK_RAW, 17)]
        if what == "icmp":
            return [socket.socket(FAMILY[family], socket.SOCK_RAW, 1 if family == "4" else 58)]
        if what == "packet":
            return [socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)]
        if what == "netlink":
            return [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)]
        if what == "pair":
            return list(socket.socketpair())
        return [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if what == "stream" else socket.SOCK_DGRAM)]

    def _given(self, kind: str, row: str) -> list[socket.socket]:
        """From another process. @kind: the path of its socket, below the working directory."""
        if self.oracle:
            return self.make(row.replace(kind, "socket", 1))
        with socket.socket(socket.AF_UNIX) as giver:
            giver.settimeout(10)
            giver.connect(f"{os.environ['MATRIX']}/{self.where.givers[kind]}")
            giver.sendall(row.replace(kind, "socket", 1).encode())
            _, fds, _, _ = socket.recv_fds(giver, 64, 1)
        if not fds:
            raise OSError(5, "nothing given")
        return [socket.socket(fileno=fd) for fd in fds]

    def give(self, path: str) -> None:
        """Serve sockets to whoever connects, in a thread."""
        server = socket.socket(socket.AF_UNIX)
        server.bind(path)
        os.chmod(path, 0o777)
        server.listen(64)
        threading.Thread(target=self._serve, args=(server,), daemon=True).start()

    def _serve(self, server: socket.socket) -> None:
        while True:
            client, _ = server.accept()
            with client, contextlib.suppress(OSError):
                made = self.make(client.recv(64).decode())
                socket.send_fds(client, [b"x"], [made[0].fileno()])
                for sock in made:
                    sock.close()


def unconnect(sock: socket.socket) -> None:
    """connect(2) to AF_UNSPEC. Raises OSError."""
    call("connect", sock.fileno(), struct.pack("=H14x", 0))


def call(name: str, fd: int, address: bytes) -> None:
    """bind(2) or connect(2) with an address as bytes. Raises OSError."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(fd, address, len(address)):
        raise OSError(ctypes.get_errno(), name)


def supplied() -> None:
    """Wait until the preload library, if there is one, has sockets in store (graft run --accel)."""
    for _ in range(500):
        if "LD_PRELOAD" not in os.environ:
            return
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        if sum(os.path.islink(link) and os.readlink(link).startswith("socket:") for link in links) >= 2:
            return
        socket.socket().close()
        time.sleep(0.01)
