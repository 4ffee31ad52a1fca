"""Sockets of a direct container that are not TCP or UDP: made in its own netns, while its programs are in the host's.

Theory of operation

Goal: a program of a direct container has of a netns what it has in any other container. It lives in the host's netns
and makes its TCP and UDP sockets there; a netlink, packet, raw or unix socket made there would be the host's.

Facts: socket(2) and socketpair(2) have register arguments. A socket stays in its netns for life. Who makes it needs
the rights that the kernel asks for there and then (CAP_NET_RAW for raw and packet sockets, a group for ping's); what
is asked later looks at the caller as well as at the maker (netlink_capable() of net/netlink/af_netlink.c,
sk_ns_capable() of net/core/sock.c). The calling thread waits for the answer, so its credentials do not change.

Solution: a unix socket needs no right, and is made by graft-sup (csrc/sup_calls.c), which lives in the container's
netns; here where there is none. The others are made here by a thread that enters the container's netns, with the
capabilities that the caller has over that netns, so that the kernel asks its own questions. Each then belongs to the
caller's user.

A pair has the credentials of who makes it (SO_PEERCRED, unix(7)). So the thread then has the tenant's uid, which
nobody has, for its effective one. The PID there is graftd's.

What still fails: a socket's security label (SELinux, AppArmor) is graftd's. A process that is root by being the owner
of the netns's user namespace, and not by a capability of its own, is not known as such.
"""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from graft.kernel import linux
from graft.kernel.stamps import OWN_TENANT
from graft.trap import target
from graft.trap.actions import Action, Answer, Inject, InjectPair
from graft.trap.caller import Caller
from graft.trap.sockets import Stamps, TenantView

TYPE_MASK = 0xF
FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
NS_GET_USERNS = 0xB701  # linux/nsfs.h
INTERNET = (socket.AF_INET, socket.AF_INET6)
PING = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)


def create(caller: Caller, tenant: TenantView, stamps: Stamps) -> Action:
    """socket(2) of a kind that the program may not make itself. Raises OSError as the kernel would.

    One of the internet families is made in graftd's cgroup, whose policy is not for it: it is in the container's
    netns, which leads nowhere. @stamps says so.
    """
    family, flags, protocol = (argument & 0xFFFFFFFF for argument in caller.args[:3])
    kind = flags & TYPE_MASK
    if flags & ~(TYPE_MASK | FLAGS):
        return Answer(error=errno.EINVAL)
    group = -1
    if family in INTERNET and kind == socket.SOCK_DGRAM and protocol in PING:
        group = _pings(caller, tenant)
    with _as_caller(caller, tenant, gid=group):
        made = linux.make_socket(family, kind | flags & socket.SOCK_NONBLOCK, protocol)
    try:
        if family in INTERNET:
            stamps.stamp(made, OWN_TENANT, 0)
            with socket.socket(fileno=os.dup(made)) as probe:
                if probe.family in INTERNET:  # SOCK_PACKET of AF_INET is of AF_PACKET
                    stamps.vouch(probe, OWN_TENANT)  # which is answered once, and not to the program
        _give_away(caller, made)
    except BaseException:
        os.close(made)
        raise
    return Inject(made, bool(flags & socket.SOCK_CLOEXEC))


def create_pair(caller: Caller, tenant: TenantView) -> Action:
    """socketpair(2), of every family. Raises OSError as the kernel would."""
    family, flags, protocol = (argument & 0xFFFFFFFF for argument in caller.args[:3])
    if flags & ~(TYPE_MASK | FLAGS):
        return Answer(error=errno.EINVAL)
    if family in INTERNET:
        return Answer(error=errno.EOPNOTSUPP)
    address = caller.args[3]
    caller.write((address, caller.read(address, 8)))  # EFAULT before anything is made, as by the kernel
    with _as_caller(caller, tenant, uid=tenant.owner, gid=tenant.owner):
        pair = linux.make_socketpair(family, flags & (TYPE_MASK | socket.SOCK_NONBLOCK), protocol)
    try:
        for made in pair:
            _give_away(caller, made)
    except BaseException:
        for made in pair:
            os.close(made)
        raise
    return InjectPair(pair, bool(flags & socket.SOCK_CLOEXEC), caller, address)


def _give_away(caller: Caller, made: int) -> None:
    """Let the socket belong to the caller's user, as sock_alloc() has it (net/socket.c)."""
    uid, gid = target.file_owner(caller.pid)
    caller.check()
    os.fchown(made, uid, gid)


@contextlib.contextmanager
def _as_caller(caller: Caller, tenant: TenantView, *, uid: int = -1, gid: int = -1) -> Iterator[None]:
    """Run the body in the container's netns, with those of the caller's capabilities that it has over that netns.

    @uid, @gid: as linux.with_effective_ids() has them.
    """
    owner = fcntl.ioctl(tenant.netns_fd, NS_GET_USERNS)
    try:
        held = target.capabilities_over(caller.pid, owner)
    finally:
        os.close(owner)
    caller.check()
    with (
        linux.inside_netns(tenant.netns_fd),
        linux.with_effective_ids(uid, gid),
        linux.with_capabilities(held),
    ):
        yield


def _pings(caller: Caller, tenant: TenantView) -> int:
    """A group of the caller's that may ping (icmp(7), ping_group_range of the netns). Raises PermissionError."""
    with linux.inside_netns(tenant.netns_fd):
        low, high = map(int, Path("/proc/sys/net/ipv4/ping_group_range").read_text().split())
    groups = target.groups(caller.pid)
    caller.check()
    for group in groups:
        if low <= group <= high:
            return group
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
