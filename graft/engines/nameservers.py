"""Whom the resolver asks for what is no name of a container: its engine's nameservers, or else the host's.

Docker's are those of `docker run --dns` (hostconfig.json), or else of `dns` in daemon.json. One on the loopback is
left out: it would be in the container, and the resolver is not.

Podman and Kubernetes write what `--dns` or a pod's dnsPolicy and dnsConfig say into the container's resolv.conf, and
the container asks there itself. One whose queries all come to graft's resolver cannot. For it the file is read when
the engine creates the container, as its programs may write it later, and what it names is the container's
`--resolver`. That holds where connections leave as the host's: the container could ask there itself without.
"""

import contextlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graft.engines.container import Document
from graft.engines.joined import below
from graft.errors import UsageError
from graft.kernel.addresses import nameservers, nameservers_in, parse_nameserver
from graft.log import log
from graft.rules.request import parse_resolver
from graft.rules.tables import DNS_PORT
from graft.tenants.tenant import Tenant

SECONDS = 1.0  # for which nameservers are remembered
RESOLV_CONF = "/etc/resolv.conf"
FILE_MAX = 65536  # bytes of it that are read
NAMESERVERS_MAX = 8
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


def named_by_engine(config: Document, root: str) -> list[str]:
    """The nameservers in the resolv.conf that an engine has written for a container, whose @config this is.

    Those on a loopback are left out, and what `--resolver` does not take. @root: the root directory that the engine's
    process sees.
    """
    places = [m.get("source", "") for m in config.get("mounts") or () if m.get("destination") == RESOLV_CONF]
    if not places or not os.path.isabs(places[-1]):
        return []
    path = below(root, places[-1])
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            text = file.read(FILE_MAX) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b""
    except (OSError, ValueError) as error:
        log.debug("nameservers: %s: %s", path, error)
        return []
    found = []
    for each in _outside(nameservers_in(text.decode(errors="replace"))):
        with contextlib.suppress(UsageError):
            parse_resolver(each)
            found.append(each)
    return found[:NAMESERVERS_MAX]


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
