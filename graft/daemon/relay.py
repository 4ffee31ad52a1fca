"""A graft-relay (csrc/relay.c): the process that carries what is dialled inside one container's netns.

It starts with the first connection. graftd sends it pairs of sockets and counts them: it reports how many have come
and how many have ended. The channel is in the descriptor store, so that the next graftd has it, and asks for the
number. When all copies of graftd's end are closed, it ends with its last pair, or after a minute.

It is not believed. The kernel gives it no more descriptors than graftd's limit needs (csrc/relay_cage.c), and one
whose numbers cannot be is ended.
"""

import contextlib
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from graft.daemon.shares import EACH
from graft.kernel.cgroup import join_cgroups
from graft.process.title import RELAY

PROGRAM = Path(__file__).parents[1] / "graft-relay"
PAIR, QUESTION, END = b"p", b"q", b"e"
REPORT = struct.Struct("=QQQ")  # pairs that have come, and have ended; questions that have


class Relay:
    """One graft-relay, by graftd's end of its channel, and how many pairs it has. Only the loop's thread calls it."""

    def __init__(self, channel: socket.socket, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """@process: None if a predecessor of this graftd started it; then it is asked how many pairs it has."""
        self.channel = channel
        self.process = process
        self.known = process is not None
        self.since = time.monotonic()
        self._sent = self._ended = 0
        channel.setblocking(False)
        if not self.known:
            with contextlib.suppress(OSError):  # it has ended: the channel's hang-up tells
                channel.send(QUESTION)

    @classmethod
    def start(cls, name: str, uid: int, cgroup: Path, pid: int, keep: Callable[[int], None]) -> "Relay":
        """Start one for the container @name, as @uid, the owner of the container's sockets. Raises OSError.

        It enters @cgroup, which is there, and where cgroup v1 has CPU and memory, those of the process @pid. @keep: a
        function that stores our end of the channel, before the process exists.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                keep(ours.fileno())
                process = subprocess.Popen(
                    (RELAY, name, str(uid), str(cgroup)),
                    executable=PROGRAM,
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        join_cgroups(process.pid, pid)
        return cls(ours, process)

    @property
    def open(self) -> int:
        """How many pairs it has."""
        return self._sent - self._ended

    def join(self, one: socket.socket, another: socket.socket) -> None:
        """Have what comes at one socket carried to the other; the caller closes its own copies. Raises OSError.

        @one is connected, @another may be on its way.
        """
        socket.send_fds(self.channel, [PAIR], [one.fileno(), another.fileno()])
        self._sent += 1

    def count(self) -> bool:
        """Read a report. False if the process has ended, or reports what cannot be."""
        try:
            message = self.channel.recv(REPORT.size + 1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if len(message) != REPORT.size:
            return False
        come, ended, asked = REPORT.unpack(message)
        if not self.known:
            if not asked:  # for the graftd before this one
                return True
            self.known, self._sent = True, come  # nothing was sent after the question
        if not self._ended <= ended <= come <= self._sent or self._sent - ended > EACH:
            return False
        self._ended = ended
        return True

    def end(self) -> None:
        """Have it end now, with the pairs that it has."""
        with contextlib.suppress(OSError):
            if self.process:
                self.process.kill()
            else:
                self.channel.send(END)

    def close(self) -> None:
        """Close the channel: it ends when it has no pair. ended() is still to be called."""
        self.channel.close()

    def ended(self) -> bool:
        """Has the process ended? Reaps it. True if it is not a child of this graftd."""
        return self.process is None or self.process.poll() is not None


def available() -> bool:
    """Is the program installed? Without it nobody is led to a container's servers inside its netns."""
    return os.access(PROGRAM, os.X_OK)
