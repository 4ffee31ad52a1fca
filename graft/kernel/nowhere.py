"""A device that leads nowhere, and addresses, in a container's own netns.

Goal: programs that look for the machine's addresses and devices find the container's, and what is sent into the
device is refused at once. Grafted sockets are the host's and never use it.

Facts: getaddrinfo(3) with AI_ADDRCONFIG counts addresses other than 127.0.0.1 and ::1, on any device. Programs that
serve each interface pass over devices with IFF_LOOPBACK. No kernel has a device of another kind for certain: dummy is
a module, veth another one. A tun without a program at it has no carrier, so it is not IFF_RUNNING.

Solution: a dummy where its module is loaded, because to load it would give the host a dummy0; else a pair of veth in
the same netns; else a dummy after all. Medians on Linux 6.18, which has no dummy here: veth 0.6 ms, tun 0.35 ms; to
set it up 0.15 ms, addresses 0.1 ms, rules and routes 0.1 ms. To remove a device takes 26 ms, because the kernel waits
until no processor uses it: so it stays as long as its container.

A default route leads into it, for those who read the routes to find the device. Nothing takes it: a rule before the
main table passes over routes of the device's group, and the next one says `unreachable`. So ping(8) fails with
ENETUNREACH at once. A packet socket, or one that is bound to the device, needs no route: there a queue of no length
drops what is sent (ENOBUFS). Routes of other devices, which somebody may add later, are not touched.

The device is known again by its name, group and kind, its addresses by their metric. So what a graftd that was killed
has left half done is met again, and all is removed that is there. The netns may be a hostile root's, who changes it
meanwhile: each step fails by itself, and the device's number is the kernel's choice, never reckoned.

What still fails: PACKET_QDISC_BYPASS (packet(7)) passes over the queue. What is sent so is dropped by a dummy, and
comes back into the container's own netns by the pair.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from graft.kernel import linux
from graft.kernel import rtnetlink as rt
from graft.kernel.netns import netns_alive
from graft.rules.address import Address

GROUP = 26470  # of the device; also the preference of the first rule, and the metric of addresses and routes
LO, PEER = "lo", "graft-peer"  # PEER: the other end of a pair
DUMMY, VETH = "dummy", "veth"
LINKS_ENOUGH = 64  # more than lo, those of FALLBACK and graft's own: among so many is one of somebody else's
# Of tunnels: the kernel makes them in each netns, where such a module is loaded
FALLBACK = frozenset(("tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "sit0", "ip6tnl0", "ip6gre0", "ip6_vti0"))
GATEWAY4 = socket.inet_aton("169.254.1.1")  # on no link: readers of routes expect a default route to have a gateway
GATEWAY6 = socket.inet_pton(socket.AF_INET6, "fe80::1")
LACKING = (errno.EOPNOTSUPP, errno.EAFNOSUPPORT)  # what the kernel was built without
PASSING = (errno.ENOMEM, errno.ENOBUFS, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE)
WITHOUT_IPV6 = (*LACKING, errno.EACCES)  # also where disable_ipv6 is set

IFF_MULTICAST, IFF_NOARP = 0x1000, 0x80
IFLA_INFO_DATA, VETH_INFO_PEER = 2, 1
IFLA_AF_SPEC, IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE = 26, 8, b"\1"
TCA_KIND, TCA_OPTIONS, TC_H_ROOT = 1, 2, 0xFFFFFFFF
RT_TABLE_MAIN, RTPROT_BOOT, RTNH_F_ONLINK = 254, 3, 4
RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 4, 5, 6
FRA_PRIORITY, FRA_SUPPRESS_IFGROUP, FR_ACT_TO_TBL, FR_ACT_UNREACHABLE = 6, 13, 1, 7

_lacking: set[str] = set()  # kinds that this kernel does not have: to ask for one has modprobe(8) run, 5 ms


class Order(NamedTuple):
    """What a netns is to have.

    @wanted: addresses, each with its device, which is `lo` or @device. @old: what was there by all that is known.
    @device: graft's, "" if none is there, or is to be. @ipv6: switch IPv6 on for the device, where an engine has
    switched it off for new ones.
    """

    wanted: dict[Address, str]
    old: dict[Address, str]
    device: str
    ipv6: bool = False


class Outcome(NamedTuple):
    """What put() has come to.

    @shown: the addresses that are there, with the device of each. @device: graft's, "" if none is there. @foreign: a
    device of somebody else's, because of which nothing was added. @deviceless: why none could be made, so that the
    addresses are on `lo`. @failed: what has to be tried again.
    """

    shown: dict[Address, str]
    device: str = ""
    foreign: str = ""
    deviceless: str = ""
    failed: tuple[str, ...] = ()


def is_own(link: rt.Link, device: str) -> bool:
    """Is @link the device that graft has made under the name @device, or its peer? The netns's root may lie."""
    kinds = (VETH,) if link.name == PEER else (DUMMY, VETH)
    return bool(device) and link.name in (device, PEER) and link.group == GROUP and link.kind in kinds


