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
from typing import Any, NamedTuple

from graft.kernel import linux
from graft.rules.address import Address, Prefix, parse_address, parse_prefix
from graft.rules.own_address import Own, network_of
from graft.rules.publication import Publication, fold, parse_publication


class Expected(NamedTuple):
    """A container that an engine is creating: its ports and addresses are taken while the creating process lives."""

    pidfd: int
    name: str
    where: tuple[int, int]  # inode and cookie of the network namespace; (0, 0) if not known yet
    publications: list[Publication]
    owned: list[Own]
    shared: bool  # will its sockets share port numbers?
    until: float  # monotonic seconds

    def holds(self) -> bool:
        """May the container still come: does its creator live, and is there time left?"""
        return linux.alive(self.pidfd) and time.monotonic() < self.until


class Attachment:
    """The attachment of a network namespace to one network of an engine."""

    def __init__(self, key: str, network: str) -> None:
        self.key = key  # the engine's: "docker/ENDPOINT", "cni/CONTAINER/IFNAME"
        self.network = network
        self.netns = self.cookie = 0  # inode, which the kernel uses again, and SO_NETNS_COOKIE; 0: not known yet
        self.sandbox: list[str] = []  # paths where the namespace is going to be mounted
        self.since = since_boot()
        self.addresses: list[Own] = []
        self.subnets: list[Prefix] = []  # that the engine gives addresses of; connections leave for `Own.prefix`
        self.publications: list[Publication] = []
        self.offered: list[dict[str, Any]] = []  # port mappings as the engine gave them, the same for each network
        self.names: list[str] = []
        self.uid = 0  # of the user without root whose engine's it is
        self.resolver: Address | None = None  # where its containers ask graftd for names; None: 127.0.0.11

    def give(self, text: str, number: int, within: str = "") -> None:
        """Add an address, ADDR/LEN as the engine gave it. @number and @within are those of `network_of`.

        Raises UsageError.
        """
        own, narrow = network_of(text, number, within), network_of(text, number)
        self.addresses.append(own)
        self.subnets.append(Prefix(narrow.prefix, narrow.length))

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
            "subnets": [str(subnet) for subnet in self.subnets],
            "publications": [str(p) for p in self.publications],
            "names": self.names,
            "uid": self.uid,
            "resolver": str(self.resolver) if self.resolver else None,
            "offered": self.offered,
            "local": [str(own.address) for own in self.addresses if own.local],
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
    attachment.uid = saved.get("uid", 0)
    attachment.offered = saved["offered"]
    if all("publish" in entry for entry in attachment.offered):  # CNI's; an earlier graftd has not folded them
        folded = fold(parse_publication(entry["publish"]) for entry in attachment.offered)
        attachment.offered = [{"publish": str(publication)} for publication in folded]
    local = saved.get("local", ())  # an earlier graftd has not written it
    owned = [restore_own(own) for own in saved["addresses"]]
    attachment.addresses = [own._replace(local=str(own.address) in local) for own in owned]
    attachment.subnets = [parse_prefix(text) for text in saved.get("subnets", [])]  # 0.1 has none
    attachment.publications = [parse_publication(p) for p in saved["publications"]]
    return attachment
