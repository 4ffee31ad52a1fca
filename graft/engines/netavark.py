"""graft-netavark: a plugin for networks of Podman with the netavark backend (netavark, plugin-API.md).

    podman network create -d graft [--subnet 10.1.0.0/24] NAME

netavark finds it as the file `graft` in one of `netavark_plugin_dirs` (containers.conf(5)). It has the commands
`create`, `setup NETNS`, `teardown NETNS` and `info`, reads JSON from standard input, and writes JSON, an error as
{"error": "..."}. Podman chooses the addresses. They are on the host's stack, and no interface is made here.

This module imports little, because Podman starts an interpreter for each call.
"""

import hashlib
import ipaddress
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from graft import __version__, client
from graft.engines import rootless
from graft.engines.mappings import publication
from graft.errors import GraftError
from graft.kernel.routes import networks_of_the_host

API_VERSION = "1.0.0"
NETWORKS = "/etc/containers/networks"  # network_config_dir of root's Podman (containers.conf(5))
POOL4, LENGTH4 = ipaddress.IPv4Network("10.98.0.0/15"), 24  # beside the network that `graft install podman` writes
LENGTH6 = 64
NO_MAC = "00:00:00:00:00:00"
COMMANDS = {"create": 0, "setup": 1, "teardown": 1, "info": 0}  # with how many arguments

Document = dict[str, Any]
AnyNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


class PluginError(Exception):
    """What Podman is to tell its user."""


def main() -> int:
    """Run `graft-netavark`: a command and its arguments, JSON on standard input. Returns the status."""
    words = sys.argv[1:]
    try:
        if not words or COMMANDS.get(words[0]) != len(words) - 1:
            raise PluginError("usage: graft-netavark create | setup NETNS | teardown NETNS | info")
        result = _run(*words)
    except PluginError as error:
        return _refuse(str(error))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return _refuse(f"what came from netavark is malformed: {error!r}")
    except GraftError as error:
        return _refuse(f"{error.message}: {error.hint}" if error.hint else error.message)
    if result is not None:
        print(json.dumps(result))
    return 0


def _refuse(text: str) -> int:
    print(json.dumps({"error": f"graft: {text}"}))
    return 1


def _run(command: str, netns: str = "") -> Document | None:
    if command == "info":
        return {"version": __version__, "api_version": API_VERSION}
    document = json.load(sys.stdin)
    if command == "create":
        return create(document)
    root = rootless.reach_graftd()
    if command == "setup":
        return setup(document, netns, root)
    teardown(document)
    return None


# -- create --


def create(network: Document) -> Document:
    """The network's configuration, with subnets where none was asked for. Raises PluginError."""
    ipam = (network.get("ipam_options") or {}).get("driver") or "host-local"
    refused = {
        "--internal is not supported (give the containers --annotation graft.egress=none)": network.get("internal"),
        f"IPAM driver '{ipam}' is not supported (leave out --ipam-driver)": ipam != "host-local",
        "a network has no interface on the host (leave out --interface-name)": network.get("network_interface"),
        "a network has the host's routes (leave out --route)": network.get("routes"),
        "the resolver asks those of the host (leave out --dns)": network.get("network_dns_servers"),
        **{f"option '{name}' is unknown (leave it out)": True for name in network.get("options") or {}},
    }
    for text, wrong in refused.items():
        if wrong:
            raise PluginError(text)
    subnets = list(network.get("subnets") or [])
    asked = [ipaddress.ip_network(subnet["subnet"]) for subnet in subnets]
    _refuse_overlaps(asked)
    families = {subnet.version for subnet in asked}
    wanted = {4} if not subnets else set()
    if network.get("ipv6_enabled"):
        wanted.add(6)
    subnets += [{"subnet": str(_choose(version, network["id"]))} for version in sorted(wanted - families)]
    for subnet in subnets:
        subnet["gateway"] = subnet.get("gateway") or str(ipaddress.ip_network(subnet["subnet"])[1])
    return {**network, "subnets": subnets, "ipam_options": {"driver": "host-local"}}


