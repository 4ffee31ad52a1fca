"""HTTP for graftd: a listener on an address or at a path, and answers that may come later. Used for metrics.

h11 speaks the protocol; the loop carries the bytes, and never waits for a peer. A request is a GET, its answer closes
the connection. A peer that sends nothing, or does not read, is closed after PATIENCE seconds.
"""

import contextlib
import errno
import os
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h11

from graft.errors import Failure
from graft.process.closing import end, receive, take_out_of_band
from graft.process.loop import Loop
from graft.rules.where import Where

PATIENCE = 10.0
CONNECTIONS_MAX = 64
HEAD_MAX = 16384  # bytes of a request


class Asked(NamedTuple):
    """A request: its path, its query string, and its headers by their names in lower case."""

    path: str
    query: str
    headers: dict[str, str]


class Response(NamedTuple):
    """What is answered."""

    status: int
    kind: str
    body: bytes | bytearray
    headers: tuple[tuple[str, str], ...] = ()


Reply = Callable[[Response], None]


class Web:
    """A listener. @answer gets each request, in the loop, and a function that takes the response, now or later."""

    def __init__(
        self, loop: Loop, where: Where, own: Callable[[socket.socket], None], answer: Callable[[Asked, Reply], None]
    ) -> None:
        """@own exempts a socket from the programs of graftd's cgroup. Raises Failure if the address is in use."""
        self.loop = loop
        self.where = where
        self.answer = answer
        self.conversations: list[Conversation] = []
        try:
            self.sock = self._listen(own)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if taken and where.path and not Path(where.path).is_socket():
                raise Failure(f"{where} is there, and no socket", hint="name a path that is free") from None
            hint = "another address, or end who has it" if taken else "name an address or a directory of this host"
            raise Failure(f"{where}: {error.strerror}", hint=hint) from None
        self.sock.setblocking(False)
        loop.add(self.sock.fileno(), self._accept)

    def _listen(self, own: Callable[[socket.socket], None]) -> socket.socket:
        address, port, path = self.where
        if address:
            sock = socket.socket(socket.AF_INET if address.v4 else socket.AF_INET6, socket.SOCK_STREAM)
            own(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address), port))
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with contextlib.suppress(FileNotFoundError):
                if Path(path).is_socket() and not _answers(path):  # a graftd before has left it
                    os.unlink(path)
            umask = os.umask(0o117)
            try:
                sock.bind(path)
            finally:
                os.umask(umask)
        sock.listen(CONNECTIONS_MAX)
        return sock

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self.sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.01)  # level-triggered: the connection waits, the loop must not spin
            return
        with contextlib.suppress(OSError):
            self.conversations = [one for one in self.conversations if not one.closed]
            if len(self.conversations) >= CONNECTIONS_MAX:  # who has not asked yet gives way, the first one first
                idle = next((one for one in self.conversations if not one.asked), None)
                if idle is None:
                    end(sock)
                    return
                idle.close()
                self.conversations.remove(idle)
            self.conversations.append(Conversation(self.loop, sock, self.answer))

    def tick(self, now: float) -> None:
        """Close who sends nothing or does not read. @now: monotonic seconds. To be called each second."""
        for one in self.conversations:
            if not one.closed and one.deadline < now:
                one.close()
        self.conversations = [one for one in self.conversations if not one.closed]

    def close(self) -> None:
        """Stop listening, and remove the path."""
        for one in self.conversations:
            one.close()
        self.loop.remove(self.sock.fileno())
        self.sock.close()
        if self.where.path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.where.path)


class Conversation:
    """One connection: a request, and its answer."""

    def __init__(self, loop: Loop, sock: socket.socket, answer: Callable[[Asked, Reply], None]) -> None:
        self.loop = loop
        self.sock = sock
        self.answer = answer
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX)
        self.out: list[memoryview] = []
        self.deadline = time.monotonic() + PATIENCE
        self.asked = False  # has a whole request come?
        take_out_of_band(sock)
        sock.setblocking(False)
        loop.add(sock.fileno(), self._ready)

    @property
    def closed(self) -> bool:
        """Is it over?"""
        return self.sock.fileno() < 0

    def _ready(self, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._send()
            elif events & select.EPOLLIN:
                self._read()
            else:
                self.close()
        except BlockingIOError:
            return
        except h11.RemoteProtocolError as error:
            self._reply(Response(error.error_status_hint, "text/plain", b"no request that graftd knows\n"))
        except OSError:
            self.close()

    def _read(self) -> None:
        data = receive(self.sock)
        self.http.receive_data(data)
        event = self.http.next_event()
        if isinstance(event, h11.Request):
            self.loop.modify(self.sock.fileno(), 0)
            self.asked = True
            target, _, query = event.target.decode(errors="replace").partition("?")
            headers = {name.decode(): value.decode(errors="replace") for name, value in event.headers}
            if event.method != b"GET":
                self._reply(Response(405, "text/plain", b"GET, nothing else\n"))
            else:
                self.answer(Asked(target, query, headers), self._reply)
        elif not data:
            self.close()

    def _reply(self, response: Response) -> None:
        if self.closed or self.http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        headers = [
            ("Content-Type", response.kind),
            ("Content-Length", str(len(response.body))),
            ("Connection", "close"),
            ("X-Content-Type-Options", "nosniff"),
            *response.headers,
        ]
        head = self.http.send(h11.Response(status_code=response.status, headers=headers)) or b""
        self.out = [memoryview(head), memoryview(response.body)]
        self.deadline = time.monotonic() + PATIENCE
        self.loop.modify(self.sock.fileno(), select.EPOLLOUT)

    def _send(self) -> None:
        sent = self.sock.sendmsg(self.out)
        for n, part in enumerate(self.out):
            self.out[n], sent = part[sent:], max(0, sent - len(part))
        self.out = [part for part in self.out if part]
        if not self.out:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self.close()

    def close(self) -> None:
        """End the connection. May be called twice."""
        if not self.closed:
            self.loop.remove(self.sock.fileno())
            end(self.sock)


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
