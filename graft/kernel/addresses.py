"""What graft needs of the host beside BPF: cgroup2, bpffs, the route of the IPv6 slices, netns, /etc/resolv.conf.

The IPv6 slices are one `local` route (AnyIP) instead of addresses on `lo`, so that nothing has to be added for each
tenant. The route is in a routing table of its own, which a rule makes valid for locally generated traffic only. The
kernel protects 127.0.0.0/8 from packets of other hosts (its martian check), but not a ULA: without the rule, whoever
routes the prefix to this host would get answers.
"""

import contextlib
import errno
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from graft.errors import Failure, UsageError
from graft.kernel import rtnetlink
from graft.rules.address import Address, parse_address
from graft.rules.slices import SLICE6_NETWORK

ROUTE_TABLE = "26470"
RULE_PREFERENCE = "26470"
RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR = 0x10, 0x100  # rtnetlink(7)
RT_SCOPE_UNIVERSE = 0  # linux/rtnetlink.h
# Destinations that only a default route is for, and that are nobody's: the anycast addresses of PCP (RFC 7723)
ANYWHERE = (parse_address("192.0.0.9"), parse_address("2001:1::1"))
ROUTE_SECONDS, ROUTE_PAUSE = 2.0, 0.0002  # for the kernel to add its route to a new address; between two looks
MARK = 26470  # the metric of graft's addresses on `lo` (IFA_RT_PRIORITY, rtnetlink(7)): by it they are known again


def has_ipv6() -> bool:
    """Does `lo` of this netns have ::1? A bind() would not tell: in graftd's cgroup the policy decides on it."""
    try:
        addresses = Path("/proc/net/if_inet6").read_text()
    except OSError:
        return False
    return f"{1:032x} " in addresses


def ephemeral_ports() -> tuple[int, int]:
    """The first and the last port that the kernel chooses in this netns. Raises OSError."""
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return int(low), int(high)


def _ip(*arguments: str) -> str:
    try:
        return subprocess.run(("ip", *arguments), check=True, capture_output=True, text=True, timeout=10).stdout
    except FileNotFoundError:
        raise Failure("the command 'ip' is not installed", hint="apt-get install iproute2") from None
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = str(getattr(error, "stderr", "") or error).strip()
        raise Failure(f"ip {' '.join(arguments)}: {reason}") from None


def add_slice_route() -> None:
    """Make the IPv6 slices local addresses of this netns, for its own traffic only. Raises Failure."""
    remove_slice_route()
    _ip("-6", "route", "replace", "local", SLICE6_NETWORK, "dev", "lo", "src", "::1", "table", ROUTE_TABLE)
    _ip("-6", "rule", "add", "iif", "lo", "to", SLICE6_NETWORK, "lookup", ROUTE_TABLE, "pref", RULE_PREFERENCE)


def remove_slice_route() -> None:
    """Undo add_slice_route(); no error if there is no such route."""
    with contextlib.suppress(Failure):
        _ip("-6", "rule", "del", "pref", RULE_PREFERENCE)
    with contextlib.suppress(Failure):
        _ip("-6", "route", "flush", "table", ROUTE_TABLE)


def addresses() -> list[str]:
    """The IP addresses of this netns's devices, without the zone of a link-local one."""
    import psutil

    inet = (socket.AF_INET, socket.AF_INET6)
    found = (entry for entries in psutil.net_if_addrs().values() for entry in entries if entry.family in inet)
    return [entry.address.partition("%")[0] for entry in found]


def outward() -> dict[bool, Address]:
    """The addresses from which this netns sends to the Internet, by family (True: IPv4). Raises OSError.

    Without a default route it is the first global one of a device other than `lo`. A family without one is missing.
    """
    found = {}
    with rtnetlink.Channel() as channel:
        for anywhere in ANYWHERE:
            v4, source = anywhere.v4, channel.source(anywhere)
            if source is None or source.loopback:
                there = [h for h in channel.addresses(None) if h.address.v4 == v4 and h.ifindex != rtnetlink.LO_INDEX]
                source = next((h.address for h in there if h.scope == RT_SCOPE_UNIVERSE), None)
            if source:
                found[v4] = source
    return found


