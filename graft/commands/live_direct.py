"""How the process of `graft run --direct` comes to live in the host's netns, with what belongs to its own around it.

It has been in the container's netns, has its sysfs mounted, has its filter, and graftd has put it into its cgroup.
What is done here comes before the command is executed, in this order:

1. It asks whether the policy holds: SO_NETNS_COOKIE of a socket that it makes in the host's netns is answered by the
   policy, with the cookie of the container's. Anything else is the end.
2. The container's cgroup is mounted over cgroup2, and is the root of a new cgroup namespace. So no path leads to
   another cgroup, which root without any capability could enter (clone3(2) with CLONE_INTO_CGROUP asks no mount
   whether it is read-only).
3. /proc/sys/net, which shows who looks the host's, becomes read-only. Devices of RDMA are hidden.
4. /proc/net leads to that of the container's netns. /proc/PID/net still shows the host's (docs/security.md).

Sources: cgroup_namespaces(7), mount_setattr(2), move_mount(2).
"""

import ctypes
import os
import socket

from graft.errors import Failure, from_oserror
from graft.kernel import linux
from graft.kernel.cgroup import cgroup_of
from graft.kernel.direct import directory_of
from graft.kernel.mounts import mounts_of

OPEN_TREE_CLONE, AT_SYMLINK_NOFOLLOW = 1, 0x100
MOVE_MOUNT_EMPTY_PATHS = 0x4 | 0x40  # of both: MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH
RDMA = "/dev/infiniband"


def enter(home: int, netns: int, procfs: str) -> None:
    """Go to the netns @home, the host's; @netns is the container's. Both descriptors are closed.

    What the host mounts later does not come here.

    @procfs: the link that graftd keeps for /proc/net. Raises Failure.
    """
    try:
        cookie = _cookie()
        linux.setns(home, linux.CLONE_NEWNET)
        if _cookie() != cookie:
            raise Failure(
                "the policy does not hold in this container's cgroup",
                hint="see graftd's log; without --direct it needs no cgroup of its own",
                code="EPERM",
            )
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        _hide_cgroups()
        _protect_sysctls()
        _hide_rdma()
        _mount_link(procfs)
    except OSError as error:
        raise from_oserror("live in the host's network namespace", error, hint="omit --direct") from None
    os.close(home)
    os.close(netns)


def _cookie() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, linux.SO_NETNS_COOKIE, 8), "little")


def _hide_cgroups() -> None:
    """Put this process's cgroup over each mount of cgroup2, and make it the root of a cgroup namespace."""
    own = os.open(directory_of(cgroup_of(os.getpid())), os.O_PATH | os.O_CLOEXEC)
    for path in _mounts("cgroup2"):
        linux.mount(f"/proc/self/fd/{own}", path, None, linux.MS_BIND)
    os.close(own)
    linux.unshare(linux.CLONE_NEWCGROUP)


def _mounts(kind: str) -> list[str]:
    """Where file systems of this kind are mounted, and not covered by others."""
    paths = dict.fromkeys(mount.place for mount in mounts_of("self") if mount.kind == kind)
    return [path for path in paths if os.path.ismount(path)]


def _protect_sysctls() -> None:
    """Make the sysctls of the network read-only, in each procfs: they are those of whoever looks, the host's."""
    for path in _mounts("proc"):
        sysctls = os.path.join(path, "sys/net")
        if os.path.isdir(sysctls):
            linux.mount(sysctls, sysctls, None, linux.MS_BIND)
            linux.mount(sysctls, sysctls, None, linux.MS_BIND | linux.MS_REMOUNT | linux.MS_RDONLY)


def _hide_rdma() -> None:
    """Put an empty directory over the devices of RDMA: connections are made in the netns of whoever opens one."""
    if os.path.isdir(RDMA):
        linux.mount("none", RDMA, "tmpfs", linux.MS_RDONLY)


def _mount_link(procfs: str) -> None:
    """Put the symbolic link @procfs over /proc/net, which is one as well: mount(2) would follow either."""
    at_cwd = ctypes.c_int(-100)
    flags = OPEN_TREE_CLONE | AT_SYMLINK_NOFOLLOW | os.O_CLOEXEC
    tree = linux.libc.syscall(linux.NR_OPEN_TREE, at_cwd, os.fsencode(procfs), ctypes.c_uint(flags))
    if tree < 0:
        raise linux.oserror("open_tree", procfs)
    there = os.open("/proc/net", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if linux.libc.syscall(linux.NR_MOVE_MOUNT, tree, b"", there, b"", ctypes.c_uint(MOVE_MOUNT_EMPTY_PATHS)) < 0:
            raise linux.oserror("move_mount", "/proc/net")
    finally:
        os.close(there)
        os.close(tree)
