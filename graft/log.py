"""The log of graftd and its keeper: lines on standard error that begin with the name of their process.

Where standard error is the journal, lines go to journald's socket, with fields (systemd.journal-fields(7)): CONTAINER
for those that begin with "container NAME", and what a caller adds. A line that the socket does not take has
journald's priority prefix (sd-daemon(3)), and graftd's have no name, because journald writes the unit's before them.

Containers and unprivileged users cause log lines, and must not fill the disk or forge lines. So a message is cut to
a few hundred characters and one line (graft/text.py), and after BURST lines at most RATE lines a second are written.
That is still 700 MB a day, and a file in /run is in memory. So graftd trims a file of its own from time to time.
"""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from graft.text import plain

RATE, BURST = 20.0, 200.0
FILE_MAX, FILE_KEPT = 16 << 20, 4 << 20  # bytes
JOURNAL = "/run/systemd/journal/socket"
_PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def is_journal() -> bool:
    """Is standard error the journal? JOURNAL_STREAM alone may be a parent's (systemd.exec(5))."""
    try:
        stderr = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class _Formatter(logging.Formatter):
    program = "graftd"

    def message(self, record: logging.LogRecord) -> str:
        """The line, and those of an exception, without anything before them."""
        text = plain(record.getMessage())
        if record.exc_info:
            lines = self.formatException(record.exc_info).splitlines()
            text = "\n".join([text, *(plain(line) for line in lines)])
        return text

    def format(self, record: logging.LogRecord) -> str:
        text = self.message(record)
        if not is_journal():
            return f"{self.program}: {text}"
        name = "" if self.program == "graftd" else f"{self.program}: "
        return f"<{_PRIORITY.get(record.levelno, 6)}>{name}{text}"


def entry(fields: Mapping[str, str]) -> bytes:
    """The datagram of an entry for journald (https://systemd.io/JOURNAL_NATIVE_PROTOCOL/).

    A value with line ends has its length before it, so that none of its lines is a field.
    """
    told = bytearray()
    for name, value in fields.items():
        raw = value.encode(errors="replace")
        if b"\n" in raw:
            told += name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"
        else:
            told += name.encode() + b"=" + raw + b"\n"
    return bytes(told)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to standard error, or to the journal if that is it."""

    journal: socket.socket | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if not (is_journal() and self._send(record)):
            super().emit(record)

    def _send(self, record: logging.LogRecord) -> bool:
        """Has journald taken the line, or lost it because it is stopped? graftd does not wait for it."""
        try:
            if self.journal is None:
                self.journal = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            self.journal.sendto(entry(_fields(record)), JOURNAL)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True


def _fields(record: logging.LogRecord) -> dict[str, str]:
    message = _formatter.message(record)
    fields = {"MESSAGE": message, "PRIORITY": str(_PRIORITY.get(record.levelno, 6))}
    fields["SYSLOG_IDENTIFIER"] = _formatter.program
    if isinstance(record.args, tuple) and record.args and record.msg.startswith("container %s"):
        fields["CONTAINER"] = plain(str(record.args[0]))
    return fields | {name: plain(value) for name, value in getattr(record, "fields", {}).items()}


class _Limit(logging.Filter):
    """A token bucket. The next line that passes tells how many lines were dropped before it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.at, self.dropped = BURST, time.monotonic(), 0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        self.tokens, self.at = min(BURST, self.tokens + (now - self.at) * RATE), now
        if self.tokens < 1:
            self.dropped += 1
            return False
        self.tokens -= 1
        if self.dropped:
            record.msg = f"{record.getMessage()} ({self.dropped} lines before it were dropped)"
            record.args, self.dropped = (), 0
        return True


log = logging.getLogger("graftd")
_handler = _Handler()
_formatter = _Formatter("%(message)s")
_handler.setFormatter(_formatter)
_handler.addFilter(_Limit())
log.addHandler(_handler)
_told = os.environ.get("GRAFT_LOG", "")
log.setLevel(_told.upper() if _told.upper() in logging.getLevelNamesMapping() else "INFO")


def check_level() -> None:
    """Log a warning if GRAFT_LOG names no level: it is as if it were not there."""
    if _told and _told.upper() not in logging.getLevelNamesMapping():
        log.warning("GRAFT_LOG=%s is no level: debug, info, warning or error; it is as if it were not there", _told)


def set_level(level: str) -> None:
    """Log what is of this @level or above, unless GRAFT_LOG names another."""
    if _told.upper() not in logging.getLevelNamesMapping():
        log.setLevel(level.upper())


def set_program(name: str) -> None:
    """Name the lines that this process writes from now on."""
    _formatter.program = name


def trim(path: Path) -> None:
    """Cut the log at @path to its last FILE_KEPT bytes, if standard error is that file and it is beyond FILE_MAX.

    A file that somebody else has named is theirs. What fails is tried again the next time.
    """
    with contextlib.suppress(OSError):
        status = os.fstat(2)
        if status.st_size <= FILE_MAX or not os.path.samestat(status, path.stat()):
            return
        with open(path, "rb") as file:
            file.seek(-FILE_KEPT, os.SEEK_END)
            kept = file.read().partition(b"\n")[2]
        os.ftruncate(2, 0)
        os.write(2, kept)
