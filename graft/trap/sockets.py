"""Grafted sockets: made in the host's netns, stamped, vouched for, and put in another's place.

What makes them, the supervisor and the family AF_GRAFT alike, needs to know little of a tenant: TenantView says what.
"""

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Protocol

from graft.kernel import linux
from graft.kernel.stamps import STAMP_LATE, Stamp
from graft.rules.endpoint import EgressRule, Endpoint, IngressRule
from graft.rules.sysctl import IP_LOCAL_PORT_RANGE, kind_of, socket_options, tcp_most, udp_most
from graft.trap import epoll, target
from graft.trap.actions import Action, Answer, Proceed, Replace
from graft.trap.listener import Notification

IP_BIND_ADDRESS_NO_PORT = 24
SO_TIMESTAMPING, OPT_TSONLY = 37, 0x800  # linux/net_tstamp.h


class TenantView(Protocol):
    """What the supervisor needs to know of a tenant (graft/tenants/registry.py).

    The loop's thread changes these attributes while worker threads read them. So a worker reads each once, holds on
    to what it got, and calls the methods below, which change only sets of the tenant's own.
    """

    id: int
    netns: int
    netns_fd: int
    device: str  # that graft has made in its netns; "" if there is none
    place: int  # the number of the netns in which its sockets are made; 0 is graftd's own
    cgroup: str  # of a direct container, whose programs live in graftd's netns and make their sockets; "" of others
    ingress: list[IngressRule]
    egress: list[EgressRule]
    egress_host: bool  # what no egress rule matches leaves as the host's own connections do

    @property
    def parent(self) -> "TenantView | None":
        """The container of a wrapper."""

    @property
    def sysctls(self) -> tuple[str, ...]:
        """What its sockets follow of the sysctls of its netns, as Request.sysctl."""

    @property
    def endpoints(self) -> Mapping[str, Endpoint]:
        """Its endpoint table, by name."""

    @property
    def owner(self) -> int:
        """The uid that owns its sockets."""

    @property
    def maker(self) -> tuple[int, int]:
        """The uid and gid as which a firewall sees who makes them; 0: nothing is said of that."""

    def bound_path(self, path: str, found: os.stat_result) -> None:
        """Remember a unix socket that it has bound at @path, to remove the file at its end. @found: of the file."""

    def binds_file(self, found: os.stat_result) -> bool:
        """Has it bound a unix socket to this file?"""

    def probe(self, family: int) -> socket.socket:
        """A datagram socket in the tenant's own netns, to ask about its devices. Raises OSError."""


class Stamps(Protocol):
    """The socket storage of the kernel, as kernel.stamps.Stamper gives access to it. All methods raise OSError."""

    def stamp(self, fd: int, tenant: int, flags: int, place: int = 0) -> None:
        """Stamp a new socket with its tenant, flags and place."""

    def vouch(self, sock: socket.socket, tenant: int) -> None:
        """Check that the policy runs for a stamped socket, and count it."""

    def get(self, fd: int) -> Stamp | None:
        """The stamp of a socket, None if it is not grafted."""

    def begin(self, sock: socket.socket) -> Stamp | None:
        """The stamp of a socket of a direct container, which may have none yet; None if a program did not make it."""

    def put(self, fd: int, stamp: Stamp) -> None:
        """Write the whole stamp of a socket."""

    def settle(self, fd: int, *, now: bool) -> None:
        """Say whether graftd binds a socket @now, which may have waited for it."""

    def begin_to_prepare(self, fd: int, owner: int) -> bool:
        """This process is about to set the options of its maker on a socket; False: it has them."""

    def end_preparing(self, fd: int, *, prepared: bool) -> None:
        """After begin_to_prepare(): the socket has them, or it has not."""

    def tenant_of(self, fd: int) -> int | None:
        """The tenant of a socket, None if it is not grafted."""


