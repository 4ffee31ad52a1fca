"""The thread that waits for the answer to a trapped call: its socket, its memory, its credentials.

Theory of operation

Goal: what is read was the caller's, and what is written reaches nobody else.

Facts: a caller may be killed at any moment, and its PID may be given to another process at once. The kernel says
whether a call still waits (SECCOMP_IOCTL_NOTIF_ID_VALID). While it waits, its PID is the caller's.

Solution, as seccomp_unotify(2) advises: what was taken by the PID counts only if the call still waits afterwards.

  - Reads take a copy by process_vm_readv(2), and then ask.
  - Writes open /proc/PID/mem, then ask, and then write to what is open. That file stays the memory of the process
    whose PID it was when it was opened, and nothing can be written to it once that process is gone.
  - A descriptor that is borrowed, and credentials that are acted with, are taken as reads are.

/proc/PID/mem lets a tracer write to read-only pages, as a debugger sets breakpoints (FOLL_FORCE in the kernel). The
kernel's own getsockname(2) fails there, and a program in a narrow sandbox must not get its code changed by us. So a
write looks at /proc/PID/maps first, which is opened before the question as well.

What still fails: before Linux 6.11 the mappings are read line by line, and not more than LINES_MAX of them, because
that holds up the loop; to a page beyond those nothing is written (EFAULT). And a caller that changes its own mappings
while we look may have a page written that was writable just before.
"""

import errno
import os
import struct
from collections.abc import Callable, Iterable
from itertools import islice
from typing import BinaryIO

from graft.kernel import linux
from graft.kernel.foreign import ForeignSocket
from graft.trap import target
from graft.trap.listener import Notification

LINES_MAX = 8192  # of /proc/PID/maps, about 3 us each; vm.max_map_count is 65530


class Caller:
    """The thread that made @call. @waiting: returns whether it still waits for the answer.

    All methods raise OSError: ESRCH if it does not wait any more, EFAULT for memory that it could not use itself.
    """

    def __init__(self, call: Notification, waiting: Callable[[], bool]) -> None:
        self.call = call
        self.args = call.args
        self.pid = call.pid
        self.waiting = waiting

    def check(self) -> None:
        """Raise ProcessLookupError unless the call still waits."""
        if not self.waiting():
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def number(self, argument: int) -> int:
        """An argument as a signed int, as the kernel takes it for an int parameter."""
        return target.signed(self.args[argument])

    def borrow(self) -> ForeignSocket | None:
        """A duplicate of the socket that is the first argument; None if that is no socket.

        Raises PermissionError on kernels before 6.9, if the thread has a descriptor table of its own.
        """
        try:
            fd = target.borrow_fd(self.pid, self.number(0))
        except PermissionError:
            raise
        except OSError:
            return None
        try:
            self.check()
            return ForeignSocket.adopt(fd)
        except ProcessLookupError:
            os.close(fd)
            raise
        except OSError:
            os.close(fd)
            return None

    def owner(self) -> target.Owner:
        """Its effective uid and gid, as graftd's user namespace sees them. Raises OSError."""
        owner = target.owner(self.pid)
        self.check()
        return owner

    def read(self, address: int, size: int) -> bytes:
        """Read @size bytes at @address. May block for ever, as linux.read_memory() says."""
        if not size:
            return b""
        raw = linux.read_memory(self.pid, address, size)
        self.check()
        if len(raw) < size:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        return raw

    def read_name(self, address: int, length: int) -> tuple[target.Name | None, bytes]:
        """Read the socket address at @address, @length bytes. Returns it parsed, and its bytes.

        The first is None as target.parse_name() says. Raises OSError: EINVAL for a @length that is none.
        """
        if not 0 <= length <= target.SOCKADDR_MAX:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        raw = self.read(address, length)
        return target.parse_name(raw), raw

    def write(self, *parts: tuple[int, bytes]) -> None:
        """Write each (address, data). May block for ever, as read() may. Nothing is written if one cannot be."""
        with open(f"/proc/{self.pid}/maps", "rb") as maps:
            memory = os.open(f"/proc/{self.pid}/mem", os.O_WRONLY | os.O_CLOEXEC)
            try:
                self.check()
                if not writable(maps, [(address, len(data)) for address, data in parts if data]):
                    raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
                for address, data in parts:
                    if data:
                        _write_all(memory, address, data)
            finally:
                os.close(memory)

    def write_value(self, address: int, length_address: int, value: bytes) -> None:
        """Write a value and its length, as getsockname(2) and getsockopt(2) do.

        The value is truncated to the length that the program has at @length_address; the length written is the full
        one. Raises OSError: also EINVAL if the program's length is negative.
        """
        room = int.from_bytes(self.read(length_address, 4), "little", signed=True)
        if room < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.write((address, value[:room]), (length_address, struct.pack("=i", len(value))))


def _write_all(memory: int, address: int, data: bytes) -> None:
    try:
        count = os.pwrite(memory, data, address)
    except OSError as error:
        if error.errno != errno.EIO:  # what /proc/PID/mem has for a page that cannot be had (fs/proc/base.c)
            raise
        count = 0
    if count < len(data):
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def writable(maps: BinaryIO, parts: list[tuple[int, int]]) -> bool:
    """May the process of @maps, its /proc/PID/maps, write to all (address, size)? Raises OSError.

    Linux 6.11 answers for one address; before, all lines are read, about 1 us each.
    """
    try:
        return all(_covered(maps, address, address + size) for address, size in parts)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
    return writable_by_lines(maps, parts)


def _covered(maps: BinaryIO, first: int, end: int) -> bool:
    while first < end:
        found = linux.writable_mapping(maps.fileno(), first)
        if found is None:
            return False
        first = found
    return True


def writable_by_lines(maps: Iterable[bytes], parts: list[tuple[int, int]]) -> bool:
    """As writable(), from the lines of /proc/PID/maps (proc(5))."""
    missing = [(address, address + size) for address, size in parts]
    for line in islice(maps, LINES_MAX):
        if not missing:
            break
        span, permissions = line.split(b" ", 2)[:2]
        if permissions[1:2] != b"w":
            continue
        low, _, high = span.partition(b"-")
        start, end = int(low, 16), int(high, 16)
        # mappings ascend: a part that begins in this one may go on in the next
        left = [(end if start <= at < end else at, last) for at, last in missing]
        missing = [(at, last) for at, last in left if at < last]
    return not missing
