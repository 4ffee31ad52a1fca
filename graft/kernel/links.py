"""Where graft's programs are attached, and how they stay with sockets that outlive graftd.

Theory of operation

A cgroup program runs for the sockets that were created in its cgroup, wherever a socket goes. Sockets can outlive
their container: a program sends them to a process outside (SCM_RIGHTS, unix(7)). They must keep their policy when
graftd ends, or they are free sockets of the host.

The kernel counts the sockets of a cgroup, accepted ones as well, and keeps the programs of a removed cgroup until the
last of them is closed (cgroup_bpf_release() of kernel/bpf/cgroup.c). Links end with their pins. So graftd attaches
the programs to the cgroup itself before it removes pins and cgroup (leave()). Nothing of graft's is to be seen on the
host then, no other socket runs the programs, and the kernel frees them with the last socket.

A graftd that finds programs so attached to the cgroup it is going to use takes them away, after it has attached its
own (take_back()).

Sources: bpf(2), linux/bpf.h.
"""

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from graft.kernel.maps import bpf

BPF_PROG_ATTACH, BPF_PROG_DETACH = 8, 9
BPF_PROG_GET_FD_BY_ID = 13
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_PROG_QUERY = 16
BPF_F_ALLOW_MULTI, BPF_F_REPLACE = 2, 4
LINK_INFO = struct.Struct("=III4xQI36x")  # struct bpf_link_info: type, id, prog_id, cgroup_id, attach_type
PROGRAM_INFO_SIZE, PROGRAM_NAME = 80, slice(64, 80)  # struct bpf_prog_info, as far as its name
PROGRAMS_MAX = 64  # of one attach type at one cgroup


class InfoAttr(ctypes.Structure):
    """union bpf_attr of BPF_OBJ_GET_INFO_BY_FD (bpf(2))."""

    _fields_ = (("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64))


class IdAttr(ctypes.Structure):
    """union bpf_attr of BPF_PROG_GET_FD_BY_ID."""

    _fields_ = (("id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32))


class AttachAttr(ctypes.Structure):
    """union bpf_attr of BPF_PROG_ATTACH and BPF_PROG_DETACH."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("target_fd", "program_fd", "type", "flags", "replace_fd"))


class QueryAttr(ctypes.Structure):
    """union bpf_attr of BPF_PROG_QUERY."""

    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("program_ids", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("program_flags", ctypes.c_uint64),
    )


class Attached(NamedTuple):
    """What a link attaches: a program by its id, to a cgroup by its inode (0: it has ended), at an attach type."""

    program: int
    cgroup: int
    type: int


class Attachable(NamedTuple):
    """A program by its number, and the attach type at which it belongs."""

    number: int
    type: int


def attached(link: int) -> Attached:
    """What the link with the descriptor @link attaches. Raises OSError."""
    info = ctypes.create_string_buffer(LINK_INFO.size)
    bpf(BPF_OBJ_GET_INFO_BY_FD, InfoAttr(link, len(info), ctypes.addressof(info)), "look at a link")
    _, _, program, cgroup, kind = LINK_INFO.unpack(info.raw)
    return Attached(program, cgroup, kind)


def leave(links: Iterable[int], cgroup: Path) -> None:
    """Attach the programs of @links to @cgroup without a link: they stay as long as it has a socket.

    Raises OSError.
    """
    with directory(cgroup) as target:
        for link in links:
            what = attached(link)
            attach(target, Attachable(what.program, what.type))


def take_back(links: Iterable[int], cgroup: Path) -> None:
    """Detach what leave() has attached to @cgroup where @links are attached now. Raises OSError."""
    with directory(cgroup) as target:
        for kind in {attached(link).type for link in links}:
            for number in _attached_to(target, kind):
                with contextlib.suppress(FileNotFoundError):  # it is attached by a link, or has ended meanwhile
                    if _is_grafts(number):  # a service manager has programs of its own there
                        _detach(target, number, kind)


def attach(target: int, program: Attachable, *, anew: bool = False) -> None:
    """Attach a program to the cgroup with the descriptor @target, without a link. Raises OSError.

    @anew: it takes the place of an older one of graft's of its type, so that at no time both run for a socket.
    """
    fd = _program(program.number)
    old = grafts_program(target, program.type) if anew else 0
    replaced = _program(old) if old else -1
    try:
        flags = BPF_F_ALLOW_MULTI | (BPF_F_REPLACE if old else 0)
        attr = AttachAttr(target, fd, program.type, flags, replaced if old else 0)
        bpf(BPF_PROG_ATTACH, attr, "attach a program to a cgroup")
    finally:
        os.close(fd)
        if old:
            os.close(replaced)


def grafts_program(target: int, kind: int) -> int:
    """The number of graft's program that is attached to the cgroup @target at this attach type; 0: none is.

    Raises OSError.
    """
    return next((number for number in _attached_to(target, kind) if _is_grafts(number)), 0)


def attached_programs(target: int, programs: Iterable[Attachable]) -> set[int]:
    """The numbers of what is attached to the cgroup @target, of the types that @programs have. Raises OSError."""
    return {number for kind in {program.type for program in programs} for number in _attached_to(target, kind)}


def _attached_to(target: int, kind: int) -> list[int]:
    ids = (ctypes.c_uint32 * PROGRAMS_MAX)()
    query = QueryAttr(target, kind, 0, 0, ctypes.addressof(ids), PROGRAMS_MAX, 0, 0)
    bpf(BPF_PROG_QUERY, query, "look at a cgroup")
    return list(ids[: query.count])


def _detach(target: int, number: int, kind: int) -> None:
    program = _program(number)
    try:
        bpf(BPF_PROG_DETACH, AttachAttr(target, program, kind, 0, 0), "detach a program")
    finally:
        os.close(program)


def _is_grafts(number: int) -> bool:
    """Has the program with this number a name of graft's policy? Raises OSError: ENOENT if it has ended."""
    program = _program(number)
    try:
        info = ctypes.create_string_buffer(PROGRAM_INFO_SIZE)
        bpf(BPF_OBJ_GET_INFO_BY_FD, InfoAttr(program, len(info), ctypes.addressof(info)), "look at a program")
        return info.raw[PROGRAM_NAME].startswith(b"graft_")
    finally:
        os.close(program)


def _program(number: int) -> int:
    return bpf(BPF_PROG_GET_FD_BY_ID, IdAttr(number, 0, 0), f"open program {number}")


def program_number(fd: int) -> int:
    """The number of the program with the descriptor @fd. Raises OSError."""
    info = ctypes.create_string_buffer(PROGRAM_INFO_SIZE)
    bpf(BPF_OBJ_GET_INFO_BY_FD, InfoAttr(fd, len(info), ctypes.addressof(info)), "look at a program")
    return int.from_bytes(info.raw[4:8], "little")


@contextlib.contextmanager
def directory(cgroup: Path) -> Iterator[int]:
    """A descriptor of the directory of @cgroup, closed after the block. Raises OSError."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
