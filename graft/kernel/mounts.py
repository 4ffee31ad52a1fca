"""The mounts that a process sees (proc(5), /proc/PID/mountinfo)."""

import os
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """What of a file system of which kind is mounted where, and the options that are the file system's own."""

    place: str
    kind: str
    root: str = "/"
    options: tuple[str, ...] = ()
    device: int = 0  # st_dev of its files, where the file system has one alone


def mounts_of(pid: int | str) -> list[Mount]:
    """The mounts that the process @pid ("self": this one) sees; the last one at a place lies on top.

    Raises OSError if it has ended.
    """
    found = []
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().split(b"\n")[:-1]:
        before, _, after = line.partition(b" - ")
        _, _, device, root, place, *_ = before.split(b" ")
        kind, _, options = after.split(b" ", 2)
        words = tuple(os.fsdecode(options).split(","))
        number = os.makedev(*map(int, device.split(b":")))
        found.append(Mount(_path(place), kind.decode(), _path(root), words, number))
    return found


def reachable(kind: str) -> list[Mount]:
    """The mounts of file systems of this kind that this process finds at their places: no other mount covers them.

    @kind: one whose files have the device of the mount, as cgroup, cgroup2 and proc.
    """
    return [mount for mount in mounts_of("self") if mount.kind == kind and _device(mount.place) == mount.device]


def _device(place: str) -> int:
    try:
        return os.stat(place).st_dev
    except OSError:
        return -1


def _path(raw: bytes) -> str:
    """What the kernel has written with \\040 for a space, as a path of bytes of any encoding."""
    return os.fsdecode(raw.decode("unicode_escape").encode("latin-1"))
