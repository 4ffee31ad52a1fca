"""Who is at a door of graftd's, and may it give orders there? Every door asks here.

Theory of operation

Goal: orders come from the host, never from inside a container, whoever runs there and whatever files it shares.

Facts: a unix socket tells the PID and the user of whoever connected (SO_PEERCRED), and since Linux 6.5 gives a pidfd
of it (SO_PEERPIDFD). None of that changes when the connection is handed to another process: it stays that of the
process which connected. A process may enter another netns or user namespace, but it cannot leave its seccomp filter,
nor get a capability that its bounding set lacks. One of a direct container lives in graftd's netns; it is known by
its cgroup, which it cannot leave (docs/security.md).

Solution: graftd reads what /proc/PID tells of the peer's namespaces, filter and capabilities, and then asks the pidfd
whether the peer still lives. If it does, the PID was the peer's all the time, and what was read is true.

What still fails: before Linux 6.5 the pidfd is of whoever has the PID when graftd accepts the connection.
"""

import os
import socket

from graft.errors import Refused
from graft.kernel import linux
from graft.tenants.registry import Registry
from graft.tenants.tenant import API, CONTAINER

CAP_SYS_ADMIN = 21


class Peer:
    """The process that connected to a unix socket; `uid` and `gid` are those that it had then."""

    def __init__(self, sock: socket.socket) -> None:
        self.pid, self.uid, self.gid = linux.credentials(sock)
        self.pidfd = linux.peer_pidfd(sock, self.pid)

    def lives(self) -> bool:
        """Is it still there? As long as it is, no other process has its PID."""
        return linux.alive(self.pidfd)

    def check(self) -> None:
        """Raise Refused (ESRCH) if it has ended: another process may have its PID, and /proc/PID be of that."""
        if not self.lives():
            raise Refused("the peer has ended", code="ESRCH")

    def netns(self, registry: Registry) -> int:
        """The inode of its netns, or of its direct container's. Raises Refused (ESRCH) if it has ended."""
        try:
            return registry.netns_of(self.pid)
        except OSError:
            raise Refused("the peer has ended", code="ESRCH") from None

    def administrates(self) -> bool:
        """Does it have CAP_SYS_ADMIN in graftd's user namespace, as root has outside of containers?

        Its netns does not matter. False if it has ended.
        """
        effective = int(_status(self.pid, "CapEff:", "0"), 16)
        return bool(effective >> CAP_SYS_ADMIN & 1) and self.in_our_user_namespace()

    def in_our_user_namespace(self) -> bool:
        """Is it in graftd's user namespace? False if it has ended."""
        try:
            return os.stat(f"/proc/{self.pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
        except OSError:
            return False

    def is_filtered(self) -> bool:
        """Is it under a seccomp filter (proc(5), Seccomp)? True if it has ended."""
        return is_filtered(self.pid)

    def close(self) -> None:
        """Close the pidfd. May be called twice."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
        self.pidfd = -1


def is_filtered(pid: int) -> bool:
    """Is the process @pid under a seccomp filter (proc(5), Seccomp)? True if it has ended."""
    return _status(pid, "Seccomp:", "2") == "2"


def _status(pid: int, field: str, otherwise: str) -> str:
    try:
        with open(f"/proc/{pid}/status") as status:
            return next(line.split()[1] for line in status if line.startswith(field))
    except (OSError, StopIteration):
        return otherwise


def refuse_contained(registry: Registry, peer: Peer, door: str) -> None:
    """Raise Refused if @peer is inside a container, whatever its uid: those give no orders. @door: as errors name it.

    Refused (ESRCH) if the peer has ended: an OCI runtime does so as soon as it has sent its message, and what is read
    of a process that ends meanwhile looks like a container's.
    """
    who = _contained(registry, peer)
    peer.check()
    if who:
        raise Refused(f"{who} may not use {door}", code="EPERM")


def refuse_contained_user(registry: Registry, peer: Peer) -> None:
    """Raise Refused if @peer, of any user, is inside a container, or may have been: orders come from outside alone.

    Who is in graftd's own netns is in no container, whatever its user namespace and filter are: nobody gets there
    without a right that a container lacks. In another netns, whoever is under a filter may have made that netns to
    leave a container's. Raises Refused (ESRCH) if the peer has ended.
    """
    netns = peer.netns(registry)
    inside = any(tenant.kind != API for tenant in registry.of_netns(netns)) and netns != registry.home
    suspect = netns != registry.home and peer.is_filtered()
    peer.check()
    if inside or suspect:
        raise Refused("processes inside a container may not use the user socket", code="EPERM")


def _contained(registry: Registry, peer: Peer) -> str:
    """What makes @peer a process of a container; "" if nothing does. Raises Refused (ESRCH).

    Its processes are known by graft's filter and a tenant's netns, also while nobody supervises them. With a user
    namespace of its own a process could leave that netns, so peers in another one than graftd's are refused as well.
    In graftd's, root under a filter needs it: a process of a direct container may have been moved out of its cgroup.
    In another netns than graftd's, root and whoever is filtered need CAP_SYS_ADMIN: root of a container lacks it,
    `ip netns exec` has it.
    """
    home = registry.home
    if not peer.in_our_user_namespace():
        return "processes in another user namespace"
    netns = peer.netns(registry)
    if netns == home:  # programs of wrappers in graftd's own netns are the host's own
        suspect = peer.uid == 0 and peer.is_filtered() and not peer.administrates()
        return "root under a filter and without CAP_SYS_ADMIN" if suspect else ""
    tenants = [t.kind for t in registry.of_netns(netns) if t.kind != API]
    filtered = peer.is_filtered()
    contained = bool(tenants) and filtered
    suspect = filtered or peer.uid == 0 or CONTAINER in tenants
    return "processes inside a graft container" if contained or (suspect and not peer.administrates()) else ""
