"""A client's connection to graftd: it gathers one message with its descriptors, and sends one answer.

Connections are served by the loop, so they never block: sockets are non-blocking, and descriptors that a peer sent
are closed by graft/process/closing.py, because close(2) may block.
"""

import contextlib
import fcntl
import json
import os
import select
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

from graft import protocol
from graft.errors import GraftError, UsageError, from_oserror
from graft.log import log
from graft.process.closing import close_foreign, end, receive_fds, take_out_of_band
from graft.process.loop import Loop
from graft.tenants.peers import Peer
from graft.text import plain

IDLE_SECONDS = 30.0
PIECES_MAX = 64  # each piece of an agent message makes graftd parse all that has come so far


class Later:
    """An answer that is to be sent only when somebody calls send(), in the loop's thread: @answer, or `error`."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.error: GraftError | None = None
        self.send: Callable[[], None] = lambda: None  # the connection's own, from when it has this answer


class Connection:
    """One accepted connection, in the loop. @complete says when the gathered bytes are a message; @serve answers it.

    What @serve returns is sent as {"ok": ...}, with the descriptors in `replies`, which are closed afterwards. A
    GraftError that it raises is sent as {"error": ...}. None sends nothing, a Later now nothing. The connection ends
    after its answer, unless @serve set `vetted` or `told`. Descriptors that came with the message belong to @serve if
    it returns; if it raises, the connection closes them. @closed is called at the end; @now is in monotonic seconds.
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
        self.peer = Peer(sock)
        self.pid, self.uid = self.peer.pid, self.peer.uid
        self.incoming = bytearray()
        self.fds: list[int] = []
        self.pieces = 0
        self.outgoing = b""
        self.vetted = False  # was the peer outside every container when it said Hello?
        self.told = False  # does it stay open for the lines of a verbose wrapper?
        self.replies: list[int] = []
        self.service: Any = None  # Admin or Agent: the socket that it came by
        self.account: tuple[str, int] | None = None  # what it counts against (Daemon._account)
        self.user: Any = None  # the User whose orders come by it, once it has said Hello to the user socket
        take_out_of_band(sock)
        sock.setblocking(False)
        loop.add(sock.fileno(), self.ready)

    def ready(self, events: int) -> None:
        """The loop's callback: read, write, or close, by @events of epoll(7). An exception closes the connection."""
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
        except Exception:  # a message that triggers a bug of graftd ends its own connection, and nothing else
            log.exception("message of pid %d", self.pid)
            self.close()

    def _read(self) -> None:
        data, fds, flags = receive_fds(self.sock)
        self.fds += fds
        self.incoming += data
        self.pieces += 1
        try:
            if self.pieces > PIECES_MAX:
                raise UsageError(f"message in more than {PIECES_MAX} pieces")
            if flags & socket.MSG_CTRUNC or len(self.fds) > protocol.DESCRIPTORS_MAX:  # the first: the table is full
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
            except BaseException as error:
                for fd in fds:
                    with contextlib.suppress(OSError):  # @serve has closed it
                        fcntl.fcntl(fd, fcntl.F_GETFD)
                        close_foreign(fd)
                if isinstance(error, OSError):
                    raise from_oserror("graftd", error) from None
                raise
            if answer is None:
                self.close()
                return
            self.incoming.clear()
            if isinstance(answer, Later):
                answer.send = partial(self._send_later, answer)
                self.loop.modify(self.sock.fileno(), 0)
                return
            self._send({"ok": answer})
        except GraftError as error:
            self._send(protocol.error_document(error))

    def _send_later(self, later: Later) -> None:
        if self.sock.fileno() < 0:
            return
        try:
            self._send(protocol.error_document(later.error) if later.error else {"ok": later.answer})
        except OSError:
            self.close()

    def _send(self, document: dict[str, Any]) -> None:
        self.last = not (self.vetted or self.told) or "error" in document
        # csrc/runtime.c has no JSON parser: it looks for '{"ok": ', '"message": "' and '"hint": "' in ASCII, with
        # the blanks that json.dumps() writes by default (tests/unit/daemon/test_connection.py)
        self.outgoing = json.dumps(document).encode() + b"\n"
        self.loop.modify(self.sock.fileno(), select.EPOLLOUT)
        self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            if self.replies:
                sent = socket.send_fds(self.sock, [self.outgoing], self.replies, socket.MSG_NOSIGNAL)
                self._close_replies()
            else:
                sent = self.sock.send(self.outgoing, socket.MSG_NOSIGNAL)
            self.outgoing = self.outgoing[sent:]
        if not self.outgoing:
            if self.last:
                self.close()
            else:
                self.loop.modify(self.sock.fileno(), select.EPOLLIN)

    def _close_replies(self) -> None:
        for fd in self.replies:
            os.close(fd)
        self.replies = []

    def tell(self, line: str) -> None:
        """Send one line, made safe for a terminal, to a peer with `told`. It is dropped if the peer does not read."""
        if self.told and not self.outgoing and self.sock.fileno() >= 0:
            with contextlib.suppress(OSError):
                self.sock.send(plain(line).encode() + b"\n", socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Close the connection, and descriptors that came with an incomplete message. May be called twice."""
        if self.sock.fileno() < 0:
            return
        fds, self.fds = self.fds, []
        close_foreign(*fds)
        self._close_replies()
        self.peer.close()
        self.loop.remove(self.sock.fileno())
        end(self.sock)
        self.closed(self)
