"""The ring buffer in which the kernel half reports, and how much of it each tenant may have.

csrc/report.bpf.h bounds what a tenant reports, so that one that is refused 50,000 times a second costs graftd no more
than one that is refused 500 times. What is beyond is counted.
"""

import ctypes
import os
import struct
import time
from collections.abc import Callable, Mapping

from graft.kernel import linux
from graft.kernel.denials import DENIAL, OPS, REASONS, Event
from graft.kernel.libbpf import SAMPLE
from graft.kernel.maps import Map
from graft.kernel.stamps import OWN_TENANT

REPORTS = struct.Struct("=QIIQ")
REPORTS_ALL = 0xFFFFFFFF
PIDNS = struct.Struct("=I")
FIRST_PIDNS = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
DRAIN_MAX = 256


class Reports:
    """The maps `denials` and `reports`, read. For the loop's thread.

    Processes are reported by their numbers in the pid namespace of the process that made this object.
    """

    def __init__(self, lib: ctypes.CDLL, maps: Mapping[str, Map]) -> None:
        self._lib = lib
        self._maps = maps
        self._ring: int | None = None
        self._drained = 0
        self._booted = 0.0  # when the machine was, in seconds since the epoch
        for number in (OWN_TENANT, REPORTS_ALL):
            self.allow(number)
        pidns = os.stat("/proc/self/ns/pid").st_ino
        maps["pidns_of_graftd"].update(bytes(4), PIDNS.pack(0 if pidns == FIRST_PIDNS else pidns))

    def open(self, callback: Callable[[Event], None]) -> int:
        """Open the ring buffer; drain() hands what is in it to @callback. Returns the descriptor to poll.

        Raises OSError.
        """

        def sample(_context: int, data: int, size: int) -> int:
            if size >= DENIAL.size:  # or an earlier release's programs have written it
                callback(self._event(ctypes.string_at(data, DENIAL.size)))
            self._drained += 1
            return -1 if self._drained >= DRAIN_MAX else 0

        self._sample = SAMPLE(sample)
        self._ring = self._lib.ring_buffer__new(self._maps["denials"].fd, self._sample, None, None)
        if not self._ring:
            raise linux.oserror("open the ring buffer of denials")
        epoll_fd: int = self._lib.ring_buffer__epoll_fd(self._ring)
        return epoll_fd

    def _event(self, raw: bytes) -> Event:
        tenant, op, reason, error, protocol, address, port, real, real_port, comm, when, pid = DENIAL.unpack(raw)
        text = comm.split(b"\0", 1)[0].decode(errors="replace")
        at = when / 1e9 + self._booted
        return Event(tenant, OPS[op], REASONS[reason], error, protocol, address, port, real, real_port, text, at, pid)

    def drain(self) -> None:
        """Pass at most DRAIN_MAX reports to the callback. A container may fill the ring faster than it is read."""
        self._drained = 0
        self._booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)  # the clock may have been set
        self._lib.ring_buffer__consume(self._ring)

    def allow(self, tenant: int) -> None:
        """Give a tenant a share of its own; without, it has one in common with all unknown ones. Raises OSError."""
        key = tenant.to_bytes(4, "little")
        if self._maps["reports"].get(key) is None:
            self._maps["reports"].update(key, bytes(REPORTS.size))

    def dropped(self, tenant: int) -> int:
        """How many calls of a tenant were not reported, because it had had its share or the ring buffer was full."""
        kept = self._maps["reports"].get(tenant.to_bytes(4, "little"))
        return int(REPORTS.unpack(kept)[3]) if kept else 0
