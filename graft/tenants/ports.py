"""Checks of published host ports: whether a port is free, and which process holds it if not.

A publication is checked when it is made, so that the user gets the error, and not the container's bind(2) later.
Nothing is kept bound, so another program may still take the port in between.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterable
from functools import partial

from graft.errors import Refused
from graft.kernel.listening import ports_in_use
from graft.rules.address import PROTOCOL_NAME, Address
from graft.rules.publication import Publication, host_addresses, overlap

MANY = 64  # ports
SOMEBODY = ""  # in place of a name: of whom who asks must not know


def check_publication(
    publication: Publication,
    addresses: list[Address],
    own: Callable[[socket.socket], None],
    viewer: int | None,
    mine: Callable[[int, int], bool],
) -> None:
    """Bind each host port of @publication at each of @addresses, in the current netns, and close it again.

    Of more than MANY ports those alone that some socket has, and the first one: a probe takes 30 us, and graftd's
    loop waits. What is bound and does not listen is not found so.

    @own exempts a socket from the BPF programs of graftd's cgroup. @viewer: the uid of a user without root who asks.
    @mine: does the container itself have this host port, for this port of its own?

    Raises Refused for a port in use, with the name of its holder (EADDRINUSE), and for an address that the host does
    not have (EADDRNOTAVAIL).
    """
    wanted: Iterable[int] = range(publication.host_first, publication.host_first + publication.span)
    if publication.span > MANY:
        wanted = [publication.host_first, *sorted(ports_in_use(publication.protocol).intersection(wanted))]
    for address in addresses:
        for port in wanted:
            inside = publication.first + port - publication.host_first
            _check(publication, address, port, own, viewer, partial(mine, port, inside))


def _check(
    publication: Publication,
    address: Address,
    port: int,
    own: Callable[[socket.socket], None],
    viewer: int | None,
    is_mine: Callable[[], bool],
) -> None:
    family = socket.AF_INET if address.v4 else socket.AF_INET6
    tcp = publication.protocol == socket.IPPROTO_TCP
    with socket.socket(family, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as probe:
        own(probe)
        if tcp:  # a server can bind a port that connections in TIME_WAIT have
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not address.v4:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if (address.v4 and address.raw[12] >= 224) or address.raw[0] == 255:
            raise Refused(f"-p {publication}: {address} is not an address of one host", code="EADDRNOTAVAIL")
        try:
            probe.bind((str(address), port))
            if tcp:
                probe.listen(1)
        except OSError as error:
            where = f"{address.with_port(port)}/{PROTOCOL_NAME[publication.protocol]}"
            if error.errno == errno.EADDRINUSE and is_mine():
                return
            if error.errno == errno.EADDRINUSE:
                held_by = f" by {holder(port, publication.protocol)}" if viewer is None else ""
                raise Refused(
                    f"-p {publication}: host port {where} is in use{held_by}",
                    hint="publish another host port, or stop it",
                    code="EADDRINUSE",
                ) from None
            if error.errno == errno.EADDRNOTAVAIL:
                raise Refused(
                    f"-p {publication}: {address} is not an address of this host",
                    hint="'ip address' lists them",
                    code="EADDRNOTAVAIL",
                ) from None
            reason = os.strerror(error.errno or 0)
            code = errno.errorcode.get(error.errno or 0, "")
            raise Refused(f"-p {publication}: cannot bind {where}: {reason}", code=code) from None


def check_conflicts(
    publication: Publication, addresses: list[Address], others: Iterable[Publication], name: str
) -> None:
    """Raise Refused if one of @others, the publications of container @name, has the same host port and address.

    @name may be SOMEBODY.
    """
    for other in others:
        if (
            other.protocol == publication.protocol
            and overlap(publication.host_first, publication.span, other.host_first, other.span)
            and any(a.v4 == b.v4 and (a == b or a.any or b.any) for a in addresses for b in host_addresses(other))
        ):
            whose = f"published by container '{name}' (-p {other})" if name != SOMEBODY else "in use"
            raise Refused(
                f"-p {publication}: host port is {whose}",
                hint="publish another host port",
                code="EADDRINUSE",
            )


def check_inside(publication: Publication, addresses: list[Address], others: Iterable[Publication]) -> None:
    """Raise Refused if one of @others publishes the same port of the container for the same address family.

    A bound socket has one address, so it cannot be at two host ports.
    """
    for other in others:
        if (
            other.protocol == publication.protocol
            and overlap(publication.first, publication.span, other.first, other.span)
            and any(a.v4 == b.v4 for a in addresses for b in host_addresses(other))
        ):
            raise Refused(
                f"-p {publication}: the container's port is published already (-p {other})",
                hint="a socket has one address; publish it once",
                code="EINVAL",
            )


def holder(port: int, protocol: int) -> str:
    """Who has @port bound, for a message: "NAME (pid N)", or a description if no process is visible.

    @protocol is IPPROTO_TCP or IPPROTO_UDP.
    """
    import psutil

    kind = "tcp" if protocol == socket.IPPROTO_TCP else "udp"
    found = psutil.net_connections(kind)
    for entry in found:
        if entry.laddr and entry.laddr.port == port and entry.status in (psutil.CONN_LISTEN, psutil.CONN_NONE):
            if entry.pid is None:
                break
            try:
                return f"{psutil.Process(entry.pid).name()} (pid {entry.pid})"
            except psutil.Error:
                break
    if any(e.laddr and e.laddr.port == port and e.status == psutil.CONN_TIME_WAIT for e in found):
        return "connections of a server that has ended (TIME_WAIT, up to a minute)"
    return "a socket whose process is not visible"
