"""Is an address of `graft run --ip` free for a container? Root may say otherwise, by --force-ip.

What is sent to the address from any program of the host goes to the container, and no longer to whoever had it. So an
address that this host sends elsewhere, or at which somebody answers, is more likely a slip than a wish.
"""

import contextlib
import ipaddress
import os
import time
from collections.abc import Iterable

from graft import client
from graft.errors import GraftError, Refused
from graft.kernel import linux, routes
from graft.kernel.addresses import has_address
from graft.rules.address import Address, parse_address, parse_prefix

LINK_LOCAL4 = parse_prefix("169.254.0.0/16")


def check(texts: Iterable[str]) -> None:
    """Raise Refused for the first address of @texts that is somebody else's, as the host of graftd sees it.

    The netns of graftd counts, and not that of this process. Raises OSError.
    """
    netns = _hosts_netns()
    try:
        with linux.inside_netns(netns):
            found = [(address, whose(address)) for address in map(parse_address, texts)]
    finally:
        os.close(netns)
    for address, reason in found:
        if reason and not _allowed(address):
            raise Refused(
                f"--ip {address}: {reason}",
                hint="choose an address that nobody has, or add --force-ip",
                code="EADDRINUSE",
            )


def _hosts_netns() -> int:
    """A descriptor of graftd's netns. Raises OSError."""
    for last in (False, False, True):
        with client.connect(start=True) as connection:
            pid, _, _ = linux.credentials(connection)
            try:
                return os.open(f"/proc/{pid or 'self'}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # that graftd has just ended
                if last:
                    raise
        time.sleep(0.05)
    raise AssertionError


def whose(address: Address) -> str:
    """Why @address is not for a container of the current netns, as the end of a sentence; "" if nothing says so.

    An address of a device here is the host's to give. Raises OSError.
    """
    if has_address(address):
        return ""
    if LINK_LOCAL4.covers(address):
        return "is a link-local address, such as cloud providers' metadata services have"
    route = routes.route_to(address)
    if route is None or route.kind == "local":
        return ""
    if route.kind != "unicast":
        return f"is a {route.kind} address of {route.device}"
    if str(address) in routes.default_gateways(v4=address.v4):
        return f"is the default gateway, on {route.device}"
    if route.default:
        public = ipaddress.ip_address(str(address)).is_global
        return f"is an address of the Internet, routed to {route.gateway or route.device}" if public else ""
    if route.gateway:
        return f"is routed to {route.gateway} on {route.device} ({route.prefix})"
    if not routes.has_neighbours(route.device):
        return f"is routed to {route.device} ({route.prefix})"
    owner = routes.answers(address, route.device)
    return f"answers on {route.device}, as {owner}" if owner else ""


def _allowed(address: Address) -> bool:
    """Has the administrator written @address down as one for containers (graft.toml, `addresses`)?"""
    with contextlib.suppress(GraftError):
        ranges = client.call("status", start=False)["configuration"]["addresses"]
        return any(parse_prefix(text).covers(address) for text in ranges)
    return False
