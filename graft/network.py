"""Addresses of containers' own, and what an engine attached to a namespace: pure values.

An own address lives on the host's stack, on `lo`. A container's wildcard binds go to it under their own port numbers,
and its connections to a part of the net leave from it: to all of it for `graft run --ip`, to the engine's network for
an address that Docker, Podman or containerd handed out, so that those need no route back to a private address.

An attachment is a container's place in an engine's network: addresses, published ports, names. The engine makes it
before the container's first process is there (Docker's network driver, CNI ADD), and may while it runs. Container
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
    """A namespace's place in one network of an engine."""

    def __init__(self, key: str, network: str) -> None:
        self.key = key  # of the engine: "docker/ENDPOINT", "cni/CONTAINER/IFNAME"
        self.network = network
        self.netns = self.cookie = 0  # its inode, which may be used again, and its cookie; 0: not known yet,
        self.sandbox: list[str] = []  # but where it is going to be mounted
        self.since = since_boot()
        self.addresses: list[Own] = []
        self.publications: list[Publication] = []
        self.offered: list[dict[str, Any]] = []  # Docker's port mappings, which every endpoint of a container has
        self.names: list[str] = []
        self.resolver: Address | None = None  # where its containers find graftd's, if not at 127.0.0.11

    def in_netns(self, netns: int, cookie: int) -> bool:
        """Is it the attachment of this namespace?"""
        if not self.netns and netns:
            for path in self.sandbox:
                with contextlib.suppress(OSError):
                    if os.stat(path).st_ino == netns:
                        self.netns, self.cookie = netns, cookie
        return bool(netns) and (self.netns, self.cookie) == (netns, cookie)

    def document(self) -> dict[str, Any]:
        """As state.json has it."""
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
    """Seconds; no clock that is set goes into it, and it goes on from one graftd to the next."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def own_document(own: Own) -> list[Any]:
    """As state.json has an address."""
    return [str(own.address), str(own.prefix), own.length, own.network]


def restore_own(saved: list[Any]) -> Own:
    """Back from state.json."""
    address, prefix, length, network = saved
    return Own(parse_address(address), parse_address(prefix), length, network)


def restore_attachment(saved: dict[str, Any]) -> Attachment:
    """Back from state.json."""
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
    """`--ip ADDR`: an address from which everything leaves. Raises UsageError for one that no host can have."""
    address = parse_address(text)
    check_own(address)
    return Own(address, Address(ANY4 if address.v4 else ANY6), 0)


def check_families(owned: list[Own]) -> None:
    """Raise UsageError for two addresses of one family: a wildcard bind goes to one."""
    for v4 in (True, False):
        same = [str(own.address) for own in owned if own.address.v4 == v4]
        if len(same) > 1:
            raise UsageError(f"{' and '.join(same)} are of one family", hint="one address of each")


def check_own(address: Address) -> None:
    """Raise UsageError unless @address can be one host's, and is not of a loopback."""
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
    """ADDR/LEN, as engines give it: the address, and the network that it is in; or PREFIX/LEN @within, if it is."""
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