def _refuse_overlaps(asked: list[AnyNetwork]) -> None:
    """Raise PluginError for a subnet of which another network of Podman's has addresses."""
    for name, other in _taken(Path(NETWORKS)):
        for subnet in asked:
            if subnet.version == other.version and subnet.overlaps(other):
                raise PluginError(f"subnet {subnet}: network '{name}' has {other} (give another: --subnet)")


def _choose(version: int, number: str) -> AnyNetwork:
    """A free subnet, by the network's id; of IPv6 one of a random global ID (RFC 4193). Raises PluginError."""
    digest = hashlib.sha256(number.encode()).digest()
    if version == 6:
        return ipaddress.IPv6Network((b"\xfd" + digest[:5] + bytes(10), LENGTH6))
    known = [*(other for _, other in _taken(Path(NETWORKS))), *networks_of_the_host()]
    taken = [other for other in known if isinstance(other, ipaddress.IPv4Network)]
    choices = list(POOL4.subnets(new_prefix=LENGTH4))
    first = int.from_bytes(digest[:4], "big") % len(choices)
    for choice in choices[first:] + choices[:first]:
        if not any(map(choice.overlaps, taken)):
            return choice
    raise PluginError(f"all subnets of {POOL4} are in use (give one: --subnet)")


def _taken(directory: Path) -> list[tuple[str, AnyNetwork]]:
    """Names and subnets of Podman's other networks, as far as they are where it keeps them by default."""
    found: list[tuple[str, AnyNetwork]] = []
    for path in sorted(directory.glob("*.json")):
        try:
            subnets = json.loads(path.read_text()).get("subnets") or []
            found += [(path.stem, ipaddress.ip_network(subnet["subnet"])) for subnet in subnets]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # Podman tells of it
            continue
    return found


# -- setup, teardown --


def setup(options: Document, netns: str, root: str = "") -> Document:
    """Give the netns at the path @netns its addresses and ports. Returns the status block. Raises PluginError.

    @root: the root directory of a rootless engine, whose nameservers are in a network that no socket sees.
    """
    network, asked = options["network"], options["network_options"]
    if asked.get("static_mac"):
        raise PluginError("a container has no link-layer address of its own (leave out --mac-address)")
    subnets = {ipaddress.ip_network(subnet["subnet"]): subnet for subnet in network.get("subnets") or ()}
    given = []
    for text in asked.get("static_ips") or ():
        address = ipaddress.ip_address(text)
        inside = next((subnet for subnet in subnets if address in subnet), None)
        if inside is None:
            raise PluginError(f"{address} is in no subnet of network '{network['name']}'")
        gateway = subnets[inside].get("gateway")
        given.append({"ipnet": f"{address}/{inside.prefixlen}", **({"gateway": gateway} if gateway else {})})
    gateways = sorted((entry["gateway"] for entry in given if "gateway" in entry), key=lambda text: ":" in text)
    resolver = gateways[0] if gateways and network.get("dns_enabled") else ""
    try:
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise PluginError(f"{netns}: {error.strerror}") from None
    client.call(
        "attach",
        start=False,
        fds=(fd,),
        key=_key(options),
        network=network["name"],
        addresses=[entry["ipnet"] for entry in given],
        within="",
        publish=_ports(options.get("port_mappings") or ()),
        names=list(dict.fromkeys([options["container_name"], *(asked.get("aliases") or ())])),
        pod=False,
        resolver=resolver,
    )
    interface = {"mac_address": NO_MAC, "subnets": given}
    return {
        "dns_search_domains": [],
        "dns_server_ips": [resolver] if resolver else rootless.nameservers(root) if root else [],
        "interfaces": {asked["interface_name"]: interface},
    }


def teardown(options: Document) -> None:
    """Take the addresses and ports back. It succeeds again if they are gone. Raises GraftError."""
    client.call("detach", start=False, key=_key(options))


def _key(options: Document) -> str:
    return f"netavark/{options['container_id']}/{options['network']['name']}"


def _ports(mappings: Collection[Document]) -> list[str]:
    """Podman's port mappings as publications."""
    found = []
    for mapping in mappings:
        where = mapping.get("host_ip") or "", int(mapping["host_port"]), int(mapping["container_port"])
        span = int(mapping.get("range") or 1)
        found += [publication(*where, kind, span) for kind in (mapping.get("protocol") or "tcp").split(",")]
    return found