def put(netns_fd: int, order: Order) -> Outcome:
    """Have the addresses of @order in a netns, make their device, and remove others that graft has put there.

    Raises OSError if the netns cannot be entered, or if there is no memory for the device, which passes. What else
    fails is in the Outcome, and the rest is done.
    """
    with _Interface(netns_fd, order.device) as interface:
        failed: list[str] = []
        wanted, deviceless = order.wanted, ""
        foreign, there = interface.look(order.old)
        if foreign:
            wanted = {address: name for address, name in wanted.items() if (address, name) in there}
        elif order.device and not interface.index(order.device):
            try:
                interface.make(ipv6=order.ipv6)
            except OSError as error:
                if error.errno in PASSING:
                    raise
                deviceless, wanted = rt.reason(error), dict.fromkeys(wanted, LO)
        for address, name in sorted(there - set(wanted.items())):
            if _succeeds(failed, partial(interface.take, address, name)):
                there.discard((address, name))
        for address, name in wanted.items():
            if (address, name) not in there and _succeeds(failed, partial(interface.add, address, name), address):
                there.add((address, name))
        shown = {address: name for address, name in wanted.items() if (address, name) in there}
        for v4 in {address.v4 for address, name in shown.items() if name != LO} if not foreign else ():
            _succeeds(failed, partial(interface.lead, v4=v4))
        return Outcome(shown, interface.made, foreign, deviceless, tuple(failed))


def clear(netns_fd: int, order: Order) -> tuple[str, ...]:
    """Remove from a netns what put() has made there: addresses, rules, the device. Returns what failed.

    A device in a netns that nobody has any more is left to end with it: to look is dearer than to remove addresses,
    and cheaper than to remove a device. Raises OSError if the netns cannot be entered.
    """
    if order.device and not netns_alive(os.fstat(netns_fd).st_ino, ""):
        return ()
    failed: list[str] = []
    with _Interface(netns_fd, order.device) as interface:
        for address, name in sorted(interface.look(order.old)[1]):
            _succeeds(failed, partial(interface.take, address, name))
        for v4 in (True, False) if order.device else ():
            _succeeds(failed, partial(interface.unrule, v4=v4))
        if interface.made:
            _succeeds(failed, interface.remove)
    return tuple(failed)


def _succeeds(failed: list[str], step: Callable[[], None], address: Address | None = None) -> bool:
    """Take a step; an OSError of it goes to @failed, unless the netns has no IPv6 for @address. Did it work?"""
    try:
        step()
    except OSError as error:
        if address is None or address.v4 or error.errno not in WITHOUT_IPV6:
            failed.append(rt.reason(error))
        return False
    return True


