"""The entrance of a container's netns: the program of sk_lookup there, and the listener that it selects.

Each netns has a program of its own (csrc/entrance.bpf.c says why). libbpf would take a millisecond for each: it opens
the object, makes its maps and loads type information. So it loads the object once, and its relocated instructions are
the pattern: the descriptor of the netns's own map is put in, and bpf(2) loads that.

Sources: libbpf.h, bpf(2), linux/bpf.h, kernel/bpf/net_namespace.c.
"""

import ctypes
import os
import struct
from collections.abc import Mapping

from graft.errors import Failure
from graft.kernel.libbpf import ENTRANCE_OBJECT, complaints, libbpf_functions, open_object
from graft.kernel.links import BPF_OBJ_GET_INFO_BY_FD, InfoAttr
from graft.kernel.maps import Map, bpf

BPF_MAP_CREATE, BPF_PROG_LOAD, BPF_LINK_CREATE = 0, 5, 28
BPF_MAP_TYPE_SOCKMAP = 15
BPF_PROG_TYPE_SK_LOOKUP = 30
BPF_SK_LOOKUP = 36  # the attach type
NAME = b"graft_entrance"
LICENSE = b"GPL"
INSTRUCTION = struct.Struct("=BBhi")  # struct bpf_insn: code, registers, offset, immediate
MAP_INFO = struct.Struct("=II")  # struct bpf_map_info, as far as it is needed: type, id
LD_IMM64 = 0x18  # BPF_LD | BPF_IMM | BPF_DW
PSEUDO_MAP_FD = 1  # as its source register: the immediate is a map's descriptor


class MapAttr(ctypes.Structure):
    """union bpf_attr of BPF_MAP_CREATE, as far as it is needed."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("map_type", "key_size", "value_size", "max_entries", "map_flags")),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
    )


class LoadAttr(ctypes.Structure):
    """union bpf_attr of BPF_PROG_LOAD, as far as it is needed."""

    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
        ("prog_ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
    )


class LinkAttr(ctypes.Structure):
    """union bpf_attr of BPF_LINK_CREATE, as far as it is needed."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("prog_fd", "target_fd", "attach_type", "flags"))


class Entrances:
    """Makes the programs. @maps: those of kernel.programs.Kernel. Only the loop's thread calls it."""

    def __init__(self, maps: Mapping[str, Map]) -> None:
        self._maps = maps
        self._handle = 0  # of the object, which stays open: the pattern has descriptors of its maps
        self._pattern = b""
        self._own = -1
        self._common = _map_id(maps["forwards"].fd)

    def common(self) -> int:
        """The number that the kernel has given the map of the common program, in which the programs end."""
        return self._common

    def attach(self, netns: int, listener: int) -> int:
        """Lead what is dialled in the netns @netns to the socket @listener, whose SO_PRIORITY is the tenant.

        Returns a descriptor of the link. The program is detached when its last copy is closed, or the netns ends; the
        socket is not held by it. Raises OSError, and Failure if the kernel refuses the program.
        """
        if not self._handle:
            self._open()
        sockets = bpf(BPF_MAP_CREATE, MapAttr(BPF_MAP_TYPE_SOCKMAP, 4, 8, 1, 0, 0, 0, b"entrance"), "make a map")
        try:
            Map(sockets, "entrance", 8).update(bytes(4), listener.to_bytes(8, "little"))
            program = self._load(sockets)
        finally:
            os.close(sockets)
        try:
            return bpf(BPF_LINK_CREATE, LinkAttr(program, netns, BPF_SK_LOOKUP, 0), "attach it to a netns")
        finally:
            os.close(program)

    def _open(self) -> None:
        lib = libbpf_functions()
        handle = open_object(lib, ENTRANCE_OBJECT)
        lib.bpf_map__reuse_fd(lib.bpf_object__find_map_by_name(handle, b"forwards"), self._maps["forwards"].fd)
        result = lib.bpf_object__load(handle)
        if result:
            told = "; ".join(complaints)
            lib.bpf_object__close(handle)
            raise Failure(f"the kernel refused the program of containers' netns: {os.strerror(-result)}: {told}")
        program = lib.bpf_object__next_program(handle, None)
        size = lib.bpf_program__insn_cnt(program) * INSTRUCTION.size
        self._pattern = ctypes.string_at(lib.bpf_program__insns(program), size)
        self._own = lib.bpf_map__fd(lib.bpf_object__find_map_by_name(handle, b"entrance"))
        self._handle = handle

    def _load(self, sockets: int) -> int:
        made = bytearray(self._pattern)
        for at in range(0, len(made), INSTRUCTION.size):
            code, registers, offset, value = INSTRUCTION.unpack_from(made, at)
            if code == LD_IMM64 and registers >> 4 == PSEUDO_MAP_FD and value == self._own:
                INSTRUCTION.pack_into(made, at, code, registers, offset, sockets)
        text = (ctypes.c_char * len(made)).from_buffer(made)
        terms = ctypes.create_string_buffer(LICENSE)
        attr = LoadAttr(
            BPF_PROG_TYPE_SK_LOOKUP,
            len(made) // INSTRUCTION.size,
            ctypes.addressof(text),
            ctypes.addressof(terms),
            prog_name=NAME,
            expected_attach_type=BPF_SK_LOOKUP,
        )
        return bpf(BPF_PROG_LOAD, attr, "load the program of a netns")


def _map_id(fd: int) -> int:
    """The number of the map @fd. Raises OSError."""
    info = ctypes.create_string_buffer(MAP_INFO.size)
    bpf(BPF_OBJ_GET_INFO_BY_FD, InfoAttr(fd, len(info), ctypes.addressof(info)), "look at a map")
    number: int = MAP_INFO.unpack(info.raw)[1]
    return number
