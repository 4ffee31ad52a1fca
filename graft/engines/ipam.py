"""Docker's IPAM driver: pools of addresses for networks of graft."""

import ipaddress
from collections.abc import Iterable
from typing import Any

from graft.engines.libnetwork import Request
from graft.errors import Refused, UsageError
from graft.kernel import addresses as addresses_
from graft.kernel.routes import networks_of_the_host
from graft.rules.own_address import network_of
from graft.tenants.registry import Registry

GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
Document = dict[str, Any]

POOLS = ipaddress.ip_network("10.89.0.0/16")  # a network made without --subnet gets a /24 of it


class Pool:
    """The addresses of one network. @part: the range within it that addresses are chosen from (--ip-range), or ""."""

    def __init__(self, prefix: str, part: str, taken: Iterable[str] = ()) -> None:
        self.network = ipaddress.ip_network(prefix)
        self.part = ipaddress.ip_network(part) if part else self.network
        self.taken = set(taken)

    def take(self, wanted: str, used: set[str], *, gateway: bool) -> str:
        """Take the address @wanted, or the first that is free. Raises Refused if it is in use or outside, or none is.

        @used: addresses of attachments. @gateway: it is for the network's gateway, for which the first is reserved.
        """
        if wanted:
            if ipaddress.ip_address(wanted) not in self.network:
                raise Refused(f"{wanted} is not in {self.network}", code="EINVAL")
            if wanted in used or (wanted in self.taken and not gateway):
                raise Refused(f"{wanted} is in use", code="EADDRINUSE")
            self.taken.add(wanted)
            return wanted
        for n, address in enumerate(self.part.hosts()):
            text = str(address)
            if (n > 0 or gateway) and text not in used and text not in self.taken:
                self.taken.add(text)
                return text
        raise Refused(f"no address of {self.part} is free", code="ENOSPC")


class Ipam:
    """The methods of libnetwork's docs/ipam.md. The registry has the pools, for the next graftd, by their prefixes.

    dockerd asks for what its networks have again when it starts (RequiresRequestReplay), also after a reboot.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    @staticmethod
    def capabilities(_request: Request, _pid: int) -> Document:
        """IpamDriver.GetCapabilities."""
        return {"RequiresMACAddress": False, "RequiresRequestReplay": True}

    def request_pool(self, request: Request, _pid: int) -> Document:
        wanted = request.pool or ""
        if request.v6 and not wanted:
            raise UsageError("IPv6 needs --subnet", hint="for example --subnet fd00:77::/64")
        prefix = str(ipaddress.ip_network(wanted) if wanted else self._free_pool())
        network_of(prefix, 0)
        before = self.registry.pools.get(prefix, ("", []))
        self._keep(prefix, Pool(prefix, request.sub_pool or before[0], before[1]))
        return {"PoolID": prefix, "Pool": prefix, "Data": {}}

    def _free_pool(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """Return a /24 that overlaps no pool and no network of the host's, and has no address of it. Raises Refused.

        If dockerd finds that a pool overlaps with a network in use, it asks again, without end.
        """
        used = [*map(ipaddress.ip_network, self.registry.pools), *networks_of_the_host()]
        local = [ipaddress.ip_address(a) for a in addresses_.addresses()]  # an earlier graftd saved no pool
        for network in POOLS.subnets(new_prefix=24):
            if not any(network.overlaps(u) for u in used if u.version == 4) and not any(a in network for a in local):
                return network
        raise Refused(f"no /24 of {POOLS} is free", hint="name one with --subnet", code="ENOSPC")

    def release_pool(self, request: Request, _pid: int) -> Document:
        self.registry.pools.pop(request.pool_id, None)
        self.registry.saved = False
        return {}

    def _pool(self, prefix: str) -> Pool:
        """The pool of an id, which is the prefix. One that an earlier graftd has not saved is made again."""
        return Pool(prefix, *self.registry.pools.get(prefix, ("",)))

    def _keep(self, prefix: str, pool: Pool) -> None:
        part = "" if pool.part == pool.network else str(pool.part)
        self.registry.pools[prefix] = part, sorted(pool.taken)
        self.registry.saved = False  # it is, within a second, or with what is attached next

    def request_address(self, request: Request, _pid: int) -> Document:
        pool = self._pool(request.pool_id)
        used = {str(own.address) for attachment in self.registry.attachments.values() for own in attachment.addresses}
        gateway = (request.options or {}).items() >= GATEWAY.items()
        chosen = pool.take(request.address or "", used, gateway=gateway)
        self._keep(request.pool_id, pool)
        return {"Address": f"{chosen}/{pool.network.prefixlen}", "Data": {}}

    def release_address(self, request: Request, _pid: int) -> Document:
        pool = self._pool(request.pool_id)
        pool.taken.discard(request.address or "")
        self._keep(request.pool_id, pool)
        return {}
