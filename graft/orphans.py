"""What outlived graftd and its keeper: a graft-sup each shows the listener and the journal that it still has.

No store has them then. graft-sup goes on answering socket(), and comes to run_dir()/helpers.sock, which only root may
connect to, until a graftd takes what it brings. The journal, which nobody else has mapped, tells whose the listener
is; a token in it, that graftd has written there itself.
"""

import contextlib
import os
import socket

from graft import notify
from graft.calls import Calls
from graft.connection import receive_fds
from graft.log import log
from graft.loop import Loop

BACKLOG = 4096


class Orphans:
    """The socket, and what comes by it."""

    def __init__(self, loop: Loop, calls: Calls) -> None:
        self.loop = loop
        self.calls = calls
        path = calls.helpers
        path.unlink(missing_ok=True)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        umask = os.umask(0o177)
        try:
            self.sock.bind(str(path))
        finally:
            os.umask(umask)
        self.sock.listen(BACKLOG)
        loop.add(self.sock.fileno(), lambda _events: self._accept())

    def _accept(self) -> None:
        try:
            peer, _ = self.sock.accept()
        except OSError:  # it comes again
            return
        peer.setblocking(False)
        self.loop.add(peer.fileno(), lambda _events: self._take(peer))

    def _take(self, peer: socket.socket) -> None:
        self.loop.remove(peer.fileno())
        with peer:
            try:
                _, fds, _ = receive_fds(peer)
                peer.send(b"y" if self._adopt(fds) else b"n")
            except OSError as error:
                log.error("a graft-sup without a graftd: %s", error)

    def _adopt(self, fds: list[int]) -> bool:
        found = None
        with contextlib.suppress(OSError):  # a descriptor that is no file
            found = notify.described(fds[1]) if len(fds) == 3 else None
        if found and self.calls.is_ours(found) and self.calls.take_over(found, *fds):
            return True
        for fd in fds:
            os.close(fd)
        return False
