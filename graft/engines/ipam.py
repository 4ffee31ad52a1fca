"""Docker's IPAM driver: pools of addresses for networks of graft."""

import ipaddress

from graft.errors import Refused

GATEWAY = {"RequestAddressType": "com.docker.network.gateway"}
POOLS = ipaddress.ip_network("10.89.0.0/16")  # a network made without --subnet gets a /24 of it


class Pool:
    """The addresses of one network. @part: the range within it that addresses are chosen from (--ip-range), or ""."""

    def __init__(self, network: ipaddress.IPv4Network | ipaddress.IPv6Network, part: str) -> None:
        self.network = network
        self.part = ipaddress.ip_network(part) if part else network
        self.taken: set[str] = set()

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