class _Interface:
    """The devices and addresses of one netns, over one channel. A context manager. Each method raises OSError."""

    def __init__(self, netns_fd: int, device: str) -> None:
        self._netns_fd = netns_fd
        self._device = device
        self._channel = rt.channel_in(netns_fd)
        self._index = 0
        with contextlib.ExitStack() as stack:
            stack.push(self._channel)
            self._find()
            stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._channel.close()

    def _find(self) -> None:
        link = self._channel.link(self._device) if self._device else None
        self._index = link.ifindex if link and is_own(link, self._device) else 0

    def index(self, name: str) -> int:
        """The index of `lo`, or of graft's device; 0 if there is none of this name."""
        return rt.LO_INDEX if name == LO else self._index if name == self._device else 0

    @property
    def made(self) -> str:
        """The name of graft's device; "" if there is none."""
        return self._device if self._index else ""

    def look(self, old: Mapping[Address, str]) -> tuple[str, set[tuple[Address, str]]]:
        """The name of a device of somebody else's, "" if there is none; graft's addresses with their devices.

        Graft's are known by their metric. But a netns with such a device may be another graftd's host, whose `lo` has
        addresses of that metric. There only those of @old count.
        """
        names = {rt.LO_INDEX: LO, self._index: self._device}
        there = {
            (held.address, names[held.ifindex])
            for held in self._channel.addresses()
            if held.metric == GROUP and held.ifindex in names
        }
        for link in self._channel.links(LINKS_ENOUGH):
            idle = link.name in FALLBACK and not link.flags & linux.IFF_UP
            if not (link.name == LO or idle or is_own(link, self._device)):
                return link.name, there & set(old.items())
        return "", there

    def make(self, *, ipv6: bool) -> None:
        """Make the device, of the first kind that the kernel has. If that fails, nothing is left."""
        error: OSError | None = None
        for kind in _kinds():
            try:
                self._channel.carry_out(_new(kind, self._device))
                break
            except OSError as failed:
                error = failed
                if failed.errno != errno.EOPNOTSUPP:
                    raise
                _lacking.add(kind)
        else:
            raise error or OSError(errno.EOPNOTSUPP, "the kernel has neither dummy nor veth")
        try:
            for name in (self._device, PEER) if kind == VETH else (self._device,):
                link = self._channel.link(name)
                if link is None:
                    raise OSError(errno.ENODEV, f"{name}: {os.strerror(errno.ENODEV)}")
                self._index = self._index or link.ifindex
                self._channel.carry_out(*_settle(link.ifindex, name))
        except BaseException:
            if self._index:
                self._channel.carry_out(_gone(self._index, self._device))
                self._index = 0
            raise
        self._write_ipv6(on=ipv6)

    def add(self, address: Address, name: str) -> None:
        """Put an address on the device @name."""
        flags = 0 if address.v4 else rt.IFA_F_NODAD | rt.IFA_F_NOPREFIXROUTE
        given = {"how": rt.NLM_F_REPLACE, "scope": _scope(address), "flags": flags}
        self._channel.carry_out(rt.new_address(address, self.index(name), GROUP, **given))

    def take(self, address: Address, name: str) -> None:
        """Remove an address from the device @name."""
        self._channel.carry_out(rt.no_address(address, self.index(name), scope=_scope(address)))

    def lead(self, *, v4: bool) -> None:
        """The rules and the default route of a family. A kernel that has no rules gets no route either."""
        try:
            self._channel.carry_out(*_rules(rt.RTM_NEWRULE, v4=v4))
        except OSError as error:
            if error.errno in LACKING:
                return
            raise
        self._channel.carry_out(_default_route(self._index, v4=v4))

    def unrule(self, *, v4: bool) -> None:
        """Remove the rules of a family, those that are there."""
        self._channel.carry_out(*_rules(rt.RTM_DELRULE, v4=v4))

    def remove(self) -> None:
        """Remove the device, with its routes. It takes 26 ms."""
        self._channel.carry_out(_gone(self._index, self._device))

    def _write_ipv6(self, *, on: bool) -> None:
        """No router's word on the device; @on: and IPv6, whatever the netns has for new devices."""
        with linux.inside_netns(self._netns_fd):
            for key in ("accept_ra", *(["disable_ipv6"] if on else [])):
                with contextlib.suppress(OSError):  # a kernel without IPv6
                    Path(f"/proc/sys/net/ipv6/conf/{self._device}/{key}").write_text("0")


def _kinds() -> list[str]:
    """The kinds of devices to try, in order."""
    loaded = Path("/sys/module", DUMMY).exists()
    return [kind for kind in ((DUMMY, VETH) if loaded else (VETH, DUMMY)) if kind not in _lacking]


def _gone(index: int, name: str) -> rt.Item:
    """Remove a device; one that is gone is no error."""
    return rt.Item(f"remove {name}", rt.RTM_DELLINK, 0, struct.pack(rt.IFINFOMSG, 0, 0, index, 0, 0), (errno.ENODEV,))


