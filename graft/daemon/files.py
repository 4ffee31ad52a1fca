"""The administrator's files in /etc/graft, read again when they change.

Theory of operation

The loop's tick looks at each file once a second, by stat(2). inotify(7) would tell of a change at once, and not of
every change: not in a directory that is made later, nor behind a symbolic link that leads elsewhere, nor when
something is mounted there, nor on a network file system. An engine's files come in just these ways. A ConfigMap's are
links through `..data`, which is renamed; a configuration of swarm is a mount. graftd's loop wakes each second anyway.

A change is taken when two looks have found the same file, and nobody has it open to write. So an editor that writes
in place, or a tool that removes the file and makes it anew, is not met half way.

A file that is wrong changes nothing: what was read before stays in force. It is said once, with the line.
"""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from graft import toml
from graft.errors import Failure, GraftError
from graft.log import log
from graft.rules.configuration import (
    Configuration,
    configuration_path,
    endpoints_path,
    read_configuration,
    read_endpoints,
)
from graft.tenants import endpoint_file
from graft.tenants.registry import Registry

Signature = tuple[int, ...]  # of a file: device, inode, size, times in ns; () for none

AGAIN_SECONDS = 30.0  # until a file that could not be taken is tried again: a directory may be there then


def _signature(path: Path) -> Signature:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_being_written(path: Path) -> bool:
    """Has somebody the file open to write? Then it gets no read lease (fcntl(2), F_SETLEASE).

    The lease is broken by SIGURG, which is ignored by default, and not by SIGIO, which ends the process.
    """
    with contextlib.suppress(OSError), open(path, "rb", opener=toml.at_once) as file:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:  # EINVAL: the file system has no leases
            return error.errno == errno.EAGAIN
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


class File:
    """One file, and what is done with it."""

    def __init__(self, path: Path, take: Callable[[], None]) -> None:
        """@take puts the file in force. It may raise GraftError and OSError, and then nothing has changed."""
        self.path = path
        self.take = take
        self.fault = ""  # why it was not taken
        self.taken = self.seen = _signature(path)  # at the last time that it was read, and looked at
        self.again = float("inf")  # monotonic seconds

    def look(self) -> None:
        """Read the file if it has changed, and has come to rest."""
        found = _signature(self.path)
        rests, self.seen = found == self.seen, found
        due = found != self.taken or time.monotonic() >= self.again
        if rests and due and not _is_being_written(self.path):
            self.taken = found
            if self.read():
                log.info("%s: %s", self.path, "in force now" if found else "it is gone; nothing of it is in force")

    def read(self) -> bool:
        """Read the file now. Returns whether it is in force; why not is logged, unless that was said before."""
        try:
            self.take()
        except (GraftError, OSError) as error:
            if self.fault != str(error):
                self.fault = str(error)
                log.error("%s; what was in force stays so", error)
            self.again = time.monotonic() + AGAIN_SECONDS
            return False
        self.fault, self.again = "", float("inf")
        return True


class Files:
    """graftd.toml and endpoints.toml."""

    def __init__(self, registry: Registry, configure: Callable[[Configuration], None]) -> None:
        """@configure puts a configuration in force."""
        self.registry = registry
        self.configuration = File(configuration_path(), lambda: configure(read_configuration()))
        self.endpoints = File(endpoints_path(), lambda: endpoint_file.take(registry, read_endpoints()))

    def begin(self) -> Configuration:
        """The configuration with which graftd starts. Raises Failure if it is wrong and no container runs.

        Those that run must not lose their network for a slip of the pen: they go on, with the defaults.
        """
        try:
            return read_configuration()
        except Failure as error:
            if not self.registry.tenants:
                raise
            self.configuration.fault = str(error)
            log.error("%s; until it is right, the defaults are in force", error)
            return Configuration()

    def look(self) -> None:
        """Read what has changed. To be called once a second."""
        self.configuration.look()
        self.endpoints.look()

    def faults(self) -> list[str]:
        """What is wrong with the files that are not in force."""
        return [file.fault for file in (self.configuration, self.endpoints) if file.fault]
