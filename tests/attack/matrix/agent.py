"""What does the cells of the matrix, inside a container or beside one, in one process.

usage: python3 -m matrix.agent CONFIG; CONFIG is JSON: where (calls.Places and givers), oracle, needles, gives.
It reads a JSON list [row, group, first, last] a line, and answers each with a line {"outcomes": [...], "told": [...]}.
An outcome is an errno's name, or OK with what came of it; `told` names the cells of which an answer has a needle.
Sockets of a command are kept until the next, so that the host can be looked at.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import socket
import sys
from types import SimpleNamespace
from typing import Any

from . import calls
from .sockets import Maker, supplied, unconnect

SIZE = 8192
libc = ctypes.CDLL(None, use_errno=True)
HELD = ("bind", "connect", "noted", "names")


def failed() -> str:
    """The name of the errno."""
    return errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))


def address(name: Any) -> str:
    """What a socket's name says, without its port."""
    return str(name[0]) if isinstance(name, tuple) and len(name) > 1 else "none"


class Agent:
    """The cells. Each method that is called as an operation returns its outcome; @sock is the cell's socket."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.where: Any = SimpleNamespace(**config["where"])
        self.maker = Maker(self.where, config["oracle"])
        self.needles = {name: bytes.fromhex(value) for name, value in config["needles"].items()}
        self.buffer = ctypes.create_string_buffer(SIZE)
        self.far = ctypes.create_string_buffer(SIZE)
        self.length = ctypes.c_uint32()
        self.sock: socket.socket
        self.made: list[socket.socket] = []
        self.kept: list[socket.socket] = []
        self.leaks: list[str] = []
        self.here = os.stat("/proc/self/ns/net").st_ino

    def look(self, answer: bytes, asked: bytes = b"") -> None:
        """Search an answer for what is the host's."""
        self.leaks += [name for name, needle in self.needles.items() if needle in answer and needle not in asked]

    def set(self, level: int, name: int, value: bytes, length: int) -> str:
        """setsockopt(2) with @length bytes that begin with @value, and what getsockopt(2) says afterwards."""
        ctypes.memset(self.buffer, 0, SIZE)
        ctypes.memmove(self.buffer, value, len(value))
        if libc.setsockopt(self.sock.fileno(), level, name, self.buffer, length):
            return failed()
        return "OK, " + self.get(level, name, 4)

    def get(self, level: int, name: int, length: int) -> str:
        """getsockopt(2): the first 4 bytes of the answer."""
        ctypes.memset(self.buffer, 0, min(length + 256, SIZE))
        self.length.value = length
        if libc.getsockopt(self.sock.fileno(), level, name, self.buffer, ctypes.byref(self.length)):
            return failed()
        size = min(self.length.value, SIZE)
        answer = self.buffer.raw[:size]
        self.look(answer)
        return f"OK {answer[:4].hex()}"

    def ioctl(self, request: int, value: bytes) -> str:
        """ioctl(2): what is in the union of struct ifreq afterwards."""
        ctypes.memset(self.buffer, 0, 256)
        ctypes.memset(self.far, 0, 1024)
        ctypes.memmove(self.buffer, value, len(value))
        if request == 0x8912:
            value = (1024).to_bytes(8, "little") + ctypes.addressof(self.far).to_bytes(8, "little")
            ctypes.memmove(self.buffer, value, 16)
        if request in (0x8946, 0x89B0, 0x89B1):
            ctypes.memmove(self.far, (3).to_bytes(4, "little"), 4)
            ctypes.memmove(self.buffer, value[:16] + ctypes.addressof(self.far).to_bytes(8, "little"), 24)
        asked = self.buffer.raw[:256]
        result = libc.ioctl(self.sock.fileno(), ctypes.c_ulong(request), self.buffer)
        if result < 0:
            return failed()
        self.look(self.buffer.raw[:256] + self.far.raw[:1024], asked)
        if request == calls.GSKNS:
            with open(result, closefd=True) as got:
                return "OK own" if os.fstat(got.fileno()).st_ino == self.here else "OK, another namespace"
        if request == 0x8912:
            return f"OK {self.far.raw[:16].rstrip(bytes(1)).decode('ascii', 'replace')} {self.buffer.raw[0]}"
        return f"OK {self.buffer.raw[16:24].hex()}"

    def bind(self, _what: str, name: bytes) -> str:
        """bind(2), and listen(2) after it, so that everybody could see it."""
        if libc.bind(self.sock.fileno(), name, len(name)):
            return failed()
        with contextlib.suppress(OSError):
            self.sock.listen()
        return f"OK {self._name()}"

    def connect(self, _what: str, name: bytes) -> str:
        """connect(2), and a datagram."""
        self.sock.setblocking(False)
        if libc.connect(self.sock.fileno(), name, len(name)):
            return failed()
        with contextlib.suppress(OSError):
            self.sock.send(b"matrix")
        return f"OK {self._name()}"

    def send(self, _what: str, name: bytes, controls: list[tuple[int, int, bytes]]) -> str:
        """sendmsg(2) with control messages, or sendto(2) without; @name may be of any form."""
        self.sock.setblocking(False)
        fd = self.sock.fileno()
        if not controls:
            sent = libc.sendto(fd, b"matrix", 6, 0x4000, name, len(name))
            return failed() if sent < 0 else "OK"
        control = b"".join(
            (16 + len(data)).to_bytes(8, "little") + level.to_bytes(4, "little") + kind.to_bytes(4, "little")
            + data.ljust((len(data) + 7) // 8 * 8, b"\0") for level, kind, data in controls
        )  # fmt: skip
        text = ctypes.create_string_buffer(b"matrix" * 4, 24)
        target, extra = ctypes.create_string_buffer(name, 128), ctypes.create_string_buffer(control, len(control))
        piece = (ctypes.c_uint64 * 2)(ctypes.addressof(text), 24)
        message = (ctypes.c_uint64 * 7)(
            ctypes.addressof(target) if name else 0, len(name), ctypes.addressof(piece), 1, ctypes.addressof(extra), len(control), 0
        )  # fmt: skip
        return failed() if libc.sendmsg(fd, message, 0x4000) < 0 else "OK"

    def noted(self, level: int, option: int, value: bytes, length: int, name: bytes) -> str:
        """setsockopt(2), then bind(2) to a published port."""
        told = self.set(level, option, value, length)
        return f"{told.split(',')[0]}, then {self.bind('', name)}"

    def names(self) -> str:
        """getsockname(2) and getpeername(2)."""
        return f"OK {self._name()} {self._peer()}"

    def listen(self, backlog: int) -> str:
        """listen(2)."""
        return failed() if libc.listen(self.sock.fileno(), backlog) else f"OK {self._name()}"

    def shutdown(self, how: int) -> str:
        """shutdown(2)."""
        return failed() if libc.shutdown(self.sock.fileno(), how) else "OK"

    def disconnect(self) -> str:
        """connect(2) to AF_UNSPEC."""
        unconnect(self.sock)
        return f"OK {self._name()} {self._peer()}"

    def _name(self) -> str:
        try:
            return address(self.sock.getsockname())
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def _peer(self) -> str:
        try:
            return address(self.sock.getpeername())
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def fresh(self, row: str, keep: bool) -> None:
        """Make the next cell's socket."""
        if keep:
            self.kept += self.made
        else:
            self.release(self.made)
        self.made = []
        self.made = self.maker.make(row)
        self.sock = self.made[0]

    @staticmethod
    def release(socks: list[socket.socket]) -> None:
        """Close sockets."""
        for sock in socks:
            sock.close()

    def do(self, row: str, group: str, first: int, last: int) -> dict[str, Any]:
        """The cells of a row and group; without a row, close what was kept."""
        if not row:
            self.release(self.kept + self.made)
            self.kept, self.made = [], []
            return {"outcomes": [], "told": []}
        _, family, what, _ = row.split()
        cells = calls.cells(group, self.where, family == "6", what)[first:last]
        outcomes, told = [], []
        try:
            self.fresh(row, group in HELD)
        except OSError as error:
            return {"outcomes": [f"not made: {errno.errorcode[error.errno or 0]}"] * len(cells), "told": []}
        used = False
        for number, (operation, *arguments) in enumerate(cells):
            try:
                if used:
                    self.fresh(row, group in HELD)
                outcome = getattr(self, operation)(*arguments)
            except OSError as error:
                outcome = errno.errorcode.get(error.errno or 0, "unknown")
            used = operation not in ("get", "ioctl") and (operation != "set" or outcome[0] == "O")
            outcomes.append(outcome)
            if self.leaks:
                told.append([first + number, *self.leaks])
                self.leaks = []
        return {"outcomes": outcomes, "told": told}


def main() -> None:
    """Answer commands until there are no more."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    config = json.loads(sys.argv[1])
    agent = Agent(config)
    if config.get("gives"):
        agent.maker.give(f"{os.environ['MATRIX']}/{config['gives']}")
    supplied()
    print("up", flush=True)
    for line in sys.stdin:
        print(json.dumps(agent.do(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
