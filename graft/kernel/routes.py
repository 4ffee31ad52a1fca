"""Where the current netns would send what is for an address, and whether somebody answers there (ip-route(8))."""

import contextlib
import ipaddress
import json
import socket
import subprocess
import time
from typing import Any, NamedTuple

from graft.rules.address import Address

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

DEFAULT_LENGTH = 1  # 0.0.0.0/1 and 128.0.0.0/1 together are a default route, as OpenVPN writes it
ANSWER_SECONDS = 0.5  # a neighbour of the same link answers within milliseconds (ARP, RFC 826; NDP, RFC 4861)
NO_NEIGHBOURS = {"NOARP", "POINTOPOINT", "LOOPBACK"}
RESOLVED = {"REACHABLE", "STALE", "DELAY", "PROBE", "PERMANENT"}


class Route(NamedTuple):
    """The route that the kernel chooses for an address."""

    kind: str  # unicast, local, broadcast, anycast, multicast
    prefix: str  # "default", or PREFIX/LEN
    gateway: str  # "" if the address is on the link
    device: str

    @property
    def default(self) -> bool:
        """Is it one for everything that no other route is for?"""
        _, slash, length = self.prefix.partition("/")
        return self.prefix == "default" or (bool(slash) and int(length) <= DEFAULT_LENGTH)


def _ip(*arguments: str) -> list[dict[str, Any]]:
    """What `ip -j` prints; nothing if it fails, as it does where there is no route."""
    done = subprocess.run(("ip", "-j", *arguments), capture_output=True, text=True, timeout=10)
    with contextlib.suppress(ValueError):
        return list(json.loads(done.stdout)) if done.returncode == 0 else []
    return []


def route_to(address: Address) -> Route | None:
    """The route for @address; None if it cannot be reached. Raises OSError if ip(8) is not installed."""
    found = _ip("-4" if address.v4 else "-6", "route", "get", "fibmatch", str(address))
    if not found:
        return None
    route = {**(found[0].get("nexthops") or [{}])[0], **found[0]}
    gateway = route.get("gateway") or (route.get("via") or {}).get("host") or ""
    return Route(route.get("type", "unicast"), route.get("dst", ""), gateway, route.get("dev", ""))


def networks_of_the_host() -> list[Network]:
    """The networks to which a route of this netns leads, but for default ones: of links, bridges, VPNs.

    Raises OSError if ip(8) is not installed.
    """
    found = [route for family in ("-4", "-6") for route in _ip(family, "route", "show")]
    routes = [Route("", str(route.get("dst")), "", "") for route in found]
    return [ipaddress.ip_network(route.prefix) for route in routes if not route.default]


def default_gateways(*, v4: bool) -> set[str]:
    """The gateways of the default routes of one family. Raises OSError."""
    routes = _ip("-4" if v4 else "-6", "route", "show", "default")
    hops = [hop for route in routes for hop in (route, *(route.get("nexthops") or ()))]
    return {hop["gateway"] for hop in hops if "gateway" in hop}


def has_neighbours(device: str) -> bool:
    """Does the kernel ask on this device who has an address? Raises OSError."""
    return not any(NO_NEIGHBOURS & set(link.get("flags") or ()) for link in _ip("link", "show", "dev", device))


def answers(address: Address, device: str) -> str:
    """The link-layer address of who has @address on the link of @device; "" if nobody answers. Raises OSError.

    An empty datagram to the port `discard` has the kernel ask; whoever has the address need not have the port.
    """
    family = socket.AF_INET if address.v4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.sendto(b"", (str(address), 9))
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        for neighbour in _ip("neigh", "show", "to", str(address), "dev", device):
            if RESOLVED & set(neighbour.get("state") or ()) and neighbour.get("lladdr"):
                return str(neighbour["lladdr"])
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.02)
