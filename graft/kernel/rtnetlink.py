"""rtnetlink(7): devices, addresses, routes and rules of one network namespace, without a process or a library.

A container's start pays for what is asked here: `ip` costs 3 ms each time, and a netlink library 150 ms of import.

The kernel carries a request out while send(2) runs, and answers each before send(2) returns. So several go in one
message. All of it takes the kernel's rtnl lock, which is one for the machine, and which any user may hold for long
who has a user namespace: thousands of devices are removed under it at once. So graftd's loop leaves it to threads
(graft/tenants/interfaces.py), but for one look at the devices of what a container is to join. A namespace may be a
hostile root's, who may have made any number of devices and addresses: who lists them says how many are enough.

Numbers are those of linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/fib_rules.h, linux/netlink.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple, Self

from graft.kernel import linux
from graft.rules.address import MAPPED, Address

NETLINK_ROUTE = 0
LO_INDEX = 1  # in every netns
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_ACK_TLVS = 0x200  # of an answer
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLMSGERR_ATTR_MSG = 1
RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
IFLA_LINKINFO, IFLA_INFO_KIND = 18, 1
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE, RTM_NEWRULE, RTM_DELRULE, RTM_NEWQDISC = 24, 25, 26, 32, 33, 36
RTN_UNICAST, RTN_LOCAL = 1, 2
RT_TABLE_LOCAL = 255
RT_SCOPE_HOST, RT_SCOPE_NOWHERE = 254, 255
RTA_DST, RTA_OIF, RTA_PREFSRC = 1, 4, 7
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS, IFA_RT_PRIORITY = 1, 2, 8, 9
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
IFLA_IFNAME, IFLA_GROUP = 3, 27

HEADER = "=IHHII"  # struct nlmsghdr
HEADER_SIZE = 16
IFINFOMSG = "=BxHiII"
IFADDRMSG = "=BBBBI"
RTMSG = "=BBBBBBBBI"
ROOM = 1 << 16
ADDRESSES_MAX = 4096


class Item(NamedTuple):
    """One request: @what it is about, for the error; its RTM_* @kind, NLM_F_* @flags and @body.

    @tolerated: errnos that are no error.
    """

    what: str
    kind: int
    flags: int
    body: bytes
    tolerated: tuple[int, ...] = ()


class Link(NamedTuple):
    """A network device."""

    ifindex: int
    name: str
    flags: int  # IFF_*, netdevice(7)
    group: int
    kind: str  # such as "veth"; "" for a device that no driver of that sort has made


class Held(NamedTuple):
    """An address of a device: the device's index, RT_SCOPE_* (rtnetlink(7)), and the metric of its routes."""

    address: Address
    ifindex: int
    scope: int
    metric: int


def attribute(kind: int, value: bytes) -> bytes:
    """A struct rtattr with its value, padded."""
    return _padded(struct.pack("=HH", 4 + len(value), kind) + value)


def number(kind: int, value: int) -> bytes:
    """An attribute of 32 bits."""
    return attribute(kind, struct.pack("=I", value))


def text(kind: int, value: str) -> bytes:
    """An attribute that is a string."""
    return attribute(kind, value.encode() + b"\0")


def packed(address: Address) -> bytes:
    """The bytes of an address: 4 or 16, by its family."""
    return address.raw[12:] if address.v4 else address.raw


def family(*, v4: bool) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if v4 else socket.AF_INET6


def reason(error: OSError) -> str:
    """What an error says."""
    return error.strerror or str(error)


def new_address(address: Address, index: int, metric: int, *, how: int, scope: int, flags: int) -> Item:
    """Give the device @index an address with its whole prefix. @how: NLM_F_REPLACE or NLM_F_EXCL. @flags: IFA_F_*."""
    body = _address_body(address, index, scope) + number(IFA_FLAGS, flags) + number(IFA_RT_PRIORITY, metric)
    return Item(f"add {address}", RTM_NEWADDR, NLM_F_CREATE | how, body)


def no_address(address: Address, index: int, *, scope: int) -> Item:
    """Take an address from the device @index. One that is gone is no error."""
    body = _address_body(address, index, scope)
    return Item(f"remove {address}", RTM_DELADDR, 0, body, (errno.EADDRNOTAVAIL, errno.ENODEV))


def _address_body(address: Address, index: int, scope: int) -> bytes:
    head = struct.pack(IFADDRMSG, family(v4=address.v4), address.bits, 0, scope, index)
    return head + attribute(IFA_LOCAL, packed(address)) + attribute(IFA_ADDRESS, packed(address))


def no_local_route(address: Address) -> Item:
    """Take the route to an address of `lo` from the local table."""
    inet = family(v4=address.v4)
    body = struct.pack(RTMSG, inet, address.bits, 0, 0, RT_TABLE_LOCAL, 0, RT_SCOPE_NOWHERE, RTN_LOCAL, 0)
    body += attribute(RTA_DST, packed(address)) + number(RTA_OIF, LO_INDEX)
    return Item(f"the local route to {address}", RTM_DELROUTE, 0, body)