def _new(kind: str, name: str) -> rt.Item:
    """Make a device of this kind; of a pair both ends, the other one called PEER."""
    info = rt.text(rt.IFLA_INFO_KIND, kind)
    any_index = struct.pack(rt.IFINFOMSG, 0, 0, 0, 0, 0)
    if kind == VETH:
        peer = any_index + rt.text(rt.IFLA_IFNAME, PEER)
        info += rt.attribute(IFLA_INFO_DATA, rt.attribute(VETH_INFO_PEER, peer))
    body = any_index + rt.text(rt.IFLA_IFNAME, name)
    body += rt.number(rt.IFLA_GROUP, GROUP) + rt.attribute(rt.IFLA_LINKINFO, info)
    return rt.Item(f"{kind} {name}", rt.RTM_NEWLINK, rt.NLM_F_CREATE | rt.NLM_F_EXCL, body)


def _settle(index: int, name: str) -> list[rt.Item]:
    """Make a device silent and deaf, then set it up: no link-local address, no queue, no ARP, no multicast."""
    mode = rt.attribute(socket.AF_INET6, rt.attribute(IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE))
    still = struct.pack(rt.IFINFOMSG, 0, 0, index, 0, 0)
    queue = struct.pack("=BxxxiIII", 0, index, 0, TC_H_ROOT, 0) + rt.text(TCA_KIND, "pfifo")
    queue += rt.number(TCA_OPTIONS, 0)  # struct tc_fifo_qopt: the limit
    up, changed = linux.IFF_UP | IFF_NOARP, linux.IFF_UP | IFF_NOARP | IFF_MULTICAST
    return [
        rt.Item(f"{name}: group", rt.RTM_SETLINK, 0, still + rt.number(rt.IFLA_GROUP, GROUP)),
        rt.Item(f"{name}: IPv6", rt.RTM_SETLINK, 0, still + rt.attribute(IFLA_AF_SPEC, mode), (errno.EAFNOSUPPORT,)),
        rt.Item(f"{name}: queue", rt.RTM_NEWQDISC, rt.NLM_F_CREATE | rt.NLM_F_REPLACE, queue),
        rt.Item(f"{name}: up", rt.RTM_SETLINK, 0, struct.pack(rt.IFINFOMSG, 0, 0, index, up, changed)),
    ]


def _scope(address: Address) -> int:
    return rt.RT_SCOPE_HOST if address.loopback else 0


def _rules(kind: int, *, v4: bool) -> list[rt.Item]:
    """Add (RTM_NEWRULE) or remove (RTM_DELRULE) the two rules of a family."""
    made: list[rt.Item] = []
    suppress = rt.number(FRA_SUPPRESS_IFGROUP, GROUP)
    for preference, action, table, more in (
        (GROUP, FR_ACT_TO_TBL, RT_TABLE_MAIN, suppress),
        (GROUP + 1, FR_ACT_UNREACHABLE, 0, b""),
    ):
        body = struct.pack(rt.RTMSG, rt.family(v4=v4), 0, 0, 0, table, 0, 0, action, 0)
        body += rt.number(FRA_PRIORITY, preference) + more
        if kind == rt.RTM_NEWRULE:
            made.append(rt.Item("add a rule", kind, rt.NLM_F_CREATE | rt.NLM_F_EXCL, body, (errno.EEXIST,)))
        else:
            made.append(rt.Item("remove a rule", kind, 0, body, (errno.ENOENT, *LACKING)))
    return made


def _default_route(index: int, *, v4: bool) -> rt.Item:
    """The default route by the device."""
    head = struct.pack(
        rt.RTMSG, rt.family(v4=v4), 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, rt.RTN_UNICAST, RTNH_F_ONLINK
    )
    body = head + rt.number(RTA_OIF, index) + rt.attribute(RTA_GATEWAY, GATEWAY4 if v4 else GATEWAY6)
    flags = rt.NLM_F_CREATE | rt.NLM_F_REPLACE
    return rt.Item("add the default route", rt.RTM_NEWROUTE, flags, body + rt.number(RTA_PRIORITY, GROUP))
