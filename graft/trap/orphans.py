"""Adopt the graft-sups that have outlived graftd and its keeper.

If graftd and its keeper are killed together, no store has the listeners and journals any more, but each graft-sup
still has its own. It goes on answering socket(), and connects to run_dir()/helpers.sock again and again until a
graftd takes what it brings: a listener, its journal, and an end of its control socket. What it has kept of an idle
listener comes after that, without a control socket. Only root outside of every container is heard there. The head of
the journal says whose listener it is. graftd believes it if it carries a token that only graftd can have written
(graft/process/key.py).
"""

import contextlib
import os
import socket

from graft.errors import Refused
from graft.kernel.cgroup import cgroup_of
from graft.log import log
from graft.process.closing import close_foreign, end, receive_fds
from graft.process.loop import Loop
from graft.tenants.peers import Peer, refuse_contained
from graft.tenants.registry import Registry
from graft.trap import journal
from graft.trap.listeners import Listeners

BACKLOG = 4096


class Orphans:
    """The listening socket helpers.sock, served by the loop."""

    def __init__(self, loop: Loop, calls: Listeners, registry: Registry) -> None:
        self.loop = loop
        self.registry = registry
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
        except OSError:  # graft-sup tries again
            return
        who = Peer(peer)
        try:
            if who.uid:
                raise Refused("only root may bring a supervisor", code="EPERM")
            if not self._is_own(who):  # that of a direct container lives in the container's netns
                refuse_contained(self.registry, who, "a supervisor's socket")
            who.check()
        except Refused as error:
            log.warning("helpers.sock: pid %d: %s", who.pid, error)
            end(peer)
            return
        finally:
            who.close()
        peer.setblocking(False)
        self.loop.add(peer.fileno(), lambda _events: self._take(peer))

    def _is_own(self, who: Peer) -> bool:
        """Is it a process of graft's, in graftd's own cgroup, where no container is?"""
        try:
            return bool(cgroup_of(os.getpid())) and cgroup_of(who.pid) == cgroup_of(os.getpid()) != "/"
        except OSError:
            return False

    def _take(self, peer: socket.socket) -> None:
        self.loop.remove(peer.fileno())
        try:
            _, fds, _ = receive_fds(peer)
            peer.send(b"y" if self._adopt(fds) else b"n")
        except OSError as error:
            log.error("cannot adopt a graft-sup: %s", error)
        finally:
            end(peer)

    def _adopt(self, fds: list[int]) -> bool:
        found = None
        with contextlib.suppress(OSError):  # fstat(2) or pread(2) fails for what was sent
            found = journal.described(fds[1]) if len(fds) in (2, 3) else None
        if found and self.calls.is_ours(found):
            listener, memory, *control = fds
            if self.calls.take_over(found, listener, memory, control[0] if control else None):
                return True
        close_foreign(*fds)
        return False
