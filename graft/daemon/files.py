"""The administrator's files in /etc/graft, read again when they change.

Theory of operation

The loop's tick looks at each file once a second, by stat(2). inotify(7) would tell of a change at once, and not of
every change: not in a directory that is made later, nor behind a symbolic link that leads elsewhere, nor when
something is mounted there, nor on a network file system. An engine's files come in just these ways. A ConfigMap's are
links through `..data`, which is renamed; a configuration of swarm is a mount. graftd's loop wakes each second anyway.

A change is taken when two looks have found the same file, and nobody has it open to write. So an editor that writes
in place, or a tool that removes the file and makes it anew, is not met half way.

Who does not want to wait for that tells graftd, by SIGHUP or `graftd --reload`: then it reads all that has changed.

A file that is wrong changes nothing: what was read before stays in force. It is said once, with the line. The
files of endpoints are one in this: an endpoint that moves from one of them to another is never in two, nor in none.
"""

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from graft import toml
from graft.errors import Failure, GraftError
from graft.log import log
from graft.rules.configuration import (
    Configuration,
    configuration_path,
    endpoints_paths,
    read_configuration,
    read_endpoints,
)
from graft.rules.grants import CLOSED, NOBODY, parse_users, read_users, users_path
from graft.tenants import endpoint_file
from graft.tenants.registry import Registry

Signature = tuple[int, ...]  # of a file: device, inode, size, times in ns; () for none; an errno: out of reach

HELD_LOOKS = 10  # that find a file open to write until that is told
AGAIN_SECONDS = 30.0  # until a file that could not be taken is tried again: a directory may be there then


def _signature(file: Path | int) -> Signature:
    try:
        found = os.stat(file)
    except OSError as error:
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
        if gone and isinstance(file, Path) and toml.is_lost(file):  # it is meant to be there
            return (-errno.ENOLINK,)
        return () if gone else (-(error.errno or 1),)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_being_written(descriptor: int) -> bool:
    """Has somebody the file open to write? Then it gets no read lease (fcntl(2), F_SETLEASE).

    The lease is broken by SIGURG, which does nothing here, and not by SIGIO, which ends the process.
    """
    with contextlib.suppress(OSError):  # EINVAL: the file system has no leases
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


class Group:
    """Files that are read together, and what is done with them. Mostly it is one."""

    def __init__(self, paths: Callable[[], list[Path]], take: Callable[[toml.Opened | None], None]) -> None:
        """@paths: which files; it may raise GraftError. @take puts them in force, as toml.read() has them opened.

        It may raise GraftError and OSError, and then nothing has changed.
        """
        self.paths = paths
        self.take = take
        self.fault = ""  # why they were not taken
        self.again = float("inf")  # monotonic seconds
        self.lost = False  # it cannot be told which they are
        self.taken: dict[Path, Signature] = {}  # at the last time that they were read
        self.taken = self.seen = self._signatures()  # and looked at
        self.held = 0  # so many looks have found one open to write, one after another

    def _signatures(self) -> dict[Path, Signature]:
        """Those of the files that are there."""
        try:
            signatures = {path: found for path in self.paths() if (found := _signature(path))}
        except GraftError as error:
            self._fail(str(error))
            self.lost = True
            return self.taken
        if self.lost:
            self.lost, self.again = False, 0.0  # they are read again, also if they are as they were
        return signatures

    def look(self) -> None:
        """Read the files if one has changed, and all have come to rest."""
        found = self._signatures()
        rests, self.seen = found == self.seen, found
        if rests and (found != self.taken or time.monotonic() >= self.again):
            self._look_into(found, patient=True)

    def reload(self) -> None:
        """Read the files now, if one has changed or they are not in force."""
        found = self.seen = self._signatures()
        if found != self.taken or self.fault:
            self._look_into(found, patient=False)

    def _look_into(self, found: dict[Path, Signature], *, patient: bool) -> None:
        opened: dict[Path, int] = {}
        try:
            for path in found:
                opened[path] = toml.at_once(str(path), os.O_RDONLY)
            if {path: _signature(fd) for path, fd in opened.items()} != found:
                return  # others by now, which the next look finds
            written = next((path for path, fd in opened.items() if _is_being_written(fd)), None)
            if written:
                self.held += 1
                if self.held == HELD_LOOKS or not patient:
                    self._fail(f"{written}: somebody has it open to write, and it is read when that ends")
                return
            before, self.held, self.taken = self.taken, 0, found
            if self.read(opened):
                for path in sorted(before.keys() | found.keys()):
                    if before.get(path) != found.get(path):
                        log.info("%s: %s", path, "in force now" if path in found else "it is gone; nothing of it is")
        except OSError as error:  # once it can be opened it is read, also if it is the one that was
            self.taken, self.again = found, time.monotonic() + AGAIN_SECONDS
            self._fail(f"{error.filename}: {error.strerror}")
        finally:
            for fd in opened.values():
                os.close(fd)

    def _fail(self, fault: str) -> None:
        if self.fault != fault:
            self.fault = fault
            log.error("%s; what was in force stays so", fault)

    def read(self, opened: toml.Opened | None = None) -> bool:
        """Read the files now. Returns whether they are in force; why not is logged, unless that was said before."""
        try:
            self.take(opened)
        except (GraftError, OSError) as error:
            self._fail(str(error))
            self.again = time.monotonic() + AGAIN_SECONDS
            return False
        self.fault, self.again = "", float("inf")
        return True


class Files:
    """graft.toml, the endpoints' files and users.toml."""

    def __init__(self, registry: Registry, configure: Callable[[Configuration], None]) -> None:
        """@configure puts a configuration in force."""
        self.registry = registry
        self.granted = NOBODY  # what users.toml says
        self.configuration = Group(lambda: [configuration_path()], lambda files: configure(read_configuration(files)))
        self.endpoints = Group(endpoints_paths, lambda files: endpoint_file.take(registry, read_endpoints(files)))
        self.users = Group(lambda: [users_path()], self._grant)

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

    def begin_users(self) -> None:
        """Put users.toml in force. If it is wrong, what the graftd before had in force stays so.

        Where there was none, users get nothing: the file may be there to keep them from what they have without it.
        """
        if self.users.read():
            return
        try:
            self.granted = CLOSED if self.registry.users_file is None else parse_users(self.registry.users_file)
        except GraftError:  # that was another release, with another grammar
            self.granted = CLOSED
        if self.granted is CLOSED:
            log.error("%s: until it is right, users without root get nothing", users_path())

    def _groups(self) -> Iterator[Group]:
        yield from (self.configuration, self.endpoints, self.users)

    def look(self) -> None:
        """Read what has changed. To be called once a second."""
        for group in self._groups():
            group.look()

    def reload(self) -> list[str]:
        """Read what has changed, at once; returns what is wrong, as faults()."""
        for group in self._groups():
            group.reload()
        return self.faults()

    def _grant(self, files: toml.Opened | None) -> None:
        self.granted = read_users(files)
        if self.registry.users_file != self.granted.text:
            self.registry.users_file = self.granted.text
            self.registry.save()

    def faults(self) -> list[str]:
        """What is wrong with the files that are not in force."""
        return [group.fault for group in self._groups() if group.fault]