class Sockets:
    """Makes grafted sockets, for whatever thread asks, in graftd's netns or in that of an endpoint.

    @places gives the descriptor of a place's netns, by its number. @ephemeral: the first and the last port that the
    kernel chooses in graftd's.
    """

    def __init__(self, stamps: Stamps, places: Callable[[int], int], ephemeral: tuple[int, int]) -> None:
        self.stamps = stamps
        self.places = places
        self.ephemeral = ephemeral

    def make(
        self, tenant: TenantView, family: int, kind: int, *, place: int, flags: int = 0, stamp_flags: int = 0
    ) -> socket.socket:
        """Make a grafted socket of a tenant, owned by its uid. Raises OSError: ENFILE beyond its limit, EIO.

        A unix socket is made in the tenant's own netns, because abstract names belong to a netns. @flags are those of
        socket(2), @stamp_flags are STAMP_*.
        """
        if family == socket.AF_UNIX:
            with linux.inside_netns(tenant.netns_fd):
                made = socket.socket(family, kind | flags)
        elif place:
            with linux.inside_netns(self.places(place)):
                made = socket.socket(family, kind | flags)
        elif tenant.maker[0]:
            with linux.with_file_ids(*tenant.maker):
                made = socket.socket(family, kind | flags)
        else:
            made = socket.socket(family, kind | flags)
        try:
            late = family != socket.AF_UNIX and kind == socket.SOCK_STREAM and not place and not stamp_flags
            self.stamps.stamp(made.fileno(), tenant.id, stamp_flags | (STAMP_LATE if late else 0), place)
            # the option hook refuses these, or keeps them for the program, once the socket is vouched for
            if late:
                made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)  # csrc/late.bpf.h
            if family != socket.AF_UNIX and not place:
                self._limit_ports(made, udp=kind == socket.SOCK_DGRAM)
            if family != socket.AF_UNIX and tenant.sysctls:
                self._follow(made, tenant.sysctls)
            if family != socket.AF_UNIX:
                made.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPING, OPT_TSONLY)  # csrc/options.bpf.h
            if family == socket.AF_INET6:
                # the slices are an AnyIP route, so no device has their addresses; the bind hook decides
                made.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_FREEBIND, 1)
            # SO_REUSEPORT works among sockets of one uid: no tenant may join a listener of the host or of another
            os.fchown(made.fileno(), tenant.owner, -1)
            if family != socket.AF_UNIX:
                self.stamps.vouch(made, tenant.id)
        except BaseException:
            made.close()
            raise
        return made

    def stamp(self, sock: socket.socket, tenant: TenantView) -> Stamp | None:
        """The stamp of a socket; None if it has none. What a direct container's program has made gets it now."""
        stamp = self.stamps.get(sock.fileno())
        if stamp is None and tenant.cgroup and sock.family in (socket.AF_INET, socket.AF_INET6):
            stamp = self.stamps.begin(sock)
        return stamp

    def prepare(self, sock: socket.socket, tenant: TenantView) -> None:
        """Set what make() sets on a socket that a program of a direct container has made, and is about to bind.

        csrc/bind.bpf.h refuses a bind without it. csrc/sup_bind.c may do the same meanwhile for another call. Raises
        OSError.
        """
        number = sock.fileno()
        if not self.stamps.begin_to_prepare(number, tenant.owner):
            return
        udp = sock.type == socket.SOCK_DGRAM
        try:
            if not udp:
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            self._limit_ports(sock, udp=udp)
            if sock.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, linux.IPV6_FREEBIND, 1)
            os.fchown(number, tenant.owner, -1)
        except OSError:
            if self.stamps.begin_to_prepare(number, tenant.owner):  # or graft-sup has, in between
                self.stamps.end_preparing(number, prepared=False)
                raise
        else:
            self.stamps.end_preparing(number, prepared=True)

    def _limit_ports(self, made: socket.socket, *, udp: bool) -> None:
        """Leave the host's programs some of the ephemeral ports: half of UDP's, a sixteenth of TCP's.

        UDP is bound to one before any hook runs, and connections to one destination take a TCP port each. Linux
        before 6.3 has no such option.
        """
        most = udp_most(self.ephemeral) if udp else tcp_most(self.ephemeral)
        with contextlib.suppress(OSError):
            made.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", self.ephemeral[0], most))

    def _follow(self, made: socket.socket, texts: tuple[str, ...]) -> None:
        """Set the options that stand for sysctls (graft/rules/sysctl.py). What fails was accepted at create."""
        kind = kind_of(made.family, made.type)
        for option in socket_options(texts, self.ephemeral):
            if option.kinds & kind:
                with contextlib.suppress(OSError):
                    made.setsockopt(option.level, option.name, option.raw)

    def replace(self, call: Notification, old: socket.socket, new: socket.socket, then: Action) -> Replace:
        """The action that puts @new in the place of @old in the target, then ends the call with @then.

        Takes over @new; the caller still closes @old. Raises OSError.
        """
        inode = os.fstat(old.fileno()).st_ino
        numbers = target.descriptors(call.pid, inode)
        watched = epoll.watches(call.pid, inode)
        assert isinstance(then, Proceed | Answer)
        return Replace(new.detach(), inode, numbers, watched, then)
