"""Start and follow a graft-sup (csrc/sup.c), the program that answers the socket() calls of one listener."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from graft.kernel import cgroup, linux
from graft.log import log
from graft.process.title import SUP
from graft.rules.sysctl import Option

PROGRAM = Path(__file__).parents[1] / "graft-sup"
MESSAGE_SIZE = 4


class Direct(NamedTuple):
    """What the graft-sup of a direct container needs besides: csrc/sup_bind.c.

    The descriptor of the netns that it lives in, that of the map `prepared`, and the host's ephemeral ports.
    """

    netns_fd: int
    preparing: int
    ephemeral: tuple[int, int]


class Helper:
    """One graft-sup, by graftd's end of its control socket.

    It ends when its listener hangs up, or when end() tells it to. When no copy of graftd's end is left, it looks for
    another graftd (graft/trap/orphans.py). Only the loop's thread calls it.
    """

    def __init__(self, control: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.control = control
        self.process = process  # None if a predecessor of this graftd started it
        control.setblocking(False)

    @classmethod
    def start(
        cls,
        name: str,
        given: tuple[int, int, int],
        path: Path,
        pid: int,
        options: Iterable[Option],
        keep: Callable[[int], None],
        direct: Direct | None = None,
        beside: Iterable[tuple[int, int]] = (),
    ) -> "Helper | None":
        """Start a graft-sup for the container @name; None, and a line in the log, if that fails.

        @given: the descriptors of the listener, its journal, and the map of stamps. @path: the socket at which it
        looks for a graftd when it has lost this one. @pid: it joins this process's CPU and memory cgroups. @options:
        what it sets on each socket. @keep: a function that stores our end of the control socket. It is called before
        the process exists, because otherwise a graftd that follows after a kill in between would not know of it.
        @direct: of the container, if it is one. @beside: listeners and journals that it keeps, without receiving from
        them.
        """
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            log.error("cannot start graft-sup for %s: %s", name, error.strerror)
            return None
        keep(ours.fileno())
        with theirs:
            fds = (*given, theirs.fileno())
            kept = list(beside)
            passed = [*fds, *(fd for pair in kept for fd in pair)]
            words = [f"beside:{listener}:{journal}" for listener, journal in kept]
            if direct:
                words.append(f"bind:{direct.preparing}:{direct.ephemeral[0]}:{direct.ephemeral[1]}")
                passed.append(direct.preparing)
            try:
                with linux.inside_netns(direct.netns_fd) if direct else contextlib.nullcontext():
                    process = subprocess.Popen(
                        (SUP, name, *map(str, fds), str(path), *map(_word, options), *words),
                        executable=PROGRAM,
                        pass_fds=passed,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        cwd="/",
                        env={},
                        start_new_session=True,
                    )
            except OSError as error:
                log.error("cannot start %s: %s; graftd itself answers the calls of %s", PROGRAM, error.strerror, name)
                ours.close()
                return None
        cgroup.join_cgroups(process.pid, pid)
        return cls(ours, process)

    def end(self) -> None:
        """Tell it to end, because no graftd will follow this one."""
        with contextlib.suppress(OSError):
            self.control.send(b"e")

    def forwarded(self) -> int | None:
        """The number of a journal's slot that it has handed over; -1 if there is none now; None if it is dead."""
        try:
            message = self.control.recv(MESSAGE_SIZE)
        except BlockingIOError:
            return -1
        except OSError:
            return None
        return int.from_bytes(message, "little") if len(message) == MESSAGE_SIZE else None

    def kill(self) -> None:
        """End its process by SIGKILL, if it is a child of this graftd."""
        if self.process:
            self.process.kill()

    def ended(self) -> bool:
        """Has its process ended? Reaps it. True if it is not a child of this graftd."""
        return self.process is None or self.process.poll() is not None


def _word(option: Option) -> str:
    """An option as graft-sup's argument: KINDS:LEVEL:NAME:VALUE, the value in hexadecimal."""
    return f"{option.kinds}:{option.level}:{option.name}:{option.raw.hex()}"


def available() -> bool:
    """Is the program installed? Without it graftd answers every call itself, which is slower."""
    return os.access(PROGRAM, os.X_OK)