def watch_addresses() -> socket.socket:
    """A socket that can be read when a device of this netns gets or loses an address (rtnetlink(7)).

    Raises OSError.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, rtnetlink.NETLINK_ROUTE)
    try:
        sock.bind((0, RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR))
    except BaseException:
        sock.close()
        raise
    return sock


def drain(sock: socket.socket) -> None:
    """Read what there is to be read; what was lost (ENOBUFS) is no loss to who looks at all addresses then."""
    while True:
        try:
            sock.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise


def has_address(address: Address) -> bool:
    """Does a device of this netns have this address?"""
    return str(address) in addresses()


def add_address(address: Address) -> bool:
    """Put a container's own address on `lo`. False, and nothing done, if a device has it already. Raises Failure.

    The address has scope host, so that the kernel does not choose it as the source of the host's own traffic. It can
    be reached all the same. Its metric does nothing, but that it says whose the address is: marked_addresses().
    """
    if has_address(address):
        return False
    flags = 0 if address.v4 else rtnetlink.IFA_F_NODAD
    _change(_on_lo(address, flags))
    return True


def _on_lo(address: Address, flags: int) -> rtnetlink.Item:
    scope = rtnetlink.RT_SCOPE_HOST
    return rtnetlink.new_address(
        address, rtnetlink.LO_INDEX, MARK, how=rtnetlink.NLM_F_EXCL, scope=scope, flags=flags
    )


@contextlib.contextmanager
def _channel() -> Iterator[rtnetlink.Channel]:
    """A channel to this netns. What goes wrong with it is raised as Failure."""
    try:
        with rtnetlink.Channel() as channel:
            yield channel
    except OSError as error:
        raise Failure(rtnetlink.reason(error), code=errno.errorcode.get(error.errno or 0, "")) from None


def _change(item: rtnetlink.Item) -> None:
    """Have the kernel carry @item out in this netns. Raises Failure."""
    with _channel() as channel:
        channel.carry_out(item)


def add_slice_address(address: Address) -> None:
    """Put an address of the IPv6 slices on `lo`, so that it can be bound without IPV6_FREEBIND. Raises Failure.

    The kernel's own route to it is taken away: that of the slices leads there (add_slice_route()), which is for
    locally generated traffic alone. The kernel adds its own a moment later, by a work queue (addrconf_dad_work() of
    net/ipv6/addrconf.c). remove_address() undoes all.
    """
    _change(_on_lo(address, rtnetlink.IFA_F_NODAD | rtnetlink.IFA_F_NOPREFIXROUTE))
    until = time.monotonic() + ROUTE_SECONDS
    while True:
        try:
            _change(rtnetlink.no_local_route(address))
            return
        except Failure:
            if time.monotonic() > until:
                remove_address(address)
                raise
        time.sleep(ROUTE_PAUSE)


def marked_addresses() -> list[Address]:
    """The addresses on `lo` that an add_address() has put there, of whatever graftd, and that nobody has removed.

    Raises Failure.
    """
    with _channel() as channel:
        held = channel.addresses(None)
    return [each.address for each in held if (each.ifindex, each.metric) == (rtnetlink.LO_INDEX, MARK)]


def remove_address(address: Address) -> None:
    """Undo an add_address() that returned True; no error if `lo` does not have the address."""
    with contextlib.suppress(Failure):
        _change(rtnetlink.no_address(address, rtnetlink.LO_INDEX, scope=rtnetlink.RT_SCOPE_HOST))


def end_connections(address: Address) -> None:
    """Destroy the TCP sockets at an address that its container has lost (SOCK_DESTROY, sock_diag(7)); best effort."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(("ss", "-K", "-tanH", "src", str(address)), capture_output=True, timeout=10)


def loopback_resolvers(path: str = "/etc/resolv.conf") -> list[Address]:
    """The nameservers of resolv.conf(5) that listen on the host's own loopback, as systemd-resolved's stub does."""
    return [a for a, _ in map(parse_nameserver, nameservers(path)) if a.loopback]


def nameservers(path: str = "/etc/resolv.conf") -> list[str]:
    """The nameservers of resolv.conf(5), as parse_nameserver() takes them; none if @path cannot be read."""
    try:
        text = Path(path).read_text(errors="replace")
    except OSError:
        return []
    return nameservers_in(text)


def nameservers_in(text: str) -> list[str]:
    """The nameservers that the @text of a resolv.conf(5) names."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 2 or fields[0] != "nameserver":
            continue
        with contextlib.suppress(UsageError):
            parse_nameserver(fields[1])
            found.append(fields[1])
    return found


def parse_nameserver(text: str) -> tuple[Address, str]:
    """A nameserver's address, and the device that is its zone: "eth0" of fe80::1%eth0 (RFC 4007, 11); "": none.

    Raises UsageError.
    """
    bare, _, zone = text.partition("%")
    return parse_address(bare), zone
