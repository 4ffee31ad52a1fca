"""Which addresses a container has in its own netns, and on which device.

A container's programs look there for the machine's addresses, although its sockets are the host's: getaddrinfo(3)
with AI_ADDRCONFIG, `hostname -I`, servers that bind each address. So each family has there

- the container's own addresses, of --ip and of engines' networks; else
- the address from which its connections leave, the host's; else, if none may leave,
- 127.0.0.2, because the host's addresses are not its business then. It may bind that, as all of its loopback, and it
  is no peer of anybody. The dummy address of RFC 7600, 192.0.0.8, and others of 192.0.0.0/24 (RFC 6890) would be no
  peers either, but it could not bind them, and a server that cannot have one of the addresses that it sees may give
  up. IPv6 has no second address like that, so there is none.

Own addresses are on a device that is not `lo` (graft/kernel/nowhere.py); what stands in for a family without one is
on `lo`. A container without own addresses has all on `lo`, unless it asks for a device. It keeps a device it has had.

Pure, but for what it reads of the registry.
"""

from graft.kernel.nowhere import LO
from graft.rules.address import Address, parse_address
from graft.rules.request import NO_INTERFACE, parse_interface
from graft.rules.sysctl import parse_sysctls
from graft.tenants.registry import Registry
from graft.tenants.tenant import CONTAINER, Tenant

DEVICE = "eth0"
NOBODY = parse_address("127.0.0.2")


def wanted(registry: Registry, tenant: Tenant) -> dict[Address, str]:
    """The addresses that a container shall have in its own netns, and the name of the device of each.

    None for who has come by the agent socket without root, who may add what they like to their own netns.
    """
    asked = parse_interface(tenant.asked.interface)
    if tenant.kind != CONTAINER or not (tenant.trusted or tenant.user) or asked == NO_INTERFACE:
        return {}
    owned = [own.address for own in tenant.owned]
    device = tenant.device or asked or (DEVICE if owned else LO)
    found = dict.fromkeys(owned, device)
    for v4 in (True, False):
        if not any(address.v4 == v4 for address in owned):
            address = _stand_in(registry, tenant, v4=v4)
            if address:
                found[address] = LO if owned else device
    if _switches_ipv6_off(tenant):
        found = {address: name for address, name in found.items() if address.v4}
    return found


def shown(tenant: Tenant) -> dict[Address, str]:
    """The addresses that graft has put into a container's netns, and the name of the device of each."""
    return {parse_address(text): name for text, name in tenant.shown.items()}


def _stand_in(registry: Registry, tenant: Tenant, *, v4: bool) -> Address | None:
    """What a container has for a family of which it has no address; None if there is none."""
    if tenant.egress_host and not tenant.strict:
        return registry.outward.get(v4)
    return NOBODY if v4 else None


def _switches_ipv6_off(tenant: Tenant) -> bool:
    """Has the container asked for a netns without IPv6, by a sysctl?"""
    return any(
        name.startswith("net.ipv6.conf.") and name.endswith(".disable_ipv6") and value != "0"
        for name, value in parse_sysctls(tenant.sysctls).items()
    )


def device_of(registry: Registry, tenant: Tenant) -> str:
    """The name of the device that graft has made for a container, or is about to; "" if there is none."""
    names = {tenant.device, *wanted(registry, tenant).values()} - {"", LO}
    return min(names, default="")
