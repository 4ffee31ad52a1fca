"""Who a peer is, and what it may ask for."""

import os

from graft.daemon.tenancy import Tenancy
from graft.errors import Refused, UsageError
from graft.kernel import linux
from graft.process.closing import is_listener
from graft.tenants.tenant import CONTAINER

CAP_SYS_ADMIN = 21


def refuse_targets(tenancy: Tenancy, pid: int) -> None:
    """Raise Refused if the peer @pid is a process of a container, whatever its uid: those may not give orders.

    They are known by graft's seccomp filter and a tenant's netns. With a user namespace of its own a process could
    leave that netns, so peers in another user namespace than graftd's are refused as well.
    """
    if not same_user_namespace(pid):
        raise Refused("processes in another user namespace may not use the admin socket", code="EPERM")
    netns = peer_netns(pid)
    at_home = netns == tenancy.registry.home  # programs of wrappers there are the host's own
    inside = any(t.listeners and (t.kind == CONTAINER or not at_home) for t in tenancy.registry.of_netns(netns))
    if inside and _filtered(pid):
        raise Refused("processes inside a graft container may not use the admin socket", code="EPERM")


def same_user_namespace(pid: int) -> bool:
    """Is this process in graftd's user namespace? False if it has ended."""
    try:
        return os.stat(f"/proc/{pid}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
    except OSError:
        return False


def administrates(pid: int) -> bool:
    """Does this process have CAP_SYS_ADMIN in graftd's user namespace, as root has outside of containers?

    Its netns does not matter. False if it has ended.
    """
    try:
        with open(f"/proc/{pid}/status") as status:
            effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration):
        return False
    return bool(effective >> CAP_SYS_ADMIN & 1) and same_user_namespace(pid)


def _filtered(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status") as status:
            return any(line.split() == ["Seccomp:", "2"] for line in status)
    except OSError:
        return True


def peer_netns(pid: int) -> int:
    """The inode of a peer's netns. Raises Refused (ESRCH) if the peer has ended."""
    try:
        return linux.netns_inode(pid)
    except OSError:
        raise Refused("the peer has ended", code="ESRCH") from None


def check_listener(fd: int) -> None:
    """Raise UsageError unless @fd is a seccomp listener (seccomp_unotify(2))."""
    if not is_listener(fd):
        raise UsageError("the descriptor is not a seccomp listener")
