"""The descriptor store: copies of descriptors that must survive graftd, kept by systemd or by the keeper.

graftd sends them with sd_notify(3), and gets them back at its next start by LISTEN_FDS (sd_listen_fds(3)). The keeper
uses this module for its own start as well.
"""

import fcntl
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

from graft.log import log

LISTEN_FDS_START = 3
NAMES_MAX = 100_000  # bytes of one string in the environment; execve(2) takes 131,072 (MAX_ARG_STRLEN)
FURTHER = "GRAFT_FDNAMES_"  # with a number: what goes on from LISTEN_FDNAMES
KEEPER_ENTRY = "from graft.process.keeper import main; main(-1)"


def exec_with(command: list[str], passed: Sequence[tuple[str, int]], **environment: str) -> NoReturn:
    """Execute @command in place of this process, and pass it (name, descriptor) pairs by LISTEN_FDS.

    @environment is added to the environment. Never returns: if execve(2) fails, the process exits with status 127.
    """
    try:
        # copy all to high numbers first, so that dup2() to 3, 4, ... overwrites none; no copy is close-on-exec
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, LISTEN_FDS_START + len(passed)) for _, fd in passed]
        for target, fd in enumerate(high, LISTEN_FDS_START):
            os.dup2(fd, target)
        os.closerange(LISTEN_FDS_START + len(passed), max(high, default=2) + 1)
        _name([name for name, _ in passed])
        os.environ.update(environment, LISTEN_FDS=str(len(passed)), LISTEN_PID=str(os.getpid()))
        os.execv(command[0], command)  # noqa: S606 - our own interpreter
    finally:
        os._exit(127)


def _name(names: Sequence[str]) -> None:
    """Put @names into the environment: LISTEN_FDNAMES, and FURTHER strings of those of thousands of containers."""
    for key in [key for key in os.environ if key.startswith(FURTHER)]:
        del os.environ[key]
    text = ":".join(names)
    os.environ["LISTEN_FDNAMES"] = text[:NAMES_MAX]
    for n in range(NAMES_MAX, len(text), NAMES_MAX):
        os.environ[f"{FURTHER}{n // NAMES_MAX}"] = text[n : n + NAMES_MAX]


def _names() -> list[str]:
    """What _name() or systemd has put there."""
    text, n = os.environ.get("LISTEN_FDNAMES", ""), 1
    while further := os.environ.get(f"{FURTHER}{n}", ""):
        text, n = text + further, n + 1
    return text.split(":")


def _watchdog_seconds() -> float:
    """After how many seconds without a sign of life this process is killed (sd_watchdog_enabled(3)); 0: never."""
    told = os.environ.get("WATCHDOG_USEC", "")
    meant = os.environ.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
    return int(told) / 1e6 if told.isdigit() and meant else 0.0


class Store:
    """Sends descriptors to their keeper, and gets them back at start. `kept` is False if nobody keeps them.

    Only the loop's thread calls it.
    """

    def __init__(self) -> None:
        self.path = os.environ.get("NOTIFY_SOCKET", "")
        paired = next((fd for name, fd in self.inherited() if name == "notify"), -1)  # the keeper's end is the other
        self.told = bool(self.path) or paired >= 0  # does anybody hear what is said?
        self.kept = self.told and ("GRAFT_KEEPER" in os.environ or int(os.environ.get("FDSTORE", "0")) > 0)
        self.sock = (
            socket.socket(fileno=paired)
            if paired >= 0
            else socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        )
        self.signs = _watchdog_seconds() / 4  # between two signs of life
        self.expected: int | None = None  # seconds of silence that expect() has said
        self.next_sign = 0.0
        self.status_told = ""
        self.waiting: deque[tuple[str, tuple[int, ...]]] = deque()  # unsent: the keeper is stopped or slow

    def _notify(self, message: str, fds: tuple[int, ...] = ()) -> None:
        if not self.told:
            return
        self.waiting.append((message, tuple(os.dup(fd) for fd in fds)))
        self.flush()

    def flush(self) -> None:
        """Send what could not be sent before. Never blocks and raises nothing; a failed message is dropped."""
        while self.waiting:
            message, fds = self.waiting[0]
            try:
                self._send(message, fds)
            except BlockingIOError:
                return
            except OSError as error:  # a dropped one is no loss: a dead keeper is replaced by one that gets all
                log.warning("cannot send to the descriptor store: %s", error.strerror)
            self.waiting.popleft()
            for fd in fds:
                os.close(fd)

    def _send(self, message: str, fds: tuple[int, ...]) -> None:
        if self.path:
            self.sock.connect("\0" + self.path[1:] if self.path.startswith("@") else self.path)
        socket.send_fds(self.sock, [message.encode()], fds)

    def put(self, name: str, fd: int) -> None:
        """Store a copy of @fd under @name, which has no colon."""
        if self.kept:
            self._notify(f"FDSTORE=1\nFDNAME={name}", (fd,))

    def remove(self, name: str) -> None:
        """Remove all descriptors that are stored under @name."""
        if self.kept:
            self._notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def ready(self) -> None:
        """Tell the service manager or the keeper that start-up is over (sd_notify(3), READY=1)."""
        self._notify("READY=1")

    def expect(self, seconds: int | None) -> None:
        """Have this process killed after @seconds without a sign of life (sd_notify(3), WATCHDOG_USEC=); 0: never.

        None: as it was when this process started. GRAFT_WATCHDOG of the environment wins.
        """
        if seconds == self.expected or os.environ.get("GRAFT_WATCHDOG"):
            return
        self.expected = seconds
        patience = _watchdog_seconds() if seconds is None else float(seconds)
        self.signs, self.next_sign = patience / 4, 0.0
        self._notify(f"WATCHDOG_USEC={int(patience * 1e6)}")

    def status(self, text: str) -> None:
        """Say in a few words what this process does, for `systemctl status` (STATUS=), if it is another thing now."""
        if self.path and text != self.status_told:
            self.status_told = text
            self._notify(f"STATUS={text}")

    def alive(self, now: float) -> None:
        """Give the keeper or the service manager a sign of life (sd_notify(3), WATCHDOG=1), if one is due.

        @now: monotonic seconds. It goes before others that wait: to systemd those are no signs of life.
        """
        sign: tuple[str, tuple[int, ...]] = ("WATCHDOG=1", ())
        if self.told and self.signs and now >= self.next_sign and sign not in self.waiting:
            self.next_sign = now + self.signs
            self.waiting.appendleft(sign)
            self.flush()

    @staticmethod
    def inherited() -> list[tuple[str, int]]:
        """The (name, descriptor) pairs that this process got at start (sd_listen_fds_with_names(3))."""
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return []
        count = int(os.environ.get("LISTEN_FDS", "0"))
        names = _names()
        pairs = []
        for i in range(count):
            fd = LISTEN_FDS_START + i
            os.set_inheritable(fd, False)
            pairs.append((names[i] if i < len(names) else "unknown", fd))
        return pairs
