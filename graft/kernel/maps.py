"""BPF maps, by the system call bpf(2)."""

import ctypes
import errno
from collections.abc import Iterator

from graft.kernel import linux
from graft.kernel.linux import NR_BPF, libc

BPF_MAP_LOOKUP_ELEM = 1
BPF_MAP_UPDATE_ELEM = 2
BPF_MAP_DELETE_ELEM = 3
BPF_MAP_GET_NEXT_KEY = 4
BPF_OBJ_PIN = 6
BPF_OBJ_GET = 7


class ElemAttr(ctypes.Structure):
    """union bpf_attr of BPF_MAP_*_ELEM and BPF_MAP_GET_NEXT_KEY (bpf(2))."""

    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class ObjAttr(ctypes.Structure):
    """union bpf_attr of BPF_OBJ_PIN and BPF_OBJ_GET (bpf(2))."""

    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


def bpf(command: int, attr: ctypes.Structure, what: str) -> int:
    """bpf(2). Returns what the call returns; raises OSError that names @what."""
    result: int = libc.syscall(NR_BPF, command, ctypes.byref(attr), ctypes.c_uint32(ctypes.sizeof(attr)))
    if result < 0:
        raise linux.oserror(what)
    return result


class Map:
    """A BPF map by its descriptor. Keys and values are bytes, as long as the map says. Any thread may call it."""

    def __init__(self, fd: int, name: str, value_size: int) -> None:
        self.fd = fd
        self.name = name
        self.value_size = value_size

    def _elem(self, command: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None, flags: int = 0) -> int:
        kept = ctypes.create_string_buffer(key, len(key))
        attr = ElemAttr(self.fd, 0, ctypes.addressof(kept), ctypes.addressof(value) if value else 0, flags)
        return bpf(command, attr, f"BPF map {self.name}")

    def update(self, key: bytes, value: bytes) -> None:
        """Insert or replace an element. Raises OSError: E2BIG or ENOSPC if the map is full."""
        self._elem(BPF_MAP_UPDATE_ELEM, key, ctypes.create_string_buffer(value, len(value)))

    def delete(self, key: bytes) -> None:
        """Delete the element at @key, if there is one. Raises OSError."""
        try:
            self._elem(BPF_MAP_DELETE_ELEM, key, None)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise

    def get(self, key: bytes) -> bytes | None:
        """The value at @key, `value_size` bytes; None if there is none. Raises OSError."""
        value = ctypes.create_string_buffer(self.value_size)
        try:
            self._elem(BPF_MAP_LOOKUP_ELEM, key, value)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return value.raw

    def keys(self, key_size: int) -> Iterator[bytes]:
        """All keys. Elements that are added or deleted during the iteration may be missed. Raises OSError."""
        current = ctypes.create_string_buffer(key_size)
        following = ctypes.create_string_buffer(key_size)
        attr = ElemAttr(self.fd, 0, 0, ctypes.addressof(following), 0)
        while True:
            try:
                bpf(BPF_MAP_GET_NEXT_KEY, attr, f"BPF map {self.name}")
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return
                raise
            yield following.raw
            ctypes.memmove(current, following, key_size)
            attr.key = ctypes.addressof(current)