class Channel:
    """An rtnetlink socket of the netns that the thread is in when it is made; it stays there. A context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_ROUTE)
        for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
            self._socket.setsockopt(SOL_NETLINK, option, 1)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _value: object, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def carry_out(self, *items: Item) -> None:
        """Send @items, each of which the kernel tries. Raises OSError for the first that failed."""
        first = self._sequence + 1
        message = b"".join(self._message(item.kind, item.flags | NLM_F_ACK, item.body) for item in items)
        self._socket.send(message)
        failed: OSError | None = None
        left = len(items)
        while left:
            for kind, flags, sequence, body in self._receive():
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                left -= 1
                item = items[sequence - first]
                error = -int.from_bytes(body[:4], "little", signed=True)
                if error and error not in item.tolerated and failed is None:
                    failed = OSError(error, f"{item.what}: {_reason(error, flags, body)}")
        if failed:
            raise failed

    def links(self, most: int | None = None) -> list[Link]:
        """The devices, @most at most, or all. None can be listed after a list that ended at @most. Raises OSError."""
        return [_link(body) for body in self._list(RTM_GETLINK, struct.pack(IFINFOMSG, 0, 0, 0, 0, 0), most)]

    def link(self, name: str) -> Link | None:
        """The device of this name, or None. Raises OSError."""
        body = struct.pack(IFINFOMSG, 0, 0, 0, 0, 0) + text(IFLA_IFNAME, name)
        self._socket.send(self._message(RTM_GETLINK, 0, body))
        for kind, _, sequence, answer in self._receive():
            if kind == RTM_NEWLINK and sequence == self._sequence:
                return _link(answer)
        return None

    def addresses(self, most: int | None = ADDRESSES_MAX) -> list[Held]:
        """The addresses. Raises OSError, E2BIG if there are more than @most."""
        found = []
        listed = self._list(RTM_GETADDR, struct.pack(IFADDRMSG, 0, 0, 0, 0, 0), most)
        if most is not None and len(listed) == most:
            raise OSError(errno.E2BIG, f"there are {most} addresses or more")
        for body in listed:
            inet, _, _, scope, index = struct.unpack_from(IFADDRMSG, body)
            values = _attributes(body, struct.calcsize(IFADDRMSG))
            raw = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS, b"")
            if (inet, len(raw)) in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
                metric = int.from_bytes(values.get(IFA_RT_PRIORITY, b""), "little")
                found.append(Held(_address(raw), index, scope, metric))
        return found

    def source(self, destination: Address) -> Address | None:
        """The address from which the kernel would send to @destination; None if it would not. Raises OSError."""
        body = struct.pack(RTMSG, family(v4=destination.v4), destination.bits, 0, 0, 0, 0, 0, 0, 0)
        self._socket.send(self._message(RTM_GETROUTE, 0, body + attribute(RTA_DST, packed(destination))))
        for kind, _, sequence, answer in self._receive():
            if kind == RTM_NEWROUTE and sequence == self._sequence:
                source = _attributes(answer, struct.calcsize(RTMSG)).get(RTA_PREFSRC)
                if struct.unpack_from(RTMSG, answer)[7] == RTN_UNICAST and source:
                    return _address(source)
        return None

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        header = struct.pack(HEADER, HEADER_SIZE + len(body), kind, flags | NLM_F_REQUEST, self._sequence, 0)
        return _padded(header + body)

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What one recv(2) has: type, flags, sequence number and body. Raises OSError, EAGAIN if there is nothing."""
        data = self._socket.recv(ROOM, socket.MSG_DONTWAIT)
        at = 0
        while at + HEADER_SIZE <= len(data):
            size, kind, flags, sequence, _ = struct.unpack_from(HEADER, data, at)
            yield kind, flags, sequence, data[at + HEADER_SIZE : at + size]
            at += max(HEADER_SIZE, size + 3 & ~3)

    def _list(self, kind: int, body: bytes, most: int | None) -> list[bytes]:
        self._socket.send(self._message(kind, NLM_F_DUMP, body))
        found: list[bytes] = []
        while most is None or len(found) < most:
            for answer, _, sequence, content in self._receive():
                if sequence != self._sequence:
                    continue
                if answer in (NLMSG_DONE, NLMSG_ERROR):
                    error = -int.from_bytes(content[:4], "little", signed=True)
                    if error > 0:
                        raise OSError(error, os.strerror(error))
                    return found
                found.append(content)
        return found[:most]


def channel_in(netns_fd: int) -> Channel:
    """A channel to the netns @netns_fd. Only the calling thread goes there, and it returns. Raises OSError."""
    with linux.inside_netns(netns_fd):
        return Channel()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _attributes(data: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, at)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + size]
        at += size + 3 & ~3
    return found


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = struct.unpack_from(IFINFOMSG, body)
    values = _attributes(body, struct.calcsize(IFINFOMSG))
    name, kind = (
        value.rstrip(b"\0").decode(errors="replace")
        for value in (
            values.get(IFLA_IFNAME, b""),
            _attributes(values.get(IFLA_LINKINFO, b""), 0).get(IFLA_INFO_KIND, b""),
        )
    )
    return Link(index, name, flags, int.from_bytes(values.get(IFLA_GROUP, b""), "little"), kind)


def _address(raw: bytes) -> Address:
    return Address(MAPPED + raw if len(raw) == 4 else raw)


def _reason(error: int, flags: int, body: bytes) -> str:
    """What the kernel says about a failed request: its errno's text, and its own words where it has some."""
    words = _attributes(body, 4 + HEADER_SIZE).get(NLMSGERR_ATTR_MSG, b"") if flags & NLM_F_ACK_TLVS else b""
    said = words.rstrip(b"\0").decode(errors="replace")
    return f"{os.strerror(error)} ({said})" if said else os.strerror(error)
