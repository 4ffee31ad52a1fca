"""Stamps: the socket storage that makes a socket a grafted one (struct graft_stamp of the ABI header)."""

import contextlib
import ctypes
import errno
import os
import socket
import struct
import threading
from typing import NamedTuple

from graft.kernel import linux
from graft.kernel.linux import NR_BPF, libc
from graft.kernel.maps import BPF_MAP_UPDATE_ELEM, ElemAttr, Map

PROBE = struct.Struct("=II")


STAMP = struct.Struct("=III" + "16sI" * 4)
FAMILY_SIZE = 16 + 8 + 64 * 132

STAMP_INGRESS = 2
STAMP_CONNECTED = 16
STAMP_FAMILY = 32
STAMP_NAMED = 64
STAMP_PERMIT = 128
STAMP_SOURCE = 16384
STAMP_STAYS = 32768
STAMP_LATE = 131072
STAMP_WAITS = 262144
GRAFT_LEVEL, GRAFT_PROBE = 254, 1  # getsockopt(): does the policy run for this socket? See Stamper.vouch()
PREPARED = b"\xff" * 4  # of the map `prepared`
OWN_TENANT = 0  # in the stamp of graftd's own sockets


class Stamp(NamedTuple):
    """struct graft_stamp (csrc/abi.h): whose a socket is, in the kernel's socket storage.

    Each address is 16 bytes, IPv4 ones mapped, with a port in host order.
    """

    tenant: int
    flags: int = 0
    place: int = 0
    local: tuple[bytes, int] = (bytes(16), 0)
    local_real: tuple[bytes, int] = (bytes(16), 0)
    peer: tuple[bytes, int] = (bytes(16), 0)
    peer_real: tuple[bytes, int] = (bytes(16), 0)

    def pack(self) -> bytes:
        """The bytes of struct graft_stamp."""
        return STAMP.pack(
            self.tenant, self.flags, self.place, *self.local, *self.local_real, *self.peer, *self.peer_real
        )

    @classmethod
    def unpack(cls, raw: bytes) -> "Stamp":
        """The stamp in the bytes of struct graft_stamp. Raises struct.error for another size."""
        v = STAMP.unpack(raw)
        return cls(v[0], v[1], v[2], (v[3], v[4]), (v[5], v[6]), (v[7], v[8]), (v[9], v[10]))


class _Update(threading.local):
    """One thread's buffers for Stamper.stamp(), allocated once because every trapped socket() needs them."""

    def __init__(self, map_fd: int) -> None:
        self.key = ctypes.c_int()
        self.value = ctypes.create_string_buffer(STAMP.size)
        self.attr = ElemAttr(map_fd, 0, ctypes.addressof(self.key), ctypes.addressof(self.value), 0)
        self.reference = ctypes.byref(self.attr)
        self.size = ctypes.c_uint32(ctypes.sizeof(self.attr))


class Stamper:
    """Reads and writes the stamps of sockets. Any thread may call it. Its methods raise OSError.

    @settling, @preparing: the BPF maps, of whoever calls settle() and begin_to_prepare().
    """

    def __init__(self, stamps: Map, settling: Map | None = None, preparing: Map | None = None) -> None:
        self._stamps = stamps
        self._settling = settling
        self._preparing = preparing
        self._update = _Update(stamps.fd)

    def stamp(self, fd: int, tenant: int, flags: int, place: int = 0) -> None:
        """Stamp the new socket @fd with its tenant, STAMP_* @flags, and the number of the place (netns) it is in."""
        update = self._update
        update.key.value = fd
        struct.pack_into("=III", update.value, 0, tenant, flags, place)
        if libc.syscall(NR_BPF, BPF_MAP_UPDATE_ELEM, update.reference, update.size) < 0:
            raise linux.oserror("stamp a socket")

    def vouch(self, sock: socket.socket, tenant: int) -> None:
        """After stamp(): check that the policy runs for this socket, and count it among its tenant's sockets.

        Raises OSError: ENFILE beyond the tenant's limit, EIO if graft's programs are not attached where this process
        makes sockets.
        """
        try:
            stamped, over = PROBE.unpack(sock.getsockopt(GRAFT_LEVEL, GRAFT_PROBE, PROBE.size))
        except OSError as error:
            raise OSError(errno.EIO, "the policy is not attached") from error
        if stamped != tenant:
            raise OSError(errno.EIO, "another policy is attached")
        if over:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    def get(self, fd: int) -> Stamp | None:
        """The stamp of the socket @fd, None if it is not grafted."""
        value = self._stamps.get(struct.pack("=i", fd))
        return None if value is None else Stamp.unpack(value)

    def begin(self, sock: socket.socket) -> Stamp | None:
        """The stamp of a socket that a program of a direct container has made, which may have none yet.

        The hook of getsockopt() makes it (csrc/made.bpf.h). None for a socket that accept() has given.
        """
        with contextlib.suppress(OSError):  # the answer itself is the kernel's: ENOPROTOOPT
            sock.getsockopt(GRAFT_LEVEL, GRAFT_PROBE, PROBE.size)
        return self.get(sock.fileno())

    def put(self, fd: int, stamp: Stamp) -> None:
        """Write the whole stamp of the socket @fd."""
        self._stamps.update(struct.pack("=i", fd), stamp.pack())

    def settle(self, fd: int, *, now: bool) -> None:
        """Say whether graftd binds the socket @fd @now, which may have waited for it (csrc/late.bpf.h)."""
        assert self._settling is not None
        self._settling.update(struct.pack("=i", fd), (os.getpid() if now else 0).to_bytes(4, "little"))

    def begin_to_prepare(self, fd: int, owner: int) -> bool:
        """This process is about to set the options of its maker on the socket @fd, which a program has made.

        False: it has them. Whoever else has begun may have been killed since.
        """
        assert self._preparing is not None
        key = struct.pack("=i", fd)
        mark = self._preparing.get(key)
        if mark == PREPARED or (mark is None and os.fstat(fd).st_uid == owner):  # made by graft, for a sysctl
            return False
        self._preparing.update(key, os.getpid().to_bytes(4, "little"))
        return True

    def end_preparing(self, fd: int, *, prepared: bool) -> None:
        """After begin_to_prepare(): the socket has them, or it has not."""
        assert self._preparing is not None
        key = struct.pack("=i", fd)
        if prepared:
            self._preparing.update(key, PREPARED)
        else:
            self._preparing.delete(key)

    def tenant_of(self, fd: int) -> int | None:
        """The tenant of the socket @fd, None if it is not grafted."""
        value = self._stamps.get(struct.pack("=i", fd))
        return None if value is None else int.from_bytes(value[:4], "little")
