"""The cgroup of a direct container: made, given the policy's programs and its tenant, looked at, removed.

Theory of operation

The programs of a direct container make their internet sockets themselves, in the host's netns. What keeps these to
the policy is that they are made in the container's cgroup: the programs of csrc/ are attached there as they are to
graftd's, and they know the tenant by the cgroup's storage.

A process of the container may be there only when all that is in place. So the order is: the cgroup is made, the
programs are attached, the tenant is written, and only then a process enters. Before the tenant is written no socket
is made there.

The program of sockops runs five times for a connection, and what it does it does at listen() alone. So it is attached
when a container's first socket is to listen (let_listen()); graftd carries out that call. A listener that came
about without is reached by nobody (csrc/receive.bpf.h).

The programs are attached without links. So nobody takes them away by removing a pin, they stay while no graftd runs,
and the kernel keeps them with the sockets of a cgroup that has been removed. A graftd with newer programs puts each
in the place of the old one.

Sources: bpf(2), linux/bpf.h, cgroups(7), Documentation/bpf/map_cgroup_storage.rst.
"""

import contextlib
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from graft.errors import Refused, from_oserror
from graft.kernel.cgroup import cgroup2_root, run_dir
from graft.kernel.links import Attachable, attach, attached_programs, directory, grafts_program
from graft.kernel.maps import Map

SOCK_OPS = 3  # BPF_CGROUP_SOCK_OPS, of graft_sockops alone
KEY_SIZE = 8
VALUE = struct.Struct("=II")  # struct graft_direct
LEASH = struct.Struct("=QQII")


class Programs(NamedTuple):
    """What is attached to each such cgroup, and to one with listeners besides, and the maps of whose it is.

    @direct: for the programs there. @cgroups: for those on the root.
    """

    attachable: Sequence[Attachable]
    listening: Attachable
    direct: Map
    cgroups: Map


def direct_programs(found: Iterable[Attachable], direct: Map, cgroups: Map) -> Programs:
    """Programs of all that a graftd attaches to such cgroups."""
    always = list(found)
    listening = next(program for program in always if program.type == SOCK_OPS)
    always.remove(listening)
    return Programs(always, listening, direct, cgroups)


def roots_own(path: Path) -> Path:
    """@path, or the nearest cgroup above it that nobody but root may move processes in, nor in those above it.

    Whoever may write the cgroup.procs of a common ancestor moves processes about below it (cgroups(7)).
    Raises OSError.
    """
    found = root = cgroup2_root()
    for part in path.relative_to(root).parts:
        if os.stat(root := root / part).st_uid or os.stat(root / "cgroup.procs").st_uid:
            break
        found = root
    return found


def make(parent: Path, name: str, number: int) -> Path:
    """Make the cgroup of a container below @parent, that of the process which starts it, whose limits hold on.

    @number: is in its name if somebody is still in one of the same name. Raises Refused, OSError.
    """
    kind = parent / "cgroup.type"
    if kind.exists() and kind.read_text().strip() != "domain":
        raise Refused(
            f"the cgroup {parent} is threaded, which can have no container's below it",
            hint="start it in another one, or without --direct",
            code="EOPNOTSUPP",
        )
    path = parent / f"{run_dir().name}-{name}"
    with contextlib.suppress(OSError):  # what a graftd that was killed has left; it fails where somebody is there
        path.rmdir()
    if path.exists():
        path = path.with_name(f"{path.name}-{number}")
    try:
        path.mkdir()
    except OSError as error:
        raise from_oserror(f"make the cgroup {path}", error, hint="'graft doctor' says what is missing") from None
    return path


def guard(programs: Programs, cgroup: Path, tenant: int, low: int) -> None:
    """Attach the policy to @cgroup for @tenant: from the next socket on it holds there. Raises OSError.

    @low: the net.ipv4.ip_unprivileged_port_start of the container's netns.
    """
    with directory(cgroup) as target:
        there = attached_programs(target, programs.attachable)
        for program in programs.attachable:
            if program.number not in there:
                attach(target, program, anew=True)
        if _listens_by_another(programs, target):
            attach(target, programs.listening, anew=True)
        programs.direct.update(_key(target), VALUE.pack(tenant, low))
        programs.cgroups.update(_key(target), tenant.to_bytes(4, "little"))


def is_guarded(programs: Programs, cgroup: Path, tenant: int) -> bool:
    """Are all programs attached to @cgroup, for @tenant? Raises OSError."""
    with directory(cgroup) as target:
        there = attached_programs(target, programs.attachable)
        if any(program.number not in there for program in programs.attachable):
            return False
        if _listens_by_another(programs, target):
            return False
        value = programs.direct.get(_key(target))
    return value is not None and VALUE.unpack(value)[0] == tenant


def let_listen(programs: Programs, cgroup: Path) -> bool:
    """Attach to @cgroup what sockets need that listen; False: it was there. Raises OSError."""
    with directory(cgroup) as target:
        if grafts_program(target, programs.listening.type) == programs.listening.number:
            return False
        attach(target, programs.listening, anew=True)
    return True


def _listens_by_another(programs: Programs, target: int) -> bool:
    """Has a graftd with other programs let the containers of this cgroup listen? Raises OSError."""
    return grafts_program(target, programs.listening.type) not in (0, programs.listening.number)


def forget(cgroups: Map, tenant: int) -> None:
    """Take the cgroups of @tenant out of the map `direct_cgroups`. Raises OSError."""
    for key in list(cgroups.keys(KEY_SIZE)):
        if cgroups.get(key) == tenant.to_bytes(4, "little"):
            cgroups.delete(key)


def enter(cgroup: Path, pid: int) -> None:
    """Move the process @pid into @cgroup. Raises OSError."""
    (cgroup / "cgroup.procs").write_text(str(pid))


def is_populated(cgroup: Path) -> bool:
    """Is there a process in @cgroup or below it (cgroups(7), cgroup.events)?"""
    try:
        return "populated 1" in (cgroup / "cgroup.events").read_text()
    except OSError:
        return False


def processes(cgroup: Path) -> list[int]:
    """The PIDs in @cgroup and below it; those that another PID namespace has are left out."""
    found = []
    for at, _, _ in os.walk(cgroup):
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (Path(at) / "cgroup.procs").read_text().split() if pid != "0"]
    return found


def remove(cgroup: Path) -> None:
    """Remove @cgroup and what the container has made below it; best effort. Its sockets keep the policy."""
    for at, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(at)


def contains(outer: str, path: str) -> bool:
    """Is the cgroup @path the cgroup @outer, or below it? Both are below the root of cgroup2."""
    return bool(outer) and (path == outer or path.startswith(f"{outer}/"))


def directory_of(path: str) -> Path:
    """The directory of the cgroup with this path below the root of cgroup2. Raises Failure."""
    return cgroup2_root() / path.lstrip("/")


def _key(target: int) -> bytes:
    return os.fstat(target).st_ino.to_bytes(8, "little")


def unleash(leashes: Map, tenant: int) -> None:
    """Forget the listeners of a direct container, all of which have ended (csrc/leash.bpf.h). Raises OSError."""
    for key in list(leashes.keys(8)):
        leash = leashes.get(key)
        if leash and LEASH.unpack(leash)[2] == tenant:
            leashes.delete(key)
