"""Values: a container's own addresses, and its attachments to an engine's networks.

An own address is an address of one container on the host's stack, on the device lo. The container's wildcard binds
go to it, with their port numbers unchanged. Its connections leave from it: all of them for `graft run --ip`; only
those within the engine's network for an address from Docker, Podman or containerd, because the world outside has no
route back to a private address.

An attachment connects a network namespace to an engine's network. It has addresses, published ports, and names. The
engine makes it before the container's first process is there (Docker's network driver, CNI ADD), or later. Container
and attachment find each other by the network namespace.
"""

import contextlib
import os
import time
from typing import Any

from graft.endpoint import ANY4, ANY6, Address, Publication, parse_address, parse_publication
from graft.errors import UsageError
from graft.policy import SLICE4_NET, SLICE6_PREFIX, Own


class Attachment:
    """The attachment of a network namespace to one network of an engine."""

    def __init__(self, key: str, network: str) -> None:
        self.key = key  # the engine's: "docker/ENDPOINT", "cni/CONTAINER/IFNAME"
        self.network = network
        self.netns = self.cookie = 0  # inode, which the kernel uses again, and SO_NETNS_COOKIE; 0: not known yet
        self.sandbox: list[str] = []  # paths where the namespace is going to be mounted
        self.since = since_boot()
        self.addresses: list[Own] = []
        self.publications: list[Publication] = []
        self.offered: list[dict[str, Any]] = []  # port mappings as the engine gave them, the same for each network
        self.names: list[str] = []
        self.resolver: Address | None = None  # where its containers ask graftd for names; None: 127.0.0.11

    def in_netns(self, netns: int, cookie: int) -> bool:
        """Does the attachment belong to the namespace with this inode and cookie?

        If its namespace is not known yet, it is looked up at the paths in `sandbox`, and remembered.
        """
        if not self.netns and netns:
            for path in self.sandbox:
                with contextlib.suppress(OSError):
                    if os.stat(path).st_ino == netns:
                        self.netns, self.cookie = netns, cookie
        return bool(netns) and (self.netns, self.cookie) == (netns, cookie)

    def document(self) -> dict[str, Any]:
        """The attachment in JSON, for state.json."""
        return {
            "key": self.key,
            "network": self.network,
            "netns": [self.netns, self.cookie],
            "sandbox": self.sandbox,
            "since": self.since,
            "addresses": [own_document(own) for own in self.addresses],
            "publications": [str(p) for p in self.publications],
            "names": self.names,
            "resolver": str(self.resolver) if self.resolver else None,
            "offered": self.offered,
        }


def since_boot() -> float:
    """Seconds since boot (CLOCK_BOOTTIME, clock_gettime(2)): nobody can set this clock, and all graftds share it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def own_document(own: Own) -> list[Any]:
    """An own address in JSON, for state.json."""
    return [str(own.address), str(own.prefix), own.length, own.network]


def restore_own(saved: list[Any]) -> Own:
    """An own address from what `own_document` returned."""
    address, prefix, length, network = saved
    return Own(parse_address(address), parse_address(prefix), length, network)


def restore_attachment(saved: dict[str, Any]) -> Attachment:
    """An attachment from what `Attachment.document` returned."""
    attachment = Attachment(saved["key"], saved["network"])
    attachment.netns, attachment.cookie = saved["netns"]
    attachment.names, attachment.sandbox = saved["names"], saved["sandbox"]
    attachment.resolver = parse_address(saved["resolver"]) if saved["resolver"] else None
    attachment.since = saved["since"]
    attachment.offered = saved["offered"]
    attachment.addresses = [restore_own(own) for own in saved["addresses"]]
    attachment.publications = [parse_publication(p) for p in saved["publications"]]
    return attachment


def parse_own(text: str) -> Own:
    """`--ip ADDR`: an own address from which every connection leaves.

    Raises UsageError for an address that no host can have.
    """
    address = parse_address(text)
    check_own(address)
    return Own(address, Address(ANY4 if address.v4 else ANY6), 0)


def check_families(owned: list[Own]) -> None:
    """Raise UsageError for two addresses of one family: a wildcard bind can go to one address only."""
    for v4 in (True, False):
        same = [str(own.address) for own in owned if own.address.v4 == v4]
        if len(same) > 1:
            raise UsageError(f"{' and '.join(same)} are of one family", hint="one address of each")


def check_own(address: Address) -> None:
    """Raise UsageError unless @address is a unicast address that is neither loopback nor link-local."""
    raw = address.raw
    v4 = int.from_bytes(raw[12:], "big")
    wrong = ""
    if address.any:
        wrong = "is the wildcard"
    elif (address.v4 and v4 >> 24 == SLICE4_NET >> 24) or str(address) == "::1" or raw.startswith(SLICE6_PREFIX):
        wrong = "is a loopback address"
    elif (address.v4 and (v4 >> 28 >= 0xE or v4 >> 24 == 0)) or raw[0] == 0xFF:
        wrong = "is not an address of one host"
    elif not address.v4 and raw[0] == 0xFE and raw[1] & 0xC0 == 0x80:
        wrong = "is a link-local address"
    if wrong:
        raise UsageError(f"{address} {wrong}", hint="an address of the container's own, like 10.88.0.5")


def network_of(text: str, network: int, within: str = "") -> Own:
    """Parse ADDR/LEN, as engines give it: the address, and the destinations to which connections leave from it.

    Those are the network of ADDR/LEN, or the network of PREFIX/LEN in @within, if that is of the same family.
    @network is the number of the engine's network. Raises UsageError.
    """
    if within and ("." in within) == ("." in text):
        own, wide = network_of(text, network), network_of(within, network)
        return own._replace(prefix=wide.prefix, length=wide.length)
    bare, slash, length_text = text.partition("/")
    address = parse_address(bare)
    longest = 32 if address.v4 else 128
    if not slash or not length_text.isascii() or not length_text.isdigit() or int(length_text) > longest:
        raise UsageError(f"'{text}' is not an address with its prefix length", hint="like 10.77.0.5/16")
    check_own(address)
    length = int(length_text)
    mask = (1 << 128) - (1 << (longest - length))
    prefix = (int.from_bytes(address.raw, "big") & mask).to_bytes(16, "big")
    return Own(address, Address(prefix), length, network)
