"""Whom the resolver asks for what is no name of a container: its engine's nameservers, or else the host's.

Docker's are those of `docker run --dns` (hostconfig.json), or else of `dns` in daemon.json. One on the loopback is
left out: it would be in the container, and the resolver is not. Podman needs nothing here, because it writes what
`--dns` says into the container's resolv.conf, and the container asks there itself.
"""

import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graft.errors import UsageError
from graft.kernel.addresses import nameservers, parse_nameserver
from graft.log import log
from graft.rules.tables import DNS_PORT
from graft.tenants.tenant import Tenant

SECONDS = 1.0  # for which nameservers are remembered
DAEMON_CONFIGURATION = Path("/etc/docker/daemon.json")


class Nameservers:
    """The nameservers of each container. The loop and the threads of TCP clients call it."""

    def __init__(self, daemon: Path = DAEMON_CONFIGURATION) -> None:
        self.daemon = daemon
        self.known: dict[int, list[str]] = {}  # by tenant
        self.until = 0.0  # monotonic seconds

    def of(self, tenant: Tenant) -> list[str]:
        """The nameservers to ask for a container, in their order, as text. Read again every SECONDS."""
        now = time.monotonic()
        if now > self.until:
            self.known, self.until = {}, now + SECONDS
        known = self.known
        if tenant.id not in known:
            asked = list(tenant.asked.resolver) if tenant.asks_graft else []
            known[tenant.id] = asked or self._of_docker(tenant) or nameservers()
        return known[tenant.id]

    def _of_docker(self, tenant: Tenant) -> list[str]:
        directories = [member.directory for member in list(tenant.members.values()) if member.directory]
        asked = [text for place in directories for text in _listed(Path(place, "hostconfig.json"), "Dns")]
        if directories and not asked:
            asked = _listed(self.daemon, "dns")
        return list(dict.fromkeys(_outside(asked)))


def family_of(address: str) -> int:
    """The family of an address in text."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def where_to_ask(nameserver: str) -> tuple[str, int] | tuple[str, int, int, int]:
    """Where connect(2) goes for a nameserver in text, whose zone is a device of graftd's netns.

    Raises OSError where there is no such device. The C library would take such a text for a name, and look it up.
    """
    address, zone = parse_nameserver(nameserver)
    return (str(address), DNS_PORT, 0, socket.if_nametoindex(zone)) if zone else (str(address), DNS_PORT)


def _listed(path: Path, key: str) -> list[str]:
    """The strings of the list @key of a JSON file that Docker or its administrator wrote; none without it."""
    try:
        found: Any = json.loads(path.read_bytes())
        return [text for text in found.get(key) or () if isinstance(text, str)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        log.debug("nameservers: %s: %s", os.fspath(path), error)
        return []


def _outside(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        try:
            address, _ = parse_nameserver(text)
        except UsageError:
            continue
        if not address.loopback and not address.any:
            yield text
