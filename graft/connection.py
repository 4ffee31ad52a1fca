"""A client's connection to graftd: gathers one message with its descriptors, sends one answer. Never blocks."""

import contextlib
import json
import os
import select
import socket
from collections.abc import Callable
from typing import Any

from graft import protocol
from graft.errors import GraftError, UsageError
from graft.loop import Loop

IDLE_SECONDS = 30.0


class Connection:
    """Non-blocking. @complete says when the gathered bytes are a message, @serve answers it.

    What @serve returns is sent as {"ok": ...}, a GraftError it raises as {"error": ...}; None sends nothing.
    Descriptors belong to @serve once it returned; whatever goes wrong before closes them.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        complete: Callable[[bytes], bool],
        serve: Callable[["Connection", bytes, list[int]], Any],
        closed: Callable[["Connection"], None],
        now: float,
    ) -> None:
        self.loop = loop
        self.sock = sock
        self.complete = complete
        self.serve = serve
        self.closed = closed
        self.deadline = now + IDLE_SECONDS
        self.pid, self.uid, self.gid = protocol.credentials(sock)
        self.incoming = bytearray()
        self.fds: list[int] = []
        self.outgoing = b""
        sock.setblocking(False)
        loop.add(sock.fileno(), self.ready)

    def ready(self, events: int) -> None:
        """The loop's callback."""
        try:
            if events & select.EPOLLOUT:
                self._flush()
            elif events & select.EPOLLIN:
                self._read()
            else:
                self.close()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            self.close()

    def _read(self) -> None:
        data, fds, flags, _ = socket.recv_fds(
            self.sock, 65536, protocol.DESCRIPTORS_MAX, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        )
        self.fds += fds
        self.incoming += data
        try:
            if flags & socket.MSG_CTRUNC or len(self.fds) > protocol.DESCRIPTORS_MAX:
                raise UsageError(f"more than {protocol.DESCRIPTORS_MAX} descriptors in one message")
            if len(self.incoming) > protocol.MESSAGE_MAX:
                raise UsageError(f"message larger than {protocol.MESSAGE_MAX} bytes")
            if not data:
                if self.incoming:
                    raise UsageError("connection ended within a message")
                self.close()
                return
            if not self.complete(bytes(self.incoming)):
                return
            fds, self.fds = self.fds, []
            try:
                answer = self.serve(self, bytes(self.incoming), fds)
            except BaseException:
                for fd in fds:
                    with contextlib.suppress(OSError):
                        os.close(fd)
                raise
            if answer is None:
                self.close()
                return
            self._send({"ok": answer})
        except GraftError as error:
            self._send(protocol.error_document(error))

    def _send(self, document: dict[str, Any]) -> None:
        self.outgoing = json.dumps(document).encode() + b"\n"
        self.loop.modify(self.sock.fileno(), select.EPOLLOUT)
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.outgoing = self.outgoing[self.sock.send(self.outgoing, socket.MSG_NOSIGNAL) :]
        if not self.outgoing:
            self.close()

    def close(self) -> None:
        """Drop the connection and whatever descriptors came with an incomplete message."""
        if self.sock.fileno() < 0:
            return
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.loop.remove(self.sock.fileno())
        self.sock.close()
        self.closed(self)
