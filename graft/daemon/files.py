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
from graft.rules.grants import NOBODY, read_users, users_path
from graft.tenants import endpoint_file
from graft.tenants.registry import Registry

Signature = tuple[int, ...]  # of a file: device, inode, size, times in ns; () for none

HELD_LOOKS = 10  # that find a file open to write until that is told
AGAIN_SECONDS = 30.0  # until a file that could not be taken is tried again: a directory may be there then


def _signature(file: Path | int) -> Signature:
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_being_written(descriptor: int) -> bool:
    """Has somebody the file open to write? Then it gets no read lease (fcntl(2), F_SETLEASE).

    The lease is broken by SIGURG, which is ignored by default, and not by SIGIO, which ends the process.
    """
    with contextlib.suppress(OSError):  # EINVAL: the file system has no leases
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


class File:
    """One file, and what is done with it."""

    def __init__(self, path: Path, take: Callable[[int], None]) -> None:
        """@take puts the file in force, of which it gets a descriptor, as toml.read() has it.

        It may raise GraftError and OSError, and then nothing has changed.
        """
        self.path = path
        self.take = take
        self.fault = ""  # why it was not taken
        self.taken = self.seen = _signature(path)  # at the last time that it was read, and looked at
        self.again = float("inf")  # monotonic seconds
        self.held = 0  # so many looks have found it open to write, one after another

    def look(self) -> None:
        """Read the file if it has changed, and has come to rest."""
        found = _signature(self.path)
        rests, self.seen = found == self.seen, found
        if not rests or (found == self.taken and time.monotonic() < self.again):
            return
        descriptor = toml.NO_FILE
        try:
            if found:
                descriptor = toml.at_once(str(self.path), os.O_RDONLY)
            self._look_into(descriptor, found)
        except OSError as error:
            self._fail(f"{self.path}: {error.strerror}")
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _look_into(self, descriptor: int, found: Signature) -> None:
        if descriptor >= 0 and _signature(descriptor) != found:
            return  # another one by now, which the next look finds
        if descriptor >= 0 and _is_being_written(descriptor):
            self.held += 1
            if self.held == HELD_LOOKS:
                self._fail(f"{self.path}: somebody has it open to write, and it is read when that ends")
            return
        self.held = 0
        self.taken = found
        if self.read(descriptor):
            log.info("%s: %s", self.path, "in force now" if found else "it is gone; nothing of it is in force")

    def _fail(self, fault: str) -> None:
        if self.fault != fault:
            self.fault = fault
            log.error("%s; what was in force stays so", fault)

    def read(self, descriptor: int = toml.BY_PATH) -> bool:
        """Read the file now. Returns whether it is in force; why not is logged, unless that was said before."""
        try:
            self.take(descriptor)
        except (GraftError, OSError) as error:
            self._fail(str(error))
            self.again = time.monotonic() + AGAIN_SECONDS
            return False
        self.fault, self.again = "", float("inf")
        return True


class Files:
    """graftd.toml, endpoints.toml and users.toml."""

    def __init__(self, registry: Registry, configure: Callable[[Configuration], None]) -> None:
        """@configure puts a configuration in force."""
        self.registry = registry
        self.granted = NOBODY  # what users.toml says
        self.configuration = File(configuration_path(), lambda file: configure(read_configuration(file)))
        self.endpoints = File(endpoints_path(), lambda file: endpoint_file.take(registry, read_endpoints(file)))
        self.users = File(users_path(), self._grant)

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
        self.users.look()

    def _grant(self, file: int) -> None:
        self.granted = read_users(file)

    def faults(self) -> list[str]:
        """What is wrong with the files that are not in force."""
        return [file.fault for file in (self.configuration, self.endpoints, self.users) if file.fault]
