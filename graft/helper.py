"""graft-sup (csrc/sup.c): the program that answers the socket() calls of one listener beside its container."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from graft import host
from graft.log import log

PROGRAM = Path(__file__).with_name("graft-sup")
MESSAGE_SIZE = 4


class Helper:
    """One graft-sup, by its control socket; it ends when its listener hangs up, or when it is told to.

    When no copy of our end is left it looks for another graftd.
    """

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.control = control
        self.process = process  # None: a predecessor's child
        control.setblocking(False)

    @classmethod
    def start(
        cls, name: str, given: tuple[int, int, int], path: Path, pid: int, keep: Callable[[int], None]
    ) -> "Helper | None":
        """Start one in the CPU and memory cgroups of the process @pid; None if that cannot be done.

        @given: the descriptors of the listener, its journal, and the map of stamps; @path: where it finds a graftd
        when it has lost this one. @keep: puts our end of its control socket into the store, before it lives: a
        graftd that comes after a kill in between must not find one that it knows nothing of.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            log.error("graft-sup of %s: %s", name, error.strerror)
            return None
        keep(ours.fileno())
        with theirs:
            fds = (*given, theirs.fileno())
            try:
                process = subprocess.Popen(
                    (PROGRAM.name, name, *map(str, fds), str(path)),
                    executable=PROGRAM,
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
            except OSError as error:
                log.error("%s: %s; graftd answers the calls of %s itself", PROGRAM, error.strerror, name)
                ours.close()
                return None
        host.join_cgroups(process.pid, pid)
        return cls(ours, process)

    def end(self) -> None:
        """Tell it to end: without this graftd there is to be none."""
        with contextlib.suppress(OSError):
            self.control.send(b"e")

    def forwarded(self) -> int | None:
        """The number of a slot that it has handed over, -1 if there is none. None: it is dead."""
        try:
            message = self.control.recv(MESSAGE_SIZE)
        except BlockingIOError:
            return -1
        except OSError:
            return None
        return int.from_bytes(message, "little") if len(message) == MESSAGE_SIZE else None

    def ended(self) -> bool:
        """Is its process gone, and reaped?"""
        return self.process is None or self.process.poll() is not None


def available() -> bool:
    """Is the program there? Without it graftd answers every call itself, slower."""
    return os.access(PROGRAM, os.X_OK)
